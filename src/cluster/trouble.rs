//! An error of the API client in words: its causes on one line, the cure where one is known, and
//! nothing that a credential plugin printed.

use std::error::Error;

use kube::client::AuthError;

/// Longer texts say nothing more.
const MAX_TEXT: usize = 600;

/// What an error means and what to do about it.
pub fn describe(error: &(dyn Error + 'static)) -> String {
    let chain: Vec<&(dyn Error + 'static)> =
        std::iter::successors(Some(error), |&inner| inner.source()).collect();
    let mut text = chain
        .iter()
        .find_map(|cause| cause.downcast_ref::<AuthError>().and_then(plugin))
        .or_else(|| chain.iter().find_map(|cause| refusal(cause.downcast_ref()?)))
        .unwrap_or_else(|| joined(&chain));
    if let Some((at, _)) = text.char_indices().nth(MAX_TEXT) {
        text.truncate(at);
    }
    if let Some(cure) = cure(&text) {
        text.push_str("; ");
        text.push_str(cure);
    }
    text
}

/// Each cause once: most errors quote the one below them.
fn joined(chain: &[&(dyn Error + 'static)]) -> String {
    let mut text = String::new();
    for cause in chain {
        let words = cause.to_string();
        if !text.contains(&words) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&words);
        }
    }
    text
}

/// The server's own words; the client would add the whole Status object.
fn refusal(error: &kube::Error) -> Option<String> {
    let kube::Error::Api(status) = error else { return None };
    let what = if status.message.is_empty() { &status.reason } else { &status.message };
    Some(format!("{what} ({})", status.code))
}

/// A plugin that failed has perhaps printed a credential to its standard output, never shown here.
fn plugin(error: &AuthError) -> Option<String> {
    let AuthError::AuthExecRun { cmd, out } = error else { return None };
    let said = String::from_utf8_lossy(&out.stderr);
    let line = said.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it said nothing");
    Some(format!("the credential plugin {cmd} failed ({}): {line}", out.status))
}

/// The library's words for what users get wrong. A text that matches none is shown as it is.
fn cure(text: &str) -> Option<&'static str> {
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    if says(&["invalid peer certificate"]) {
        Some(
            "the certificate of the API server is not trusted: it must be signed by the authority in ca.crt \
             (certificate-authority of a kubeconfig), be in date, and name the address that is used",
        )
    } else if says(&[
        "CertificateRequired",
        "BadCertificate",
        "UnknownCA",
        "CertificateUnknown",
        "CertificateExpired",
    ]) {
        Some(
            "the API server refuses the client certificate of the kubeconfig; renew it, or name the right one",
        )
    } else if says(&["InvalidContentType"]) {
        Some("what listens there does not speak TLS; give its https port, or write http://")
    } else if text.ends_with("(401)") {
        Some(
            "the API server does not accept our credentials: a token has ended, or belongs to another cluster; the \
             token file is read again for every request",
        )
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{ExitStatus, Output};

    use super::*;

    fn api(code: u16, message: &str) -> kube::Error {
        let status =
            serde_json::json!({"code": code, "message": message, "reason": "R", "status": "Failure"});
        kube::Error::Api(serde_json::from_value(status).unwrap())
    }

    #[test]
    fn refusals_are_the_servers_words_with_a_cure() {
        let text = describe(&api(401, "Unauthorized"));
        assert!(text.starts_with("Unauthorized (401); ") && text.contains("token"), "{text}");
        assert_eq!(describe(&api(500, "etcd is away")), "etcd is away (500)");
        assert_eq!(describe(&api(500, "")), "R (500)");
    }

    #[test]
    fn what_a_plugin_prints_stays_out_of_logs() {
        let out = Output {
            status: ExitStatus::from_raw(3 << 8),
            stdout: b"{\"token\": \"sesame\"}".to_vec(),
            stderr: b"\n  cannot reach the vault\nmore\n".to_vec(),
        };
        let error = AuthError::AuthExecRun { cmd: "get-token".to_owned(), out: Box::new(out) };
        let text = describe(&kube::Error::Service(Box::new(error)));
        assert!(text.contains("get-token") && text.contains("cannot reach the vault"), "{text}");
        assert!(!text.contains("sesame"), "{text}");
    }

    #[test]
    fn long_texts_are_cut_and_causes_not_repeated() {
        let text = describe(&api(500, &"ä".repeat(2000)));
        assert_eq!(text.chars().count(), MAX_TEXT);
        let inner = std::io::Error::other("invalid peer certificate: UnknownIssuer");
        let text = describe(&kube::Error::Service(Box::new(inner)));
        assert_eq!(text.matches("UnknownIssuer").count(), 1, "{text}");
        assert!(text.contains("ca.crt"), "{text}");
    }
}
