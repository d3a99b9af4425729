use proptest::prelude::*;

use super::*;

/// kube-router's daemonset, as kubeadm users have it.
const KUBE_ROUTER: &str = r#"{
   "cniVersion":"0.3.0",
   "name":"mynet",
   "plugins":[
      {
         "name":"kubernetes",
         "type":"bridge",
         "bridge":"kube-bridge",
         "isDefaultGateway":true,
         "hairpinMode": true,
         "ipam":{
            "type":"host-local",
            "ranges":[[{"subnet":"10.244.1.0/24"}]]
         }
      },
      {
         "type":"portmap",
         "capabilities":{
            "snat":true,
            "portMappings":true
         }
      }
   ]
}
"#;
/// k0s runs kube-router with this shape.
const K0S: &str = "{\"cniVersion\":\"0.3.0\",\"name\":\"mynet\",\"plugins\":[{\"bridge\":\"kube-bridge\",\"ipam\":{\"ranges\":[[{\"subnet\":\"10.244.0.0/24\"}]],\"type\":\"host-local\"},\"isDefaultGateway\":true,\"mtu\":1450,\"name\":\"kubernetes\",\"type\":\"bridge\"},{\"capabilities\":{\"portMappings\":true,\"snat\":true},\"type\":\"portmap\"}]}";
/// k3s writes flannel's list with forceAddress.
const K3S: &str = r#"{
  "name":"cbr0",
  "cniVersion":"1.0.0",
  "plugins":[
    {
      "type":"flannel",
      "delegate":{
        "hairpinMode":true,
        "forceAddress":true,
        "isDefaultGateway":true
      }
    },
    {
      "type":"portmap",
      "capabilities":{
        "portMappings":true
      }
    },
    {
      "type":"bandwidth",
      "capabilities":{
        "bandwidth":true
      }
    }
  ]
}
"#;
const CALICO: &str = r#"{
  "name": "k8s-pod-network",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "calico",
      "log_level": "info",
      "datastore_type": "kubernetes",
      "nodename": "n1",
      "mtu": 0,
      "ipam": { "type": "calico-ipam" },
      "policy": { "type": "k8s" },
      "kubernetes": { "kubeconfig": "/etc/cni/net.d/calico-kubeconfig" }
    },
    { "type": "portmap", "snat": true, "capabilities": {"portMappings": true} },
    { "type": "bandwidth", "capabilities": {"bandwidth": true} }
  ]
}"#;
/// kindnet's template leaves blank lines.
const KINDNET: &str = "
{
\t\"cniVersion\": \"0.3.1\",
\t\"name\": \"kindnet\",
\t\"plugins\": [
\t{
\t\t\"type\": \"ptp\",
\t\t\"ipMasq\": false,
\t\t\"ipam\": {
\t\t\t\"type\": \"host-local\",
\t\t\t\"dataDir\": \"/run/cni-ipam-state\",
\t\t\t\"routes\": [
\t\t\t\t
\t\t\t\t
\t\t\t\t{ \"dst\": \"0.0.0.0/0\" }
\t\t\t],
\t\t\t\"ranges\": [
\t\t\t\t[ { \"subnet\": \"10.244.0.0/24\" } ]
\t\t\t]
\t\t}
\t\t,
\t\t\"mtu\": 1500
\t},
\t{
\t\t\"type\": \"portmap\",
\t\t\"capabilities\": {
\t\t\t\"portMappings\": true
\t\t}
\t}
\t]
}
";
const SINGLE: &str = "{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"kubernetes\",\n  \"type\": \"bridge\",\n  \"ipam\": {\"type\": \"host-local\"}\n}\n";

fn none() -> Map<String, Value> {
    Map::new()
}

