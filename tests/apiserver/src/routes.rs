//! HTTP: paths, query parameters and bodies to verbs, and back.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE};
use hyper::{Method, Request, Response};
use serde_json::{Value, json};

use crate::control;
use crate::discovery;
use crate::form::{Form, in_version};
use crate::patch::PatchKind;
use crate::registry::Resource;
use crate::selector::{FieldSelector, LabelSelector, Scope};
use crate::state::State;
use crate::status::{self, Refusal};
use crate::store::Key;
use crate::verbs::{DeleteOptions, Part, scale_of};
use crate::watch::{self, WatchRequest};

/// The body of an answer.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;

/// The largest request body: etcd's limit leaves real servers at about 3 MiB.
const BODY_LIMIT: usize = 16 * 1024 * 1024;

/// Answers one request. Never fails: refusals become `Status` objects; a fault may cut the connection.
pub async fn handle(
    state: Arc<State>,
    caller: Caller,
    request: Request<Incoming>,
) -> Result<Response<Body>, Cut> {
    match route(state, caller, request).await {
        Ok(response) => Ok(response),
        Err(Failed::Cut) => Err(Cut),
        Err(Failed::Refused(refusal, retry_after)) => {
            let mut response = answer(refusal.code, &refusal.body());
            if let Some(value) = retry_after.and_then(|s| s.to_string().parse().ok()) {
                response.headers_mut().insert("Retry-After", value);
            }
            Ok(response)
        }
    }
}

/// What the connection itself says about who asks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Caller {
    /// It showed a client certificate that the server's authority has signed.
    pub verified: bool,
}

/// The connection is to be cut instead of answered.
#[derive(Debug, thiserror::Error)]
#[error("connection cut on demand")]
pub struct Cut;

enum Failed {
    Refused(Refusal, Option<u64>),
    Cut,
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal, None)
    }
}

/// What a path names.
struct Target {
    resource: Arc<Resource>,
    namespace: String,
    name: Option<String>,
    sub: Option<String>,
}

struct Call {
    method: Method,
    query: HashMap<String, String>,
    form: Form,
    content_type: String,
    body: Bytes,
}

impl Call {
    fn get(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str).filter(|v| !v.is_empty())
    }

    fn is(&self, name: &str) -> bool {
        matches!(self.get(name), Some("true" | "1"))
    }

    fn dry_run(&self) -> bool {
        self.get("dryRun").is_some()
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, Refusal> {
        let Some(text) = self.get(name) else { return Ok(None) };
        text.parse()
            .map(Some)
            .map_err(|_| Refusal::bad_request(format!("invalid value for {name}: {text:?}")))
    }

    fn object(&self) -> Result<Value, Refusal> {
        if self.content_type.contains("yaml") {
            let text = std::str::from_utf8(&self.body).map_err(|e| Refusal::bad_request(e.to_string()))?;
            return serde_saphyr::from_str(text)
                .map_err(|e| Refusal::bad_request(format!("error converting YAML to JSON: {e}")));
        }
        if self.content_type.contains("protobuf") {
            return Err(Refusal::new(
                415,
                "UnsupportedMediaType",
                "this server reads JSON and YAML, no protobuf: use `kubectl create -f`",
            ));
        }
        serde_json::from_slice(&self.body)
            .map_err(|e| Refusal::bad_request(format!("couldn't parse the body as JSON: {e}")))
    }
}

