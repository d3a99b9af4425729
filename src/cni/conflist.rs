//! Edits of network configurations: our plugin in, our plugin out, every other byte as it was.
//!
//! The plugin stands next to the one that makes the interface, so that policy is there before
//! `portmap` opens host ports. A lone configuration (`.conf`), which cannot chain, gets a list made
//! from it; the file itself stays as it is.

use serde_json::{Map, Value, json};

use super::netconf::VERSIONS;
use super::{PLUGIN, spans};

/// Plugins that make no interface: they change the one of the plugin before.
const CHAINED: [&str; 11] = [
    "bandwidth",
    "firewall",
    "istio-cni",
    "linkerd-cni",
    "loopback",
    "portmap",
    "route-override",
    "sbr",
    "tuning",
    "vrf",
    PLUGIN,
];
/// The key that marks a list made from a lone configuration.
const MADE_BY: &str = "ferroute";

/// Why a configuration cannot take the plugin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsuitable {
    /// No JSON, or not the form of a network configuration.
    #[error("is no network configuration: {0}")]
    Form(String),
    /// No plugin in it makes an interface.
    #[error("has no plugin that makes an interface")]
    NoMain,
    /// A version of CNI under which this plugin cannot be called.
    #[error("has cniVersion {0}, under which no further plugin can be chained; supported are 0.3.0 to 1.1.0")]
    Version(String),
    /// Nothing would be left.
    #[error("has no plugin but ferroute-cni; remove the file or give it its own plugin back")]
    OnlyOurs,
}

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// `plugins` in a row.
    List,
    /// One plugin alone.
    Single,
    /// A list that [`list_from_single`] made from the file of this name.
    MadeFrom(String),
}

/// What a text is, and whether it can take the plugin.
///
/// # Errors
/// Why not.
pub fn examine(text: &str) -> Result<Form, Unsuitable> {
    let object = parse(text)?;
    if let Some(source) = object.get(MADE_BY).and_then(|mark| mark.get("madeFrom")).and_then(Value::as_str) {
        return Ok(Form::MadeFrom(source.to_owned()));
    }
    if object.get("name").and_then(Value::as_str).unwrap_or_default().is_empty() {
        return Err(Unsuitable::Form("it has no name".to_owned()));
    }
    versions(&object)?;
    if object.contains_key("plugins") {
        main_plugin(&types(&object)?).ok_or(Unsuitable::NoMain)?;
        return Ok(Form::List);
    }
    match object.get("type").and_then(Value::as_str) {
        None => Err(Unsuitable::Form("it has neither plugins nor a type".to_owned())),
        Some(kind) if CHAINED.contains(&kind) => Err(Unsuitable::NoMain),
        Some(_) => Ok(Form::Single),
    }
}

/// The list with the plugin in it; `None` when nothing has to change. Where the plugin is there
/// already it keeps its place and its keys, but for those that `settings` names.
///
/// # Errors
/// Why the text cannot take it.
pub fn insert(text: &str, settings: &Map<String, Value>) -> Result<Option<String>, Unsuitable> {
    examine(text)?;
    let object = parse(text)?;
    let types = types(&object)?;
    let elements = elements(text)?;
    if let Some(index) = types.iter().position(|kind| *kind == PLUGIN) {
        let Some(Value::Object(known)) = object.get("plugins").and_then(|list| list.get(index)) else {
            return Ok(None);
        };
        if settings.iter().all(|(key, value)| known.get(key) == Some(value)) {
            return Ok(None);
        }
        let mut entry = known.clone();
        entry.extend(settings.clone());
        let Some(span) = elements.get(index) else { return Ok(None) };
        let mut text = text.to_owned();
        text.replace_range(span.clone(), &render(&entry));
        return Ok(Some(text));
    }
    let main = main_plugin(&types).ok_or(Unsuitable::NoMain)?;
    let Some(span) = elements.get(main) else { return Err(Unsuitable::NoMain) };
    // White space as before the element we follow.
    let before = text.get(..span.start).unwrap_or_default();
    let blank = before.get(before.trim_end().len()..).unwrap_or_default();
    let mut changed = text.to_owned();
    changed.insert_str(span.end, &format!(",{blank}{}", render(&entry(settings))));
    Ok(Some(changed))
}

