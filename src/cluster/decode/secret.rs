//! core/v1 Secret to its values.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::cluster::secret::{Knowledge, Secret};
use crate::cluster::wire::{Item, SecretObject};

/// The values of a Secret. `stringData`, which only manifests have, wins over `data`, as in the API.
pub fn secret(item: &Item<SecretObject>) -> Knowledge {
    // What does not fit is named by its path, never by its value.
    if !item.wrong.is_empty() {
        return Knowledge::Unreadable(item.wrong.join("; ").into());
    }
    let SecretObject { data, string_data, .. } = &item.object;
    let mut values: BTreeMap<Box<str>, Option<Box<[u8]>>> = BTreeMap::new();
    for (key, text) in &data.0 {
        values.insert(key.clone(), STANDARD.decode(text.trim()).ok().map(Vec::into_boxed_slice));
    }
    for (key, text) in &string_data.0 {
        values.insert(key.clone(), Some(text.as_bytes().into()));
    }
    Knowledge::Present(Arc::new(Secret::new(values)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(json: serde_json::Value) -> (Knowledge, String) {
        let item: Item<SecretObject> = serde_json::from_value(json).unwrap();
        (secret(&item), format!("{item:?}"))
    }

    #[test]
    fn values_are_decoded_and_never_shown() {
        let (knowledge, shown) = decoded(serde_json::json!({
            "metadata": {"name": "tor", "namespace": "kube-system"},
            "data": {"password": "aHVudGVyMg==", "broken": "no base64"},
            "stringData": {"plain": "hunter3"},
        }));
        let Knowledge::Present(secret) = &knowledge else { panic!("{knowledge:?}") };
        assert_eq!(secret.value("password"), Ok(b"hunter2".as_slice()));
        assert_eq!(secret.value("plain"), Ok(b"hunter3".as_slice()));
        assert!(secret.value("broken").is_err());
        for value in ["aHVudGVyMg", "hunter"] {
            assert!(!shown.contains(value), "{shown}");
        }
        let (knowledge, _) =
            decoded(serde_json::json!({"metadata": {"name": "tor"}, "data": {"password": [7]}}));
        assert_eq!(knowledge, Knowledge::Unreadable("data is not a string".into()));
    }
}
