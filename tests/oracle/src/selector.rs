//! Label selectors.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// Whether labels fulfil every requirement of a selector; an empty selector has none.
///
/// An operator that the API does not know cannot be fulfilled.
pub fn selects(selector: &LabelSelector, labels: &Labels) -> bool {
    for (key, value) in selector.match_labels.iter().flatten() {
        if labels.get(key) != Some(value) {
            return false;
        }
    }
    for requirement in selector.match_expressions.iter().flatten() {
        let value = labels.get(&requirement.key);
        let listed = value.is_some_and(|value| requirement.values.iter().flatten().any(|one| one == value));
        let fulfilled = match requirement.operator.as_str() {
            "In" => listed,
            // Also by objects without the key.
            "NotIn" => !listed,
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            _ => false,
        };
        if !fulfilled {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn every_requirement_counts() {
        let labels: Labels = serde_json::from_value(json!({"app": "web", "tier": ""})).unwrap();
        let one = |key: &str, operator: &str, values: &[&str]| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
        let table: [(Value, bool); 16] = [
            (json!({}), true),
            (json!({"matchLabels": {}, "matchExpressions": []}), true),
            (json!({"matchLabels": {"app": "web"}}), true),
            (json!({"matchLabels": {"app": "web", "tier": "x"}}), false),
            (json!({"matchLabels": {"tier": ""}}), true),
            (json!({"matchLabels": {"none": ""}}), false),
            (one("app", "In", &["db", "web"]), true),
            (one("app", "In", &["db"]), false),
            (one("none", "In", &["db"]), false),
            (one("app", "NotIn", &["db"]), true),
            (one("app", "NotIn", &["db", "web"]), false),
            (one("none", "NotIn", &["db"]), true),
            (one("tier", "Exists", &[]), true),
            (one("none", "Exists", &[]), false),
            (one("none", "DoesNotExist", &[]), true),
            (one("app", "DoesNotExist", &[]), false),
        ];
        for (selector, expected) in table {
            let typed: LabelSelector = serde_json::from_value(selector.clone()).unwrap();
            assert_eq!(selects(&typed, &labels), expected, "{selector}");
        }
        let both = json!({
            "matchLabels": {"app": "web"},
            "matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}],
        });
        assert!(!selects(&serde_json::from_value(both).unwrap(), &labels));
    }
}
