//! The network configuration that runtimes read: this node's pod CIDRs and the MTU, in the plugin of
//! type `bridge`. Every other byte stays as it is. Pure, but for [`keep`].

use std::ops::Range;
use std::path::Path;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use crate::cni::conflist::Unsuitable;
use crate::cni::{install, spans};

/// Where kube-router's manifests put it.
pub const DEFAULT: &str = "/etc/cni/net.d/10-kuberouter.conf";

/// The text with these pod CIDRs as the address ranges of its bridge plugin, and this MTU (`None` leaves it
/// alone); `None` when nothing has to change. Ranges of networks that the node does not have any more
/// go; a range of one it has keeps its keys (gateway, first and last address).
///
/// # Errors
/// Why the text cannot take it.
pub fn edit(text: &str, pods: &[IpNet], mtu: Option<u32>) -> Result<Option<String>, Unsuitable> {
    let form = |reason: String| Unsuitable::Form(reason);
    let value: Value = serde_json::from_str(text).map_err(|error| form(error.to_string()))?;
    let (start, plugin) = bridge(text, &value)?;
    let mut plugin = plugin.clone();
    let before = plugin.clone();
    if let Some(mtu) = mtu {
        plugin.insert("mtu".to_owned(), mtu.into());
    }
    let ipam = plugin.get("ipam").cloned().unwrap_or_else(|| json!({"type": "host-local"}));
    let Value::Object(mut ipam) = ipam else { return Err(form("its ipam is no object".to_owned())) };
    set_ranges(&mut ipam, pods);
    plugin.insert("ipam".to_owned(), Value::Object(ipam));

    let mut text = text.to_owned();
    let mut changed = false;
    for (key, value) in &plugin {
        if before.get(key) == Some(value) {
            continue;
        }
        changed = true;
        match spans::member(&text, start, key) {
            Some(member) => text.replace_range(member.value, &value.to_string()),
            None => {
                let brace = text.get(start..).and_then(|rest| rest.find('{')).map_or(start, |at| start + at);
                // A plugin has a type, so something follows.
                text.insert_str(brace + 1, &format!("{}: {value}, ", Value::from(key.as_str())));
            }
        }
    }
    Ok(changed.then_some(text))
}

/// Where the bridge plugin begins, and what it says.
fn bridge<'a>(text: &str, value: &'a Value) -> Result<(usize, &'a Map<String, Value>), Unsuitable> {
    let is_bridge = |plugin: &Value| plugin.get("type").and_then(Value::as_str) == Some("bridge");
    let none = || Unsuitable::Form("it has no plugin of type bridge".to_owned());
    if let Some(plugins) = value.get("plugins") {
        let plugins =
            plugins.as_array().ok_or_else(|| Unsuitable::Form("its plugins are no list".to_owned()))?;
        let at = plugins.iter().position(is_bridge).ok_or_else(none)?;
        let span: Option<Range<usize>> = spans::member(text, 0, "plugins")
            .and_then(|member| spans::elements(text, member.value.start))
            .and_then(|elements| elements.get(at).cloned());
        let plugin = plugins.get(at).and_then(Value::as_object).ok_or_else(none)?;
        return Ok((span.ok_or_else(none)?.start, plugin));
    }
    if is_bridge(value) { Ok((0, value.as_object().ok_or_else(none)?)) } else { Err(none()) }
}

/// The subnet of one address range.
fn subnet(range: &Value) -> Option<IpNet> {
    range.get("subnet").and_then(Value::as_str)?.parse::<IpNet>().ok().map(|net| net.trunc())
}

fn set_ranges(ipam: &mut Map<String, Value>, pods: &[IpNet]) {
    let mut known: Vec<Value> = ipam.get("ranges").and_then(Value::as_array).cloned().unwrap_or_default();
    if let Some(old) = ipam.remove("subnet") {
        known.push(json!([{"subnet": old}]));
    }
    let mut sets: Vec<Value> = Vec::new();
    let mut missing: Vec<IpNet> = pods.iter().map(IpNet::trunc).collect();
    for set in known {
        let Value::Array(ranges) = set else { continue };
        let kept: Vec<Value> = ranges
            .into_iter()
            .filter(|range| {
                let position = subnet(range).and_then(|net| missing.iter().position(|wanted| *wanted == net));
                position.map(|position| missing.remove(position)).is_some()
            })
            .collect();
        if !kept.is_empty() {
            sets.push(Value::Array(kept));
        }
    }
    sets.extend(missing.iter().map(|net| json!([{"subnet": net.to_string()}])));
    ipam.insert("ranges".to_owned(), Value::Array(sets));
}

