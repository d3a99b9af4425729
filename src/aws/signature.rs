//! Signature Version 4 of a request to AWS ("Create a signed AWS API request" in the IAM User Guide).
//! Own code: the crate that does it brings seventeen others for these lines.

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

use super::credentials::Credentials;

/// A request as it is signed. Its headers by name, in small letters and in order.
#[derive(Debug)]
pub(super) struct Request<'a> {
    pub method: &'a str,
    pub path: &'a str,
    /// As sent, by name.
    pub query: &'a str,
    pub headers: &'a [(&'a str, &'a str)],
    pub body: &'a str,
}

/// The value of its `authorization` header; `time` as in its `x-amz-date`, such as `20150830T123600Z`.
pub(super) fn authorization(
    request: &Request<'_>,
    credentials: &Credentials,
    region: &str,
    service: &str,
    time: &str,
) -> String {
    let names: Vec<&str> = request.headers.iter().map(|(name, _)| *name).collect();
    let names = names.join(";");
    let headers: String =
        request.headers.iter().map(|(name, value)| format!("{name}:{}\n", value.trim())).collect();
    let Request { method, path, query, body, .. } = request;
    let canonical = format!("{method}\n{path}\n{query}\n{headers}\n{names}\n{}", hash(body));
    let date = time.get(..8).unwrap_or(time);
    let scope = format!("{date}/{region}/{service}/aws4_request");
    let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{}", hash(&canonical));
    let key = [date, region, service, "aws4_request"]
        .into_iter()
        .fold(format!("AWS4{}", credentials.secret).into_bytes(), |key, part| keyed(&key, part));
    let signature = hex(&keyed(&key, &text));
    let id = &credentials.id;
    format!("AWS4-HMAC-SHA256 Credential={id}/{scope}, SignedHeaders={names}, Signature={signature}")
}

fn keyed(key: &[u8], text: &str) -> Vec<u8> {
    // Keys of any length are taken.
    Hmac::<Sha256>::new_from_slice(key)
        .map(|mac| mac.chain_update(text).finalize().into_bytes().to_vec())
        .unwrap_or_default()
}

fn hash(text: &str) -> String {
    hex(&Sha256::digest(text))
}

fn hex(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example that AWS's guide works through.
    #[test]
    fn the_published_example_is_met() {
        let credentials = Credentials {
            id: "AKIDEXAMPLE".to_owned(),
            secret: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY".to_owned(),
            token: None,
        };
        let request = Request {
            method: "GET",
            path: "/",
            query: "Action=ListUsers&Version=2010-05-08",
            headers: &[
                ("content-type", "application/x-www-form-urlencoded; charset=utf-8"),
                ("host", "iam.amazonaws.com"),
                ("x-amz-date", "20150830T123600Z"),
            ],
            body: "",
        };
        assert_eq!(
            authorization(&request, &credentials, "us-east-1", "iam", "20150830T123600Z"),
            "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/iam/aws4_request, \
             SignedHeaders=content-type;host;x-amz-date, \
             Signature=5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7"
        );
    }
}
