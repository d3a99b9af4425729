//! Requests over HTTP, with a limit for time and size, through the proxy that the environment names.

use std::time::Duration;

use http::{Method, Request, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{Connect, HttpConnector};
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioExecutor;
use k8s_openapi::jiff::Timestamp;

use super::Error;
use super::credentials::Credentials;
use super::signature::{self, authorization};

/// For an answer, connection and all.
const TIME_LIMIT: Duration = Duration::from_secs(5);
/// Largest answer taken, in octets.
const SIZE_LIMIT: usize = 64 * 1024;
const FORM: &str = "application/x-www-form-urlencoded; charset=utf-8";

/// Asks. Nothing is kept between requests: there are few.
#[derive(Debug)]
pub(super) struct Client {
    proxies: Matcher,
}

impl Client {
    pub(super) fn new() -> Self {
        Self { proxies: Matcher::from_env() }
    }

    /// A plain question to something on this machine or its link, which no proxy serves.
    pub(super) async fn ask(
        &self,
        what: &'static str,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
    ) -> Result<String, Error> {
        let path = url.splitn(4, '/').nth(3).unwrap_or_default().to_owned();
        self.send(what, &path, method, url, headers, String::new(), false).await
    }

    /// Calls an action of a service of AWS, as a form.
    pub(super) async fn call(
        &self,
        action: &'static str,
        url: String,
        what: &'static str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Result<String, Error> {
        let headers: Vec<(&str, &str)> =
            [("content-type", FORM)].into_iter().chain(headers.iter().copied()).collect();
        self.send(what, action, Method::POST, &url, &headers, body, true).await
    }

    /// Calls an action of EC2, signed.
    pub(super) async fn call_ec2(
        &self,
        action: &'static str,
        url: String,
        region: &str,
        credentials: &Credentials,
        body: String,
    ) -> Result<(), Error> {
        let time = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
        let host = url.parse::<Uri>().ok().and_then(|uri| uri.authority().map(ToString::to_string));
        let host = host.unwrap_or_default();
        let token = credentials.token.as_deref().map(|token| ("x-amz-security-token", token));
        let signed: Vec<(&str, &str)> = [("content-type", FORM), ("host", &host), ("x-amz-date", &time)]
            .into_iter()
            .chain(token)
            .collect();
        let request =
            signature::Request { method: "POST", path: "/", query: "", headers: &signed, body: &body };
        let authorization = authorization(&request, credentials, region, "ec2", &time);
        let headers: Vec<(&str, &str)> = [("authorization", authorization.as_str()), ("x-amz-date", &time)]
            .into_iter()
            .chain(token)
            .collect();
        self.call(action, format!("{}/", url.trim_end_matches('/')), "EC2", &headers, body).await.map(drop)
    }

    #[allow(clippy::too_many_arguments, reason = "a request has that many parts")]
    async fn send(
        &self,
        what: &'static str,
        action: &str,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: String,
        proxied: bool,
    ) -> Result<String, Error> {
        let unreachable = |reason: String| Error::Unreachable { what, url: url.to_owned(), reason };
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request =
            request.body(Full::new(Bytes::from(body))).map_err(|error| unreachable(error.to_string()))?;
        let proxy = self.proxies.intercept(request.uri()).filter(|_| proxied);
        let answering = async {
            match proxy {
                Some(proxy) => {
                    let mut tunnel = Tunnel::new(proxy.uri().clone(), HttpConnector::new());
                    if let Some(credentials) = proxy.basic_auth() {
                        tunnel = tunnel.with_auth(credentials.clone());
                    }
                    exchange(tunnel, request).await
                }
                None => {
                    let mut connector = HttpConnector::new();
                    connector.enforce_http(false);
                    exchange(connector, request).await
                }
            }
        };
        let (status, text) = tokio::time::timeout(TIME_LIMIT, answering)
            .await
            .map_err(|_| unreachable(format!("no answer within {} s", TIME_LIMIT.as_secs())))?
            .map_err(unreachable)?;
        if status.is_success() {
            return Ok(text);
        }
        let said = [element(&text, "Code"), element(&text, "Message")];
        let reason = match said {
            [None, None] => status.to_string(),
            said => said.into_iter().flatten().collect::<Vec<_>>().join(": "),
        };
        Err(Error::Refused { what, action: action.to_owned(), reason })
    }
}

/// One request and its answer, over TLS where the address says so.
async fn exchange<C>(
    connector: C,
    request: Request<Full<Bytes>>,
) -> Result<(http::StatusCode, String), String>
where
    HttpsConnector<C>: Connect + Clone + Send + Sync + 'static,
{
    let connector = HttpsConnectorBuilder::new()
        .try_with_platform_verifier()
        .map_err(|error| error.to_string())?
        .https_or_http()
        .enable_http1()
        .wrap_connector(connector);
    let client = legacy::Client::builder(TokioExecutor::new()).build(connector);
    let answer = client.request(request).await.map_err(|error| crate::cluster::trouble::describe(&error))?;
    let status = answer.status();
    let body =
        Limited::new(answer.into_body(), SIZE_LIMIT).collect().await.map_err(|error| error.to_string())?;
    Ok((status, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
}

/// The body of a form.
pub(super) fn form<'a>(parameters: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = String::new();
    for (name, value) in parameters {
        if !text.is_empty() {
            text.push('&');
        }
        text.push_str(name);
        text.push('=');
        for byte in value.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    text.push(char::from(byte))
                }
                _ => text.push_str(&format!("%{byte:02X}")),
            }
        }
    }
    text
}

/// The text of the first element of a name, in answers that hold no markup inside it.
pub(super) fn element<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    rest.split_once(&format!("</{name}>")).map(|(text, _)| text.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_and_answers() {
        assert_eq!(form([("A", "x/y z"), ("B", "i-1"), ("C", "ü")]), "A=x%2Fy%20z&B=i-1&C=%C3%BC");
        let refusal = "<Response><Errors><Error><Code>UnauthorizedOperation</Code><Message>You are not authorized \
                       </Message></Error></Errors></Response>";
        assert_eq!(element(refusal, "Code"), Some("UnauthorizedOperation"));
        assert_eq!(element(refusal, "Message"), Some("You are not authorized"));
        assert_eq!(element("<Code>", "Code"), None);
        assert_eq!(element("", "Code"), None);
    }
}