/// Makes the file say this, in one step that leaves no half of it; whether that was needed.
///
/// # Errors
/// When it is missing, cannot take it, or the system refuses.
pub fn keep(path: &Path, pods: &[IpNet], mtu: Option<u32>) -> Result<bool, install::Error> {
    install::rewrite(path, |text| edit(text, pods, mtu))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIST: &str = r#"{
   "cniVersion":"0.3.0",
   "name":"mynet",
   "plugins":[
      {
         "name":"kubernetes",
         "type":"bridge",
         "bridge":"kube-bridge",
         "isDefaultGateway":true,
         "ipam":{
            "type":"host-local"
         }
      },
      { "type":"portmap", "capabilities":{ "snat":true, "portMappings":true } }
   ]
}
"#;

    fn nets(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|net| net.parse().unwrap()).collect()
    }

    fn ranges(text: &str) -> Value {
        let value: Value = serde_json::from_str(text).unwrap();
        value.pointer("/plugins/0/ipam/ranges").or(value.pointer("/ipam/ranges")).unwrap().clone()
    }

    #[test]
    fn cidrs_and_mtu_come_and_go_and_the_rest_stays() {
        let both = nets(&["10.1.0.0/24", "fd10::/64"]);
        let first = edit(LIST, &both, Some(1480)).unwrap().unwrap();
        assert_eq!(ranges(&first), json!([[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd10::/64"}]]));
        assert!(first.contains("\"mtu\": 1480"));
        assert_eq!(edit(&first, &both, Some(1480)), Ok(None));
        assert_eq!(edit(&first, &both, None), Ok(None));
        // Only the ipam's value and the new key differ.
        let tail = LIST.split_once("},\n      { \"type\":\"portmap\"").unwrap().1;
        assert!(
            first.ends_with(tail)
                && first.starts_with(LIST.split_once("\"name\":\"kubernetes\"").unwrap().0.trim_end())
        );
        // The node got another network.
        let second = edit(&first, &nets(&["10.2.0.0/24", "fd10::/64"]), Some(1500)).unwrap().unwrap();
        assert_eq!(ranges(&second), json!([[{"subnet": "fd10::/64"}], [{"subnet": "10.2.0.0/24"}]]));
        assert!(second.contains("\"mtu\": 1500") && !second.contains("1480"));
    }

    #[test]
    fn a_lone_configuration_and_an_old_subnet() {
        let text = r#"{"type":"bridge","name":"x","ipam":{"type":"host-local","subnet":"10.1.0.0/24","rangeStart":"10.1.0.9"}}"#;
        let edited = edit(text, &nets(&["10.1.0.0/24"]), None).unwrap().unwrap();
        let value: Value = serde_json::from_str(&edited).unwrap();
        assert_eq!(
            value["ipam"],
            json!({"type": "host-local", "rangeStart": "10.1.0.9", "ranges": [[{"subnet": "10.1.0.0/24"}]]})
        );
        // A range keeps what else it says.
        let text =
            r#"{"type":"bridge","ipam":{"ranges":[[{"subnet":"10.1.0.0/24","gateway":"10.1.0.254"}]]}}"#;
        assert_eq!(edit(text, &nets(&["10.1.0.0/24"]), None), Ok(None));
        // No ipam at all.
        let edited = edit(r#"{"type":"bridge"}"#, &nets(&["10.1.0.0/24"]), Some(1)).unwrap().unwrap();
        assert_eq!(ranges(&edited), json!([[{"subnet": "10.1.0.0/24"}]]));
    }

    #[test]
    fn what_cannot_take_it_is_said() {
        for (text, part) in [
            ("{", "network configuration"),
            (r#"{"plugins":[{"type":"ptp"}]}"#, "type bridge"),
            (r#"{"plugins":{}}"#, "no list"),
            (r#"{"type":"bridge","ipam":[]}"#, "ipam"),
            ("[]", "type bridge"),
        ] {
            let error = edit(text, &[], None).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn the_file_is_replaced_whole() {
        let folder = std::env::temp_dir().join(format!("ferroute-cni-file-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("10-kuberouter.conflist");
        assert!(keep(&path, &[], None).unwrap_err().to_string().contains("10-kuberouter.conflist"));
        std::fs::write(&path, LIST).unwrap();
        let pods = nets(&["10.1.0.0/24"]);
        assert!(keep(&path, &pods, Some(1480)).unwrap());
        assert!(!keep(&path, &pods, Some(1480)).unwrap());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        std::fs::remove_dir_all(folder).unwrap();
    }

    proptest! {
        #[test]
        fn an_edit_is_json_and_final(pods in prop::collection::btree_set(0u8..9, 0..4), old in prop::collection::vec(0u8..9, 0..4), mtu in 0u32..9000) {
            let net = |number: u8| format!("10.{number}.0.0/24");
            let ranges: Vec<Value> = old.iter().map(|number| json!([{"subnet": net(*number)}])).collect();
            let text = json!({"plugins": [{"type": "x"}, {"ipam": {"ranges": ranges}, "type": "bridge"}]}).to_string();
            let pods: Vec<IpNet> = pods.into_iter().map(|number| net(number).parse().unwrap()).collect();
            let edited = edit(&text, &pods, Some(mtu)).unwrap().unwrap();
            let value: Value = serde_json::from_str(&edited).unwrap();
            prop_assert_eq!(value["plugins"][1]["mtu"].as_u64(), Some(u64::from(mtu)));
            let mut found: Vec<IpNet> = value["plugins"][1]["ipam"]["ranges"].as_array().unwrap().iter()
                .flat_map(|set| set.as_array().unwrap().iter().filter_map(subnet).collect::<Vec<_>>()).collect();
            found.sort_unstable();
            prop_assert_eq!(found, pods.clone());
            prop_assert_eq!(edit(&edited, &pods, Some(mtu)).unwrap(), None);
        }
    }
}
