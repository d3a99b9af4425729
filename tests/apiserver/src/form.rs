//! The shapes an object is answered in: as it is, as metadata only, or as a table row.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::events;
use crate::registry::Resource;
use crate::store::Object;
use crate::tables;

/// What the `Accept` header asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The object.
    Whole,
    /// `PartialObjectMetadata`.
    Metadata,
    /// `Table` (meta.k8s.io/v1), as kubectl prints.
    Table,
}

impl Form {
    /// Reads an `Accept` header: the first form this server has wins.
    pub fn from_accept(accept: &str) -> Self {
        for choice in accept.split(',') {
            if choice.contains("as=Table") && choice.contains("v=v1;")
                || choice.ends_with("as=Table;g=meta.k8s.io;v=v1")
            {
                return Self::Table;
            }
            if choice.contains("as=PartialObjectMetadata") && choice.contains("application/json") {
                return Self::Metadata;
            }
            if choice.trim() == "application/json" || choice.trim() == "*/*" {
                break;
            }
        }
        Self::Whole
    }

    /// One object in this form.
    pub fn object(self, resource: &Resource, object: &Object) -> Bytes {
        match self {
            Self::Whole => whole(resource, object),
            Self::Metadata => json_bytes(&partial(&object.value()["metadata"])),
            Self::Table => json_bytes(&tables::table(resource, &[object.value().clone()], None)),
        }
    }

    /// One value that is not (or no longer) stored.
    pub fn value(self, resource: &Resource, value: &Arc<Value>) -> Bytes {
        match self {
            Self::Whole => json_bytes(&in_version(resource, value)),
            Self::Metadata => json_bytes(&partial(&value["metadata"])),
            Self::Table => json_bytes(&tables::table(resource, std::slice::from_ref(value), None)),
        }
    }

    /// A list in this form.
    pub fn list(self, resource: &Resource, items: &[Arc<Object>], metadata: &Value) -> Bytes {
        match self {
            Self::Whole => {
                let size: usize = items.iter().map(|o| o.bytes.len() + 1).sum();
                let mut body = Vec::with_capacity(size + 256);
                let head = json!({
                    "kind": format!("{}List", resource.kind), "apiVersion": resource.api_version(),
                    "metadata": metadata,
                });
                let head = json_bytes(&head);
                body.extend_from_slice(&head[..head.len() - 1]);
                body.extend_from_slice(b",\"items\":[");
                for (at, item) in items.iter().enumerate() {
                    if at > 0 {
                        body.push(b',');
                    }
                    body.extend_from_slice(&whole(resource, item));
                }
                body.extend_from_slice(b"]}");
                Bytes::from(body)
            }
            Self::Metadata => {
                let items: Vec<Value> = items.iter().map(|o| partial(&o.value()["metadata"])).collect();
                json_bytes(&json!({
                    "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
                    "metadata": metadata, "items": items,
                }))
            }
            Self::Table => {
                let values: Vec<Arc<Value>> = items.iter().map(|o| o.value().clone()).collect();
                json_bytes(&tables::table(resource, &values, Some(metadata)))
            }
        }
    }
}

/// The stored bytes where they are in the served version already.
fn whole(resource: &Resource, object: &Object) -> Bytes {
    if !resource.custom && resource.group != "events.k8s.io" {
        return object.bytes.clone();
    }
    let value = object.value();
    let served = resource.api_version();
    if value["apiVersion"] == served.as_str() {
        object.bytes.clone()
    } else {
        json_bytes(&in_version(resource, value))
    }
}

/// An object as the requested group and version show it.
pub fn in_version(resource: &Resource, value: &Value) -> Value {
    let mut value = value.clone();
    if resource.group == "events.k8s.io" {
        events::to_new(&mut value);
    } else if let Some(map) = value.as_object_mut().filter(|_| resource.custom) {
        map.insert("apiVersion".into(), resource.api_version().into());
    }
    value
}

fn partial(metadata: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
}

fn json_bytes(value: &Value) -> Bytes {
    Bytes::from(serde_json::to_vec(value).unwrap_or_default())
}
