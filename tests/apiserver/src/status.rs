//! Refusals, as the API server words them: a `Status` object with a code and a reason.

use serde_json::{Value, json};

/// A refusal of a request. Rendered as `kind: Status` (API reference, meta/v1 Status).
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message} ({code} {reason})")]
pub struct Refusal {
    /// HTTP status code.
    pub code: u16,
    /// Machine-readable reason, such as `NotFound`.
    pub reason: &'static str,
    /// Human text, as clients print it.
    pub message: String,
    /// `status.details`, when there is something to say.
    pub details: Option<Value>,
}

/// What is wrong with one field of an object.
#[derive(Debug, Clone)]
pub struct Cause {
    /// `FieldValueInvalid`, `FieldValueRequired`, `FieldValueDuplicate`, ...
    pub reason: &'static str,
    /// Path of the field, such as `spec.ports[0].port`.
    pub field: String,
    /// What the field should be.
    pub message: String,
}

impl Cause {
    /// A value that is not acceptable.
    pub fn invalid(
        field: impl Into<String>,
        value: impl serde::Serialize,
        why: impl std::fmt::Display,
    ) -> Self {
        Self {
            reason: "FieldValueInvalid",
            field: field.into(),
            message: format!("Invalid value: {}: {why}", json!(value)),
        }
    }

    /// A value that is missing.
    pub fn required(field: impl Into<String>, why: impl std::fmt::Display) -> Self {
        Self { reason: "FieldValueRequired", field: field.into(), message: format!("Required value: {why}") }
    }

    /// A value that may stand only once.
    pub fn duplicate(field: impl Into<String>, value: impl serde::Serialize) -> Self {
        Self {
            reason: "FieldValueDuplicate",
            field: field.into(),
            message: format!("Duplicate value: {}", json!(value)),
        }
    }

    /// A value outside a fixed set.
    pub fn unsupported(field: impl Into<String>, value: impl serde::Serialize, supported: &[&str]) -> Self {
        Self {
            reason: "FieldValueNotSupported",
            field: field.into(),
            message: format!(
                "Unsupported value: {}: supported values: {}",
                json!(value),
                supported.join(", ")
            ),
        }
    }

    /// A field that may not be set here, or may not change.
    pub fn forbidden(field: impl Into<String>, why: impl std::fmt::Display) -> Self {
        Self { reason: "FieldValueForbidden", field: field.into(), message: format!("Forbidden: {why}") }
    }
}

impl Refusal {
    /// Any refusal.
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: None }
    }

    /// 404 for an object.
    pub fn not_found(qualified: &str, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{qualified} {name:?} not found")).about(qualified, name)
    }

    /// 404 for a path that is no resource.
    pub fn no_route() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource")
    }

    /// 409, the name is taken.
    pub fn already_exists(qualified: &str, name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{qualified} {name:?} already exists")).about(qualified, name)
    }

    /// 409, the object changed since it was read.
    pub fn conflict(qualified: &str, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {qualified} {name:?}: {why}");
        Self::new(409, "Conflict", message).about(qualified, name)
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 410: the requested revision is no longer in the history.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 422 with one cause per field.
    pub fn invalid(kind: &str, group: &str, name: &str, causes: &[Cause]) -> Self {
        let lines: Vec<String> = causes.iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
        let text = if lines.len() == 1 { lines.concat() } else { format!("[{}]", lines.join(", ")) };
        let qualified = if group.is_empty() { kind.to_owned() } else { format!("{kind}.{group}") };
        let causes: Vec<Value> = causes
            .iter()
            .map(|c| json!({"reason": c.reason, "message": c.message, "field": c.field}))
            .collect();
        Self {
            code: 422,
            reason: "Invalid",
            message: format!("{qualified} {name:?} is invalid: {text}"),
            details: Some(json!({"name": name, "group": group, "kind": kind, "causes": causes})),
        }
    }

    fn about(mut self, qualified: &str, name: &str) -> Self {
        let (plural, group) = qualified.split_once('.').unwrap_or((qualified, ""));
        self.details = Some(json!({"name": name, "group": group, "kind": plural}));
        self
    }

    /// The `Status` object of this refusal.
    pub fn body(&self) -> Value {
        let mut body = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if let Some(details) = &self.details {
            body["details"] = details.clone();
        }
        body
    }
}

/// The `Status` object that answers a successful delete.
pub fn success(qualified: &str, name: &str, uid: &str) -> Value {
    let (plural, group) = qualified.split_once('.').unwrap_or((qualified, ""));
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
        "details": {"name": name, "group": group, "kind": plural, "uid": uid},
    })
}
