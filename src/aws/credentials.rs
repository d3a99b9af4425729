//! Who calls: the places where AWS's own programs look, in their order.

use std::fmt;

use http::Method;
use serde::Deserialize;

use super::client::{self, Client};
use super::metadata::{self, Metadata};
use super::{Environment, Error};

/// A key of AWS. Its secret parts are never shown.
#[derive(Clone, Deserialize)]
pub(super) struct Credentials {
    #[serde(rename = "AccessKeyId")]
    pub id: String,
    #[serde(rename = "SecretAccessKey")]
    pub secret: String,
    /// Of keys that end.
    #[serde(rename = "Token", default)]
    pub token: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("id", &self.id).finish_non_exhaustive()
    }
}

/// From the environment, a service account's web identity, the agent of the container, the instance's role.
pub(super) async fn find(
    client: &Client,
    environment: &Environment,
    metadata: &Metadata,
) -> Result<Credentials, Error> {
    if let (Some(id), Some(secret)) =
        (environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY"))
    {
        return Ok(Credentials { id, secret, token: environment.get("AWS_SESSION_TOKEN") });
    }
    if let (Some(role), Some(token)) =
        (environment.get("AWS_ROLE_ARN"), secret_file(environment, "AWS_WEB_IDENTITY_TOKEN_FILE")?)
    {
        return of_web_identity(client, environment, metadata, &role, &token).await;
    }
    if let Some(url) = environment.get("AWS_CONTAINER_CREDENTIALS_FULL_URI") {
        let token = secret_file(environment, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")?;
        let token = token.or_else(|| environment.get("AWS_CONTAINER_AUTHORIZATION_TOKEN"));
        let headers: Vec<(&str, &str)> =
            token.iter().map(|token| ("authorization", token.as_str())).collect();
        let what = "the credentials agent";
        let text = client.ask(what, Method::GET, &url, &headers).await?;
        return parse(what, &text);
    }
    let roles = metadata.get(client, "iam/security-credentials/").await.map_err(|error| match error {
        Error::Refused { what, .. } => Error::Refused {
            what,
            action: "iam/security-credentials/".to_owned(),
            reason: "this instance has no role (instance profile)".to_owned(),
        },
        other => other,
    })?;
    let role = roles.lines().next().unwrap_or_default();
    parse(metadata::SERVICE, &metadata.get(client, &format!("iam/security-credentials/{role}")).await?)
}

/// What a file holds that a variable names.
fn secret_file(environment: &Environment, variable: &'static str) -> Result<Option<String>, Error> {
    let Some(path) = environment.get(variable) else { return Ok(None) };
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(source) => Err(Error::File { variable, path, source }),
    }
}

async fn of_web_identity(
    client: &Client,
    environment: &Environment,
    metadata: &Metadata,
    role: &str,
    token: &str,
) -> Result<Credentials, Error> {
    let action = "AssumeRoleWithWebIdentity";
    let body = client::form([
        ("Action", action),
        ("RoleArn", role),
        ("RoleSessionName", "ferroute"),
        ("Version", "2011-06-15"),
        ("WebIdentityToken", token),
    ]);
    let text = client.call(action, environment.endpoint("sts", metadata), "STS", &[], body).await?;
    let part = |missing: &'static str| {
        client::element(&text, missing).map(str::to_owned).ok_or(Error::Incomplete {
            what: "STS",
            action: action.to_owned(),
            missing,
        })
    };
    Ok(Credentials {
        id: part("AccessKeyId")?,
        secret: part("SecretAccessKey")?,
        token: Some(part("SessionToken")?),
    })
}

fn parse(what: &'static str, text: &str) -> Result<Credentials, Error> {
    // The parser's own words could quote a secret.
    serde_json::from_str(text).map_err(|_| Error::Incomplete {
        what,
        action: "a question for credentials".to_owned(),
        missing: "AccessKeyId and SecretAccessKey",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        let key =
            parse("x", r#"{"AccessKeyId": "ASIA", "SecretAccessKey": "hush", "Token": "hush"}"#).unwrap();
        assert_eq!(format!("{key:?}"), r#"Credentials { id: "ASIA", .. }"#);
        let error = parse("x", r#"{"SecretAccessKey": "hush"}"#).unwrap_err().to_string();
        assert!(!error.contains("hush"), "{error}");
    }
}