async fn route(
    state: Arc<State>,
    caller: Caller,
    request: Request<Incoming>,
) -> Result<Response<Body>, Failed> {
    let delay = state.faults.current_delay();
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let header = |name| parts.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let call = Call {
        method: parts.method.clone(),
        query: query(parts.uri.query().unwrap_or_default()),
        form: Form::from_accept(header(ACCEPT)),
        content_type: header(CONTENT_TYPE).to_owned(),
        body: Limited::new(body, BODY_LIMIT)
            .collect()
            .await
            .map_err(|e| Refusal::new(413, "RequestEntityTooLarge", e.to_string()))?
            .to_bytes(),
    };
    if path == "/__faults" {
        return Ok(json_answer(200, &control::handle(&state, &call.method, &call.object()?)?));
    }
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    authenticate(&state, caller, header(AUTHORIZATION))?;
    let words: Vec<String> = path.split('/').filter(|w| !w.is_empty()).map(decode).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["healthz" | "livez" | "readyz", ..] => {
            return Ok(respond(200, "text/plain", Bytes::from_static(b"ok")));
        }
        ["version"] => return Ok(json_answer(200, &discovery::version(&state.settings.git_version))),
        ["openapi", "v2"] if header(ACCEPT).contains("protobuf") => {
            // '@' is no legal media type, yet what older servers said and clients before 1.22 ask for.
            let kind = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
            return Ok(respond(200, kind, Bytes::from_static(discovery::OPENAPI_V2_PROTOBUF)));
        }
        ["openapi", "v2"] => return Ok(json_answer(200, &discovery::openapi_v2())),
        ["openapi", "v3"] => return Ok(json_answer(200, &json!({"paths": {}}))),
        ["api"] => return Ok(json_answer(200, &discovery::core_versions(header(hyper::header::HOST)))),
        ["apis"] => return Ok(json_answer(200, &state.read(discovery::groups))),
        ["apis", group] => {
            let found = state.read(|registry| discovery::one_group(registry, group));
            return Ok(json_answer(200, &found.ok_or_else(Refusal::no_route)?));
        }
        ["api", version] => return list_resources(&state, "", version),
        ["apis", group, version] => return list_resources(&state, group, version),
        ["apis", "authorization.k8s.io", _, kind]
        | ["apis", "authorization.k8s.io", _, "namespaces", _, kind]
            if call.method == Method::POST =>
        {
            // The answer is the same whatever is asked, in protobuf too.
            let review = call.object().unwrap_or_else(|_| json!({"apiVersion": "authorization.k8s.io/v1"}));
            return Ok(json_answer(201, &allowed(kind, review)));
        }
        _ => {}
    }
    let target = find_target(&state, &words)?;
    let verb = verb(&call, &target);
    state.faults.count(verb, &target.resource.plural);
    if let Some(failure) = state.faults.take_failure(verb, &target.resource.plural) {
        if failure.status == 0 {
            return Err(Failed::Cut);
        }
        let (reason, message) = match failure.status {
            401 => ("Unauthorized", "Unauthorized"),
            403 => ("Forbidden", &*forbidden(verb, &target.resource)),
            404 => ("NotFound", "the server could not find the requested resource"),
            410 => ("Expired", "too old resource version, on demand"),
            429 => (
                "TooManyRequests",
                "the server has received too many requests and has asked us to try again later",
            ),
            503 => ("ServiceUnavailable", "the server is currently unable to handle the request"),
            504 => ("Timeout", "request did not complete within the allowed duration"),
            _ => ("InternalError", "an error on the server, on demand"),
        };
        return Err(Failed::Refused(Refusal::new(failure.status, reason, message), failure.retry_after));
    }
    dispatch(&state, call, &target)
}

fn authenticate(state: &State, caller: Caller, header: &str) -> Result<(), Refusal> {
    if caller.verified {
        return Ok(());
    }
    let Some(path) = &state.settings.token_file else { return Ok(()) };
    // Read at every request: rotation needs no signal.
    let token = std::fs::read_to_string(path).unwrap_or_default();
    let given = header.strip_prefix("Bearer ").unwrap_or_default();
    if token.trim().is_empty() || given != token.trim() {
        return Err(Refusal::new(401, "Unauthorized", "Unauthorized"));
    }
    Ok(())
}

/// The words of the RBAC authorizer.
fn forbidden(verb: &str, resource: &Resource) -> String {
    format!(
        "{}{} is forbidden: User \"system:serviceaccount:kube-system:ferroute\" cannot {verb} resource \"{}\" in API \
         group \"{}\" at the cluster scope",
        resource.plural,
        if resource.group.is_empty() { String::new() } else { format!(".{}", resource.group) },
        resource.plural,
        resource.group
    )
}

fn list_resources(state: &State, group: &str, version: &str) -> Result<Response<Body>, Failed> {
    let found = state.read(|registry| discovery::resources(registry, group, version));
    Ok(json_answer(200, &found.ok_or_else(Refusal::no_route)?))
}

