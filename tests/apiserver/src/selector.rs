//! Label and field selectors, in query syntax and as `LabelSelector` objects.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::status::Refusal;
use crate::store::Object;

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Operator {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
}

/// A set of label requirements, all of which must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector(Vec<(String, Operator)>);

impl LabelSelector {
    /// Reads the query form: `a=b,c!=d,e in (f,g),h notin (i),j,!k`.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let mut requirements = Vec::new();
        for part in split_outside_parentheses(text) {
            let part = part.trim();
            if part.is_empty() {
                continue;
            }
            let refuse = || Refusal::bad_request(format!("unable to parse requirement: {part:?}"));
            let set = |text: &str| -> Option<Vec<String>> {
                let inner = text.trim().strip_prefix('(')?.strip_suffix(')')?;
                Some(inner.split(',').map(|v| v.trim().to_owned()).collect())
            };
            let requirement = if let Some((key, values)) = part.split_once(" notin ") {
                (key.trim(), Operator::NotIn(set(values).ok_or_else(refuse)?))
            } else if let Some((key, values)) = part.split_once(" in ") {
                (key.trim(), Operator::In(set(values).ok_or_else(refuse)?))
            } else if let Some((key, value)) = part.split_once("!=") {
                (key.trim(), Operator::NotIn(vec![value.trim().into()]))
            } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (key.trim(), Operator::In(vec![value.trim().into()]))
            } else if let Some(key) = part.strip_prefix('!') {
                (key.trim(), Operator::DoesNotExist)
            } else if part.contains(' ') {
                return Err(refuse());
            } else {
                (part, Operator::Exists)
            };
            requirements.push((requirement.0.to_owned(), requirement.1));
        }
        Ok(Self(requirements))
    }

    /// Reads a `LabelSelector` object (`matchLabels`, `matchExpressions`). Unknown operators match nothing.
    pub fn from_object(selector: &Value) -> Self {
        let mut requirements: Vec<(String, Operator)> = Vec::new();
        for (key, value) in selector["matchLabels"].as_object().into_iter().flatten() {
            requirements.push((key.clone(), Operator::In(vec![value.as_str().unwrap_or_default().into()])));
        }
        for expression in selector["matchExpressions"].as_array().into_iter().flatten() {
            let values: Vec<String> = expression["values"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|v| v.as_str().map(str::to_owned))
                .collect();
            let operator = match expression["operator"].as_str() {
                Some("In") => Operator::In(values),
                Some("NotIn") => Operator::NotIn(values),
                Some("Exists") => Operator::Exists,
                Some("DoesNotExist") => Operator::DoesNotExist,
                _ => Operator::In(Vec::new()),
            };
            requirements.push((expression["key"].as_str().unwrap_or_default().into(), operator));
        }
        Self(requirements)
    }

    /// Reads a plain map, as `spec.selector` of a Service.
    pub fn from_map(map: &Value) -> Self {
        let map = map.as_object().into_iter().flatten();
        Self(
            map.map(|(k, v)| (k.clone(), Operator::In(vec![v.as_str().unwrap_or_default().into()])))
                .collect(),
        )
    }

    /// Whether nothing is required.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the labels satisfy every requirement.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|(key, operator)| {
            let value = labels.get(key);
            match operator {
                Operator::In(values) => value.is_some_and(|v| values.contains(v)),
                Operator::NotIn(values) => value.is_none_or(|v| !values.contains(v)),
                Operator::Exists => value.is_some(),
                Operator::DoesNotExist => value.is_none(),
            }
        })
    }
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0_i32, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

/// Field requirements: dotted path, wanted value, and whether equality is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSelector(Vec<(String, String, bool)>);

impl FieldSelector {
    /// Reads `metadata.name=x,spec.nodeName!=y`.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let mut requirements = Vec::new();
        for part in text.split(',').filter(|p| !p.is_empty()) {
            let (path, value, equal) = if let Some((path, value)) = part.split_once("!=") {
                (path, value, false)
            } else if let Some((path, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (path, value, true)
            } else {
                return Err(Refusal::bad_request(format!(
                    "invalid field selector {part:?}; can't understand it"
                )));
            };
            requirements.push((path.trim().to_owned(), value.trim().to_owned(), equal));
        }
        Ok(Self(requirements))
    }

    fn matches(&self, object: &Object) -> bool {
        self.0.iter().all(|(path, wanted, equal)| {
            let found = match path.as_str() {
                "metadata.name" => object.key.name.clone(),
                "metadata.namespace" => object.key.namespace.clone(),
                _ => {
                    let value = object.value();
                    let leaf = path.split('.').try_fold(&**value, |at, word| at.get(word));
                    match leaf {
                        Some(Value::String(text)) => text.clone(),
                        None | Some(Value::Null) => String::new(),
                        Some(other) => other.to_string(),
                    }
                }
            };
            (found == *wanted) == *equal
        })
    }
}

/// What a list or watch asks for.
#[derive(Debug, Clone, Default)]
pub struct Scope {
    /// Only this namespace; all when empty.
    pub namespace: String,
    /// Only these labels.
    pub labels: LabelSelector,
    /// Only these fields.
    pub fields: FieldSelector,
}

impl Scope {
    /// Whether an object is asked for.
    pub fn contains(&self, object: &Object) -> bool {
        (self.namespace.is_empty() || self.namespace == object.key.namespace)
            && self.labels.matches(&object.labels)
            && self.fields.matches(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn query_selectors_match_as_documented() {
        let web = labels(&[("app", "web"), ("tier", "front")]);
        for (text, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier=front", true),
            ("app!=web", false),
            ("missing!=x", true),
            ("app in (api, web),tier", true),
            ("app notin (web)", false),
            ("!app", false),
            ("!missing", true),
        ] {
            let selector = LabelSelector::parse(text).expect(text);
            assert_eq!(selector.matches(&web), expected, "{text}");
        }
        assert!(LabelSelector::parse("app in web").is_err());
    }
}