/// The list without the plugin; `None` when it is not in it.
///
/// # Errors
/// When nothing would be left, or the text is no list.
pub fn remove(text: &str) -> Result<Option<String>, Unsuitable> {
    let object = parse(text)?;
    if !object.contains_key("plugins") {
        return Ok(None);
    }
    let types = types(&object)?;
    if !types.contains(&PLUGIN) {
        return Ok(None);
    }
    if types.iter().all(|kind| *kind == PLUGIN) {
        return Err(Unsuitable::OnlyOurs);
    }
    let elements = elements(text)?;
    let mut text = text.to_owned();
    // From the back, so that spans stay true.
    for index in (0..types.len().min(elements.len())).rev() {
        if types.get(index) != Some(&PLUGIN) {
            continue;
        }
        let own = elements[index].clone();
        // With the comma before it, or as the first with the one behind it.
        let cut = match index.checked_sub(1) {
            Some(before) => elements[before].end..own.end,
            None => own.start..elements.get(1).map_or(own.end, |next| next.start),
        };
        text.replace_range(cut, "");
    }
    Ok(Some(text))
}

/// Whether the plugin is in this list.
pub fn contains(text: &str) -> bool {
    parse(text).is_ok_and(|object| types(&object).is_ok_and(|types| types.contains(&PLUGIN)))
}

/// A list made from a lone configuration, the plugin behind it. `source` is the file's name.
///
/// # Errors
/// Why it cannot be one.
pub fn list_from_single(
    text: &str,
    source: &str,
    settings: &Map<String, Value>,
) -> Result<String, Unsuitable> {
    let object = parse(text)?;
    let version = versions(&object)?;
    let quote = |key: &str| object.get(key).map(Value::to_string).unwrap_or_default();
    Ok(format!(
        "{{\n  \"cniVersion\": {},\n  \"name\": {},\n  \"{MADE_BY}\": {},\n  \"plugins\": [\n    {},\n    {}\n  ]\n}}\n",
        Value::from(version),
        quote("name"),
        json!({"madeFrom": source}),
        text.trim(),
        render(&entry(settings)),
    ))
}

fn parse(text: &str) -> Result<Map<String, Value>, Unsuitable> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Unsuitable::Form("it is no JSON object".to_owned())),
        Err(error) => Err(Unsuitable::Form(error.to_string())),
    }
}

/// Checks every version a runtime may choose; the one named first.
fn versions(object: &Map<String, Value>) -> Result<&str, Unsuitable> {
    let one = object.get("cniVersion").and_then(Value::as_str);
    // Since 1.1 a list may name several; the runtime takes the newest it knows.
    let many = object.get("cniVersions").and_then(Value::as_array).into_iter().flatten();
    let all: Vec<&str> = one.into_iter().chain(many.filter_map(Value::as_str)).collect();
    match all.iter().find(|version| !VERSIONS.contains(version)) {
        Some(version) => Err(Unsuitable::Version(format!("{version:?}"))),
        None => all.first().copied().ok_or_else(|| Unsuitable::Version("0.1.0 (it names none)".to_owned())),
    }
}

fn types(object: &Map<String, Value>) -> Result<Vec<&str>, Unsuitable> {
    let plugins = object.get("plugins").and_then(Value::as_array);
    let plugins = plugins.ok_or_else(|| Unsuitable::Form("its plugins are no list".to_owned()))?;
    plugins
        .iter()
        .map(|plugin| {
            let kind = plugin.get("type").and_then(Value::as_str);
            kind.ok_or_else(|| Unsuitable::Form("one of its plugins has no type".to_owned()))
        })
        .collect()
}

fn main_plugin(types: &[&str]) -> Option<usize> {
    types.iter().position(|kind| !CHAINED.contains(kind))
}

fn elements(text: &str) -> Result<Vec<std::ops::Range<usize>>, Unsuitable> {
    spans::member(text, 0, "plugins")
        .and_then(|member| spans::elements(text, member.value.start))
        .ok_or_else(|| Unsuitable::Form("its plugins are no list".to_owned()))
}

fn entry(settings: &Map<String, Value>) -> Map<String, Value> {
    let mut entry = settings.clone();
    entry.insert("type".to_owned(), PLUGIN.into());
    entry
}

/// One line, `type` first.
fn render(entry: &Map<String, Value>) -> String {
    let mut text = format!("{{ \"type\": \"{PLUGIN}\"");
    for (key, value) in entry.iter().filter(|(key, _)| *key != "type") {
        text.push_str(&format!(", {}: {value}", Value::from(key.as_str())));
    }
    text + " }"
}

#[cfg(test)]
mod tests;