fn allowed(kind: &str, mut review: Value) -> Value {
    if let Some(map) = review.as_object_mut() {
        let status = if kind == "selfsubjectrulesreviews" {
            json!({"resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}],
                "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}], "incomplete": false})
        } else {
            json!({"allowed": true})
        };
        let kinds = ["SelfSubjectAccessReview", "SelfSubjectRulesReview", "SubjectAccessReview"];
        if let Some(kind) = kinds.iter().find(|k| kind.starts_with(&k.to_lowercase())) {
            map.insert("kind".into(), (*kind).into());
        }
        map.insert("status".into(), status);
    }
    review
}

fn find_target(state: &State, words: &[&str]) -> Result<Target, Refusal> {
    let (group, version, rest) = match words {
        ["api", version, rest @ ..] => ("", *version, rest),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return Err(Refusal::no_route()),
    };
    let (namespace, rest) = match rest {
        // /namespaces/<name>/status and /finalize are about the Namespace itself.
        ["namespaces", _, "status" | "finalize"] => ("", rest),
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
        rest => ("", rest),
    };
    let (plural, name, sub) = match rest {
        [plural] => (*plural, None, None),
        [plural, name] => (*plural, Some((*name).to_owned()), None),
        [plural, name, sub] => (*plural, Some((*name).to_owned()), Some((*sub).to_owned())),
        _ => return Err(Refusal::no_route()),
    };
    let resource = state.resource(group, version, plural).ok_or_else(Refusal::no_route)?;
    if resource.namespaced && namespace.is_empty() && name.is_some()
        || !resource.namespaced && !namespace.is_empty()
    {
        return Err(Refusal::no_route());
    }
    Ok(Target { resource, namespace: namespace.to_owned(), name, sub })
}

fn verb(call: &Call, target: &Target) -> &'static str {
    match call.method {
        Method::GET if call.is("watch") => "watch",
        Method::GET if target.name.is_none() => "list",
        Method::GET => "get",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "other",
    }
}

fn dispatch(state: &Arc<State>, call: Call, target: &Target) -> Result<Response<Body>, Failed> {
    let resource = &*target.resource;
    let shown =
        |code: u16, value: &Arc<Value>| respond(code, "application/json", call.form.value(resource, value));
    let Some(name) = &target.name else {
        return match call.method {
            Method::GET if call.is("watch") => watch_answer(state, &call, target, None),
            Method::GET => list(state, &call, target),
            Method::POST => {
                let made = state.create(resource, &target.namespace, call.object()?, call.dry_run())?;
                Ok(shown(201, &made))
            }
            Method::DELETE => {
                let options = delete_options(&call)?;
                let found = state.store.all(&resource.storage, &scope(&call, target)?);
                for object in &found {
                    match state.delete(resource, &object.key, &options) {
                        Err(refusal) if refusal.code != 404 => return Err(refusal.into()),
                        _ => {}
                    }
                }
                let metadata = json!({"resourceVersion": state.store.revision().to_string()});
                Ok(respond(200, "application/json", call.form.list(resource, &found, &metadata)))
            }
            _ => Err(method_not_allowed()),
        };
    };
    let key = Key::new(&target.namespace, name);
    let part = match target.sub.as_deref() {
        None => Part::Main,
        Some("status") if resource.status => Part::Status,
        Some("scale") if resource.scale => Part::Scale,
        Some("eviction") if resource.storage == "pods" && call.method == Method::POST => {
            state.delete(resource, &key, &DeleteOptions::default())?;
            return Ok(json_answer(201, &status::success("pods", name, "")));
        }
        Some("finalize") if resource.storage == "namespaces" => Part::Main,
        Some(_) => return Err(Refusal::no_route().into()),
    };
    let shown_part = |code: u16, value: &Arc<Value>| {
        if part == Part::Scale { json_answer(code, &scale_of(value)) } else { shown(code, value) }
    };
    match call.method {
        Method::GET if call.is("watch") => watch_answer(state, &call, target, Some(name)),
        Method::GET => {
            let object = state.find(resource, &key)?;
            if part == Part::Scale {
                return Ok(json_answer(200, &scale_of(object.value())));
            }
            Ok(respond(200, "application/json", call.form.object(resource, &object)))
        }
        Method::PUT => {
            let written = state.update(resource, &key, part, call.object()?, call.dry_run())?;
            Ok(shown_part(200, &written))
        }
        Method::PATCH => {
            let kind = PatchKind::from_content_type(&call.content_type)?;
            let manager = call.get("fieldManager").unwrap_or("unknown");
            let body = call.object()?;
            let (written, made) = state.patch(resource, &key, part, kind, body, manager, call.dry_run())?;
            Ok(shown_part(if made { 201 } else { 200 }, &written))
        }
        Method::DELETE => {
            let (object, gone) = state.delete(resource, &key, &delete_options(&call)?)?;
            if gone && resource.storage != "pods" {
                let uid = object["metadata"]["uid"].as_str().unwrap_or_default();
                return Ok(json_answer(200, &status::success(&resource.qualified(), name, uid)));
            }
            Ok(json_answer(200, &in_version(resource, &object)))
        }
        _ => Err(method_not_allowed()),
    }
}

fn method_not_allowed() -> Failed {
    Refusal::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        .into()
}

fn scope(call: &Call, target: &Target) -> Result<Scope, Refusal> {
    Ok(Scope {
        namespace: target.namespace.clone(),
        labels: LabelSelector::parse(call.get("labelSelector").unwrap_or_default())?,
        fields: FieldSelector::parse(call.get("fieldSelector").unwrap_or_default())?,
    })
}

fn delete_options(call: &Call) -> Result<DeleteOptions, Refusal> {
    let body = if call.body.is_empty() { Value::Null } else { call.object()? };
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let policy = call.get("propagationPolicy").or(body["propagationPolicy"].as_str());
    Ok(DeleteOptions {
        grace: call.number("gracePeriodSeconds")?.or(body["gracePeriodSeconds"].as_i64()),
        uid: text(&body["preconditions"]["uid"]),
        resource_version: text(&body["preconditions"]["resourceVersion"]),
        orphan: policy == Some("Orphan") || body["orphanDependents"] == true,
        dry_run: call.dry_run() || body["dryRun"].as_array().is_some_and(|d| !d.is_empty()),
    })
}

fn list(state: &State, call: &Call, target: &Target) -> Result<Response<Body>, Failed> {
    let resource = &*target.resource;
    let scope = scope(call, target)?;
    let asked: Option<usize> = call.number::<usize>("limit")?.filter(|limit| *limit > 0);
    let limit = match (asked, state.faults.current_page_limit()) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    let wanted: Option<u64> = call.number("resourceVersion")?;
    let now = state.store.revision();
    let exact = call.get("resourceVersionMatch") == Some("Exact");
    if wanted.is_some_and(|w| w > now) {
        let mut refusal = Refusal::new(
            504,
            "Timeout",
            format!("Too large resource version: {}, current: {now}", wanted.unwrap_or(0)),
        );
        refusal.details = Some(json!({"retryAfterSeconds": 1, "causes": [
            {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]}));
        return Err(Failed::Refused(refusal, Some(1)));
    }
    let (at, after) = match call.get("continue") {
        Some(token) => {
            let (at, key) = read_token(token)?;
            (Some(at), Some(key))
        }
        None if exact => (wanted.filter(|w| *w > 0), None),
        None => (state.faults.stale_revision(), None),
    };
    let page = state.store.page(&resource.storage, &scope, at, after.as_ref(), limit)?;
    let mut metadata = json!({"resourceVersion": page.revision.to_string()});
    if let Some((last, rest)) = &page.more {
        metadata["continue"] = write_token(page.revision, last).into();
        metadata["remainingItemCount"] = (*rest).into();
    }
    Ok(respond(200, "application/json", call.form.list(resource, &page.items, &metadata)))
}

/// `revision/namespace/name`: no name holds a slash. Escaping is left to the client.
fn write_token(revision: u64, key: &Key) -> String {
    format!("{revision}/{}/{}", key.namespace, key.name)
}

fn read_token(token: &str) -> Result<(u64, Key), Refusal> {
    let mut parts = token.splitn(3, '/');
    let mut read = || Some((parts.next()?.parse().ok()?, Key::new(parts.next()?, parts.next()?)));
    read().ok_or_else(|| Refusal::bad_request("continue key is not valid"))
}

fn watch_answer(
    state: &Arc<State>,
    call: &Call,
    target: &Target,
    name: Option<&str>,
) -> Result<Response<Body>, Failed> {
    let mut scope = scope(call, target)?;
    if let Some(name) = name {
        scope.fields = FieldSelector::parse(&format!("metadata.name={name}"))?;
    }
    let initial = call.get("sendInitialEvents").map(|_| call.is("sendInitialEvents"));
    let request = WatchRequest {
        resource: target.resource.clone(),
        scope,
        form: call.form,
        from: call.number("resourceVersion")?,
        bookmarks: call.is("allowWatchBookmarks"),
        initial,
        not_older_than: call.get("resourceVersionMatch") == Some("NotOlderThan"),
        timeout: Duration::from_secs(call.number("timeoutSeconds")?.filter(|s| *s > 0).unwrap_or(1800)),
    };
    let chunks = watch::start(state.clone(), request)?;
    let stream = futures::stream::unfold(chunks, |mut chunks| async move {
        chunks.recv().await.map(|chunk| (chunk.map(Frame::data), chunks))
    });
    let mut response = Response::new(StreamBody::new(stream.boxed()).boxed_unsync());
    let kind = hyper::header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(response)
}

fn answer(code: u16, value: &Value) -> Response<Body> {
    json_answer(code, value)
}

fn json_answer(code: u16, value: &Value) -> Response<Body> {
    respond(code, "application/json", Bytes::from(serde_json::to_vec(value).unwrap_or_default()))
}

fn respond(code: u16, content_type: &'static str, body: Bytes) -> Response<Body> {
    let body = Full::new(body).map_err(|never: Infallible| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = hyper::StatusCode::from_u16(code).unwrap_or_default();
    let kind = hyper::header::HeaderValue::from_static(content_type);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn query(text: &str) -> HashMap<String, String> {
    let pairs = text.split('&').filter(|p| !p.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(&name.replace('+', " ")), decode(&value.replace('+', " ")))
        })
        .collect()
}

/// Undoes percent-encoding; malformed sequences stay as they are.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).and_then(|h| u8::from_str_radix(h, 16).ok());
        match (bytes[at], hex) {
            (b'%', Some(byte)) => {
                decoded.push(byte);
                at += 3;
            }
            (byte, _) => {
                decoded.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}