fn settings(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn types_of(text: &str) -> Vec<String> {
    let value: Value = serde_json::from_str(text).unwrap();
    let plugins = value["plugins"].as_array().unwrap();
    plugins.iter().map(|plugin| plugin["type"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn lists_of_the_field_take_it_and_give_it_back() {
    for (name, text, first, count) in [
        ("kube-router", KUBE_ROUTER, "bridge", 2),
        ("k0s", K0S, "bridge", 2),
        ("k3s", K3S, "flannel", 3),
        ("calico", CALICO, "calico", 3),
        ("kindnet", KINDNET, "ptp", 2),
    ] {
        assert_eq!(examine(text), Ok(Form::List), "{name}");
        let with = insert(text, &none()).unwrap().unwrap();
        let types = types_of(&with);
        assert_eq!(types[..2], [first, PLUGIN], "{name}");
        assert_eq!(types.len(), count + 1, "{name}");
        assert!(contains(&with) && !contains(text), "{name}");
        assert_eq!(insert(&with, &none()).unwrap(), None, "{name}: twice is no change");
        assert_eq!(remove(&with).unwrap().unwrap(), text, "{name}: every byte is back");
        assert_eq!(remove(text).unwrap(), None, "{name}");
        // All that was there still is, in its order.
        let own = with.find(&format!("{{ \"type\": \"{PLUGIN}\" }}")).unwrap();
        let (before, after) = with.split_at(own);
        assert!(text.starts_with(before.trim_end().trim_end_matches(',')), "{name}");
        assert!(text.ends_with(after.split_once('}').unwrap().1), "{name}");
    }
    assert!(
        insert(KUBE_ROUTER, &none()).unwrap().unwrap().contains(
            "      },\n      { \"type\": \"ferroute-cni\" },\n      {\n         \"type\":\"portmap\""
        )
    );
}

#[test]
fn a_strangers_edits_of_our_entry_stay_unless_told_otherwise() {
    let with = insert(KUBE_ROUTER, &settings(json!({"timeout": "9s"}))).unwrap().unwrap();
    assert!(with.contains("{ \"type\": \"ferroute-cni\", \"timeout\": \"9s\" }"));
    assert_eq!(insert(&with, &none()).unwrap(), None);
    assert_eq!(insert(&with, &settings(json!({"timeout": "9s"}))).unwrap(), None);
    let changed = insert(&with, &settings(json!({"whenUnavailable": "allow"}))).unwrap().unwrap();
    assert!(
        changed
            .contains("{ \"type\": \"ferroute-cni\", \"timeout\": \"9s\", \"whenUnavailable\": \"allow\" }")
    );
    assert_eq!(remove(&changed).unwrap().unwrap(), KUBE_ROUTER);
    // Moved to the end by hand, it stays there.
    let moved = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"portmap"},{"type":"ferroute-cni"}]}"#;
    assert_eq!(insert(moved, &none()).unwrap(), None);
}

#[test]
fn it_is_found_in_every_place() {
    let list = |plugins: &str| format!("{{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[{plugins}]}}");
    let (own, bridge) = ("{\"type\":\"ferroute-cni\"}", "{\"type\":\"bridge\"}");
    for (plugins, left) in [
        (format!("{own}, {bridge}"), bridge.to_owned()),
        (format!("{own} , {own},\n {bridge}"), bridge.to_owned()),
        (format!("{bridge} ,{own}"), bridge.to_owned()),
        (format!("{bridge},{own},{own}"), bridge.to_owned()),
        (format!("{bridge},{own},{bridge},{own},{bridge}"), format!("{bridge},{bridge},{bridge}")),
    ] {
        assert_eq!(remove(&list(&plugins)).unwrap().unwrap(), list(&left), "{plugins}");
    }
    assert_eq!(remove(&list(own)), Err(Unsuitable::OnlyOurs));
}

#[test]
fn what_cannot_take_it_says_why() {
    for (text, part) in [
        ("", "no network configuration"),
        ("[]", "no JSON object"),
        ("{\"cniVersion\":\"1.0.0\",\"plugins\":[{\"type\":\"bridge\"}]}", "no name"),
        ("{\"cniVersion\":\"1.0.0\",\"name\":\"n\"}", "neither plugins nor a type"),
        ("{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":{}}", "no list"),
        ("{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[{}]}", "no type"),
        ("{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[]}", "makes an interface"),
        (
            "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[{\"type\":\"portmap\"}]}",
            "makes an interface",
        ),
        ("{\"cniVersion\":\"1.0.0\",\"name\":\"lo\",\"type\":\"loopback\"}", "makes an interface"),
        ("{\"name\":\"n\",\"plugins\":[{\"type\":\"bridge\"}]}", "0.1.0"),
        ("{\"cniVersion\":\"0.2.0\",\"name\":\"n\",\"type\":\"bridge\"}", "0.2.0"),
        ("{\"cniVersion\":\"9.0.0\",\"name\":\"n\",\"plugins\":[{\"type\":\"bridge\"}]}", "9.0.0"),
        (
            "{\"cniVersions\":[\"1.0.0\",\"1.9.0\"],\"name\":\"n\",\"plugins\":[{\"type\":\"bridge\"}]}",
            "1.9.0",
        ),
    ] {
        let error = insert(text, &none()).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
        assert_eq!(remove(text).unwrap_or_default(), None, "{text}");
    }
    let several =
        "{\"cniVersions\":[\"1.0.0\",\"1.1.0\"],\"name\":\"n\",\"plugins\":[{\"type\":\"bridge\"}]}";
    assert!(insert(several, &none()).unwrap().is_some());
}

#[test]
fn a_lone_configuration_becomes_a_list() {
    assert_eq!(examine(SINGLE), Ok(Form::Single));
    let list = list_from_single(SINGLE, "10-bridge.conf", &none()).unwrap();
    assert_eq!(examine(&list), Ok(Form::MadeFrom("10-bridge.conf".to_owned())));
    assert_eq!(types_of(&list), ["bridge", PLUGIN]);
    let value: Value = serde_json::from_str(&list).unwrap();
    assert_eq!((&value["name"], &value["cniVersion"]), (&json!("kubernetes"), &json!("0.3.1")));
    assert_eq!(value["plugins"][0], serde_json::from_str::<Value>(SINGLE).unwrap());
    assert!(list.contains(SINGLE.trim()));
}

fn plugin() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(r#"{"type":"bridge","ipam":{"type":"host-local"}}"#.to_owned()),
        Just("{ \"x\": \"]},\\\"\", \"type\" : \"portmap\" }".to_owned()),
        Just(r#"{"capabilities":{"bandwidth":true},"type":"bandwidth"}"#.to_owned()),
        Just("{\n\t\"type\": \"calico\"\n}".to_owned()),
    ]
}

proptest! {
    #[test]
    fn in_and_out_again_is_the_same_text(
        plugins in prop::collection::vec(plugin(), 1..6),
        blanks in prop::collection::vec("[ \t\n]{0,3}", 12),
        tail in prop_oneof![Just(""), Just(",\"z\":[1e3,null]"), Just("\n , \"plugin\":[]")],
    ) {
        let mut text = "{\"name\":\"n\",\"cniVersion\":\"1.1.0\",\"plugins\":[".to_owned();
        for (index, plugin) in plugins.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            text += &format!("{comma}{}{plugin}{}", blanks[2 * index], blanks[2 * index + 1]);
        }
        text += &format!("]{tail}}}");
        match insert(&text, &none()) {
            Ok(with) => {
                let with = with.unwrap();
                prop_assert_eq!(insert(&with, &none()).unwrap(), None);
                prop_assert_eq!(remove(&with).unwrap(), Some(text));
            }
            Err(error) => prop_assert_eq!(error, Unsuitable::NoMain),
        }
    }

    #[test]
    fn no_text_panics(text in ".{0,80}") {
        let _ = (examine(&text), insert(&text, &none()), remove(&text), list_from_single(&text, "a", &none()));
    }
}
