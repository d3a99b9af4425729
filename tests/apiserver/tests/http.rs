//! The protocol, as raw HTTP.

// A test fails by panicking, in helpers too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::{Duration, Instant};

use ferroute_apiserver::{ApiServer, Failure, Fault, StreamingLists};
use serde_json::{Value, json};
use support::{SOON, Watch, get, patch, post, request};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

fn map(name: &str) -> Value {
    json!({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": name, "labels": {"n": name}}})
}

fn server_with_maps(count: usize) -> ApiServer {
    let server = ApiServer::builder().start().unwrap();
    for n in 0..count {
        assert_eq!(post(&server, MAPS, &map(&format!("m{n}"))).code, 201);
    }
    server
}

fn names(list: &Value) -> Vec<&str> {
    list["items"].as_array().unwrap().iter().map(|i| i["metadata"]["name"].as_str().unwrap()).collect()
}

#[test]
fn pages_are_one_snapshot() {
    let server = server_with_maps(5);
    let first = get(&server, &format!("{MAPS}?limit=2")).body;
    assert_eq!(names(&first), ["m0", "m1"]);
    assert_eq!(first["metadata"]["remainingItemCount"], 3);
    let token = first["metadata"]["continue"].as_str().unwrap();
    // What happens between the pages does not show in them.
    server.delete("configmaps", "default", "m3").unwrap();
    server.create("configmaps", "default", map("m2a")).unwrap();
    server.patch("configmaps", "default", "m4", json!({"data": {"late": "yes"}})).unwrap();
    let second = get(&server, &format!("{MAPS}?limit=9&continue={token}")).body;
    assert_eq!(names(&second), ["m2", "m3", "m4"]);
    assert!(second["items"][2]["data"].is_null());
    assert_eq!(first["metadata"]["resourceVersion"], second["metadata"]["resourceVersion"]);
    assert!(second["metadata"]["continue"].is_null());
    server.inflict(Fault::Compact { resource: None }).unwrap();
    let gone = get(&server, &format!("{MAPS}?limit=2&continue={token}"));
    assert_eq!((gone.code, &gone.body["reason"]), (410, &json!("Expired")));
    assert_eq!(get(&server, &format!("{MAPS}?continue=nonsense")).code, 400);
}

#[test]
fn lists_know_revisions_and_selectors() {
    let server = server_with_maps(3);
    let old = get(&server, MAPS).body["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    server.delete("configmaps", "default", "m0").unwrap();
    let exact = get(&server, &format!("{MAPS}?resourceVersion={old}&resourceVersionMatch=Exact")).body;
    assert_eq!(names(&exact), ["m0", "m1", "m2"]);
    assert_eq!(names(&get(&server, &format!("{MAPS}?resourceVersion=0")).body), ["m1", "m2"]);
    let future = get(&server, &format!("{MAPS}?resourceVersion=99999"));
    assert_eq!(future.code, 504);
    assert_eq!(future.body["details"]["causes"][0]["reason"], "ResourceVersionTooLarge");
    assert_eq!(names(&get(&server, &format!("{MAPS}?labelSelector=n%20in%20(m1,m9)")).body), ["m1"]);
    assert_eq!(names(&get(&server, &format!("{MAPS}?fieldSelector=metadata.name!%3Dm1")).body), ["m2"]);
    assert_eq!(get(&server, "/api/v1/nonsense").code, 404);
    assert_eq!(get(&server, &format!("{MAPS}/none")).body["reason"], "NotFound");
    server.faults().page_limit(1);
    assert_eq!(names(&get(&server, MAPS).body), ["m1"]);
}

#[test]
fn a_watch_resumes_from_a_revision() {
    let server = server_with_maps(1);
    let revision = server.revision();
    server.patch("configmaps", "default", "m0", json!({"data": {"a": "1"}})).unwrap();
    server.create("configmaps", "default", map("m1")).unwrap();
    server.delete("configmaps", "default", "m0").unwrap();
    let mut watch = Watch::open(&server, &format!("{MAPS}?watch=true&resourceVersion={revision}"));
    assert_eq!([watch.next(), watch.next(), watch.next()], ["MODIFIED m0", "ADDED m1", "DELETED m0"]);
    server.create("configmaps", "default", map("m2")).unwrap();
    let (kind, object) = watch.event().unwrap();
    assert_eq!((kind.as_str(), &object["metadata"]["name"]), ("ADDED", &json!("m2")));
    assert_eq!(object["metadata"]["resourceVersion"], server.revision().to_string());
    assert_eq!(object["kind"], "ConfigMap");
    // Without a revision a watch begins with what is there.
    let mut fresh = Watch::open(&server, &format!("{MAPS}?watch=1"));
    assert_eq!([fresh.next(), fresh.next()], ["ADDED m1", "ADDED m2"]);
}

#[test]
fn selectors_turn_changes_into_arrivals_and_departures() {
    let server = server_with_maps(1);
    let path = format!("{MAPS}?watch=true&labelSelector=in%3Dyes&resourceVersion={}", server.revision());
    let mut watch = Watch::open(&server, &path);
    let label = |value: &str| {
        server.patch("configmaps", "default", "m0", json!({"metadata": {"labels": {"in": value}}})).unwrap();
    };
    label("yes");
    label("no");
    assert_eq!([watch.next(), watch.next()], ["ADDED m0", "DELETED m0"]);
}

#[test]
fn streaming_lists_end_with_a_bookmark() {
    let server = server_with_maps(2);
    let query =
        "watch=true&sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan";
    let mut watch = Watch::open(&server, &format!("{MAPS}?{query}"));
    assert_eq!([watch.next(), watch.next()], ["ADDED m0", "ADDED m1"]);
    let (kind, bookmark) = watch.event().unwrap();
    assert_eq!(kind, "BOOKMARK");
    assert_eq!(bookmark["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    assert_eq!(bookmark["metadata"]["resourceVersion"], server.revision().to_string());
    server.create("configmaps", "default", map("m2")).unwrap();
    assert_eq!(watch.next(), "ADDED m2");
    let wrong = get(&server, &format!("{MAPS}?watch=true&sendInitialEvents=true"));
    assert_eq!((wrong.code, &wrong.body["reason"]), (422, &json!("Invalid")));
    server.faults().streaming_lists(StreamingLists::Refused);
    assert_eq!(get(&server, &format!("{MAPS}?{query}")).code, 422);
    server.faults().streaming_lists(StreamingLists::Ignored);
    let mut old = Watch::open(&server, &format!("{MAPS}?{query}&timeoutSeconds=1"));
    let events: Vec<String> = std::iter::repeat_with(|| old.next()).take(5).collect();
    assert_eq!(events, ["ADDED m0", "ADDED m1", "ADDED m2", "BOOKMARK", "END"]);
}

#[test]
fn bookmarks_come_by_the_clock_and_the_timeout_ends_the_watch() {
    let server = ApiServer::builder().bookmark_interval(Duration::from_millis(50)).start().unwrap();
    let path = format!(
        "{MAPS}?watch=true&allowWatchBookmarks=true&timeoutSeconds=1&resourceVersion={}",
        server.revision()
    );
    let began = Instant::now();
    let mut watch = Watch::open(&server, &path);
    // A change elsewhere moves the bookmark on.
    server.create("secrets", "default", json!({"metadata": {"name": "s"}})).unwrap();
    let mut last = Value::Null;
    while let Some((kind, object)) = watch.event() {
        assert_eq!(kind, "BOOKMARK");
        last = object["metadata"]["resourceVersion"].clone();
    }
    assert_eq!(last, server.revision().to_string());
    assert!(began.elapsed() >= Duration::from_millis(900));
    let mut silent = Watch::open(&server, &format!("{MAPS}?watch=true&timeoutSeconds=1"));
    assert!(silent.event().is_none());
}

#[test]
fn a_forgotten_revision_is_gone() {
    let server = server_with_maps(1);
    let revision = server.revision();
    server.patch("configmaps", "default", "m0", json!({"data": {"a": "1"}})).unwrap();
    server.inflict(Fault::Compact { resource: Some("configmaps".into()) }).unwrap();
    let mut watch = Watch::open(&server, &format!("{MAPS}?watch=true&resourceVersion={revision}"));
    assert_eq!(watch.code, 200);
    let (kind, status) = watch.event().unwrap();
    assert_eq!(
        (kind.as_str(), &status["code"], &status["reason"]),
        ("ERROR", &json!(410), &json!("Expired"))
    );
    assert_eq!(status["kind"], "Status");
    assert!(watch.event().is_none());
    let small = ApiServer::builder().history_limit(2).start().unwrap();
    let old = small.revision();
    (0..3).for_each(|n| drop(small.create("configmaps", "default", map(&format!("m{n}"))).unwrap()));
    assert_eq!(Watch::open(&small, &format!("{MAPS}?watch=true&resourceVersion={old}")).next(), "ERROR");
}

#[test]
fn writes_conflict_count_generations_and_keep_status_apart() {
    let server = ApiServer::builder().controllers(false).start().unwrap();
    let path = "/apis/apps/v1/namespaces/default/deployments";
    let deployment = json!({"kind": "Deployment", "apiVersion": "apps/v1", "metadata": {"name": "d"},
        "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "c", "image": "i"}]}}}, "status": {"replicas": 9}});
    let made = post(&server, path, &deployment);
    assert_eq!(made.code, 201);
    assert_eq!(
        (&made.body["spec"]["replicas"], &made.body["metadata"]["generation"]),
        (&json!(1), &json!(1))
    );
    assert!(made.body["status"].is_null());
    assert_eq!(post(&server, path, &deployment).body["reason"], "AlreadyExists");
    let one = format!("{path}/d");
    let scaled = patch(
        &server,
        &one,
        "merge-patch+json",
        &json!({"spec": {"replicas": 3}, "status": {"replicas": 7}}),
    );
    assert_eq!(scaled.body["metadata"]["generation"], 2);
    assert!(scaled.body["status"].is_null());
    let status = patch(
        &server,
        &format!("{one}/status"),
        "merge-patch+json",
        &json!({"spec": {"replicas": 8}, "status": {"replicas": 3}}),
    );
    assert_eq!(
        (&status.body["spec"]["replicas"], &status.body["status"]["replicas"]),
        (&json!(3), &json!(3))
    );
    assert_eq!(status.body["metadata"]["generation"], 2);
    let put = request(&server, "PUT", &one, "Content-Type: application/json\r\n", &made.body.to_string());
    assert_eq!((put.code, &put.body["reason"]), (409, &json!("Conflict")));
    let scale = get(&server, &format!("{one}/scale")).body;
    assert_eq!(
        (&scale["kind"], &scale["spec"]["replicas"], &scale["status"]["selector"]),
        (&json!("Scale"), &json!(3), &json!("a=b"))
    );
    patch(&server, &format!("{one}/scale"), "merge-patch+json", &json!({"spec": {"replicas": 5}}));
    let revision = server.revision();
    // Writing the same again changes nothing.
    let same = patch(&server, &one, "merge-patch+json", &json!({"spec": {"replicas": 5}}));
    assert_eq!((&same.body["spec"]["replicas"], server.revision()), (&json!(5), revision));
    let dry = patch(
        &server,
        &format!("{one}?dryRun=All"),
        "json-patch+json",
        &json!([{"op": "replace", "path": "/spec/replicas", "value": 6}]),
    );
    assert_eq!((&dry.body["spec"]["replicas"], server.revision()), (&json!(6), revision));
    assert_eq!(
        patch(
            &server,
            &one,
            "json-patch+json",
            &json!([{"op": "test", "path": "/spec/replicas", "value": 1}])
        )
        .code,
        422
    );
    assert_eq!(patch(&server, &one, "nonsense", &json!({})).code, 415);
    let immutable =
        patch(&server, &one, "merge-patch+json", &json!({"spec": {"selector": {"matchLabels": {"a": "c"}}}}));
    assert_eq!(immutable.code, 422);
}

#[test]
fn finalizers_hold_an_object() {
    let server = ApiServer::builder().start().unwrap();
    let mut object = map("held");
    object["metadata"]["finalizers"] = json!(["example.com/hold"]);
    server.create("configmaps", "default", object).unwrap();
    server.delete("configmaps", "default", "held").unwrap();
    let held = server.get("configmaps", "default", "held").unwrap();
    assert!(held["metadata"]["deletionTimestamp"].is_string());
    let merge = json!({"metadata": {"finalizers": null}});
    server.patch("configmaps", "default", "held", merge).unwrap();
    assert!(server.get("configmaps", "default", "held").is_none());
}

#[test]
fn server_side_apply_creates_merges_and_prunes() {
    let server = ApiServer::builder().start().unwrap();
    let path = "/api/v1/namespaces/default/services/s?fieldManager=me";
    let apply = |body: &Value| patch(&server, path, "apply-patch+yaml", body);
    let one = json!({"kind": "Service", "apiVersion": "v1", "metadata": {"name": "s", "labels": {"a": "1", "b": "1"}},
        "spec": {"ports": [{"name": "x", "port": 80}, {"name": "y", "port": 81}]}});
    assert_eq!(apply(&one).code, 201);
    server.patch("services", "default", "s", json!({"metadata": {"labels": {"other": "1"}}})).unwrap();
    let two = json!({"kind": "Service", "apiVersion": "v1", "metadata": {"name": "s", "labels": {"a": "2"}},
        "spec": {"ports": [{"name": "y", "port": 81}]}});
    let answer = apply(&two);
    assert_eq!(answer.code, 200);
    assert_eq!(answer.body["metadata"]["labels"], json!({"a": "2", "other": "1"}));
    assert_eq!(answer.body["spec"]["ports"].as_array().unwrap().len(), 1);
}

#[test]
fn custom_resources_are_served_once_defined() {
    let server = ApiServer::builder().start().unwrap();
    let path = "/apis/example.com/v1/namespaces/default/things";
    assert_eq!(get(&server, path).code, 404);
    let definition = json!({"kind": "CustomResourceDefinition", "apiVersion": "apiextensions.k8s.io/v1",
        "metadata": {"name": "things.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": "things", "kind": "Thing"},
            "versions": [{"name": "v1", "served": true, "storage": true, "subresources": {"status": {}}},
                {"name": "v1beta1", "served": true, "storage": false}]}});
    let made = post(&server, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &definition);
    assert_eq!(made.body["status"]["conditions"][1]["type"], "Established");
    assert_eq!(post(&server, path, &json!({"metadata": {"name": "one"}, "spec": {"a": [1, 2]}})).code, 201);
    let old = get(&server, "/apis/example.com/v1beta1/things").body;
    assert_eq!(
        (&old["items"][0]["apiVersion"], &old["kind"]),
        (&json!("example.com/v1beta1"), &json!("ThingList"))
    );
    let groups = get(&server, "/apis").body.to_string();
    assert!(groups.contains("example.com/v1beta1"));
    assert!(get(&server, "/apis/example.com/v1").body.to_string().contains("things/status"));
    assert_eq!(patch(&server, &format!("{path}/one"), "strategic-merge-patch+json", &json!({})).code, 415);
    server.delete("customresourcedefinitions.apiextensions.k8s.io", "", "things.example.com").unwrap();
    assert_eq!(get(&server, path).code, 404);
}

#[test]
fn events_are_the_same_in_both_groups() {
    let server = ApiServer::builder().start().unwrap();
    let event = json!({"metadata": {"name": "e"}, "reason": "Test", "note": "text", "type": "Warning",
        "action": "x", "eventTime": "2025-01-01T00:00:00.000000Z", "reportingController": "ferroute",
        "reportingInstance": "node-1", "regarding": {"kind": "Service", "namespace": "default", "name": "s"}});
    let made = post(&server, "/apis/events.k8s.io/v1/namespaces/default/events", &event);
    assert_eq!((made.code, &made.body["note"]), (201, &json!("text")));
    let core = get(&server, "/api/v1/namespaces/default/events?fieldSelector=involvedObject.name%3Ds").body;
    assert_eq!(core["items"][0]["message"], "text");
    assert_eq!(core["items"][0]["apiVersion"], "v1");
    let path = "/apis/events.k8s.io/v1/namespaces/default/events/e";
    let counted = patch(&server, path, "merge-patch+json", &json!({"series": {"count": 2}}));
    assert_eq!((counted.code, &counted.body["regarding"]["name"]), (200, &json!("s")));
}

#[test]
fn a_wrong_token_is_unauthorized_and_rotation_is_followed() {
    let file = std::env::temp_dir().join(format!("ferroute-apiserver-token-{}", std::process::id()));
    std::fs::write(&file, "first\n").unwrap();
    let server = ApiServer::builder().token_file(&file).start().unwrap();
    let code =
        |token: &str| request(&server, "GET", MAPS, &format!("Authorization: Bearer {token}\r\n"), "").code;
    assert_eq!([get(&server, MAPS).code, code("first"), code("second")], [401, 200, 401]);
    std::fs::write(&file, "second").unwrap();
    assert_eq!([code("first"), code("second")], [401, 200]);
    std::fs::remove_file(&file).unwrap();
    assert_eq!(code(""), 401);
}

#[test]
fn faults_happen_on_demand() {
    let server = server_with_maps(1);
    let failure = |count, status, retry_after| Failure {
        resource: Some("configmaps".into()),
        verb: Some("list".into()),
        count,
        status,
        retry_after,
    };
    server.faults().fail(failure(1, 429, Some(3)));
    assert_eq!(get(&server, "/api/v1/services").code, 200);
    let busy = get(&server, MAPS);
    assert_eq!((busy.code, busy.head.contains("retry-after: 3")), (429, true));
    assert_eq!(get(&server, MAPS).code, 200);
    // The same by HTTP.
    let fault = json!({"fault": "fail", "count": 2, "status": 500});
    assert_eq!(post(&server, "/__faults", &fault).code, 200);
    assert_eq!(
        [get(&server, MAPS).code, get(&server, "/api/v1/pods").code, get(&server, MAPS).code],
        [500, 500, 200]
    );
    assert_eq!(post(&server, "/__faults", &json!({"fault": "nonsense"})).code, 400);
    // Stale lists.
    post(&server, "/__faults", &json!({"fault": "staleLists", "on": true}));
    server.create("configmaps", "default", map("m9")).unwrap();
    assert_eq!(names(&get(&server, MAPS).body), ["m0"]);
    server.faults().clear();
    assert_eq!(names(&get(&server, MAPS).body), ["m0", "m9"]);
    // Watches that end, are cut, or speak garbage.
    let open = || Watch::open(&server, &format!("{MAPS}?watch=true&resourceVersion={}", server.revision()));
    let (mut ends, mut cut) = (open(), None);
    server.faults().drop_watches(false);
    assert!(ends.line().unwrap().is_none());
    let mut breaks = cut.get_or_insert_with(open);
    server.faults().drop_watches(true);
    assert!(breaks.line().is_err());
    let mut garbage = open();
    server.faults().garbage_line(Some("configmaps"));
    let line = garbage.line().unwrap().unwrap();
    assert!(serde_json::from_str::<Value>(&line).is_err(), "{line}");
    // A muted watch stays open and says nothing until it speaks again.
    let mut muted = open();
    server.faults().mute_watches(true);
    server.create("configmaps", "default", map("m10")).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    server.create("configmaps", "default", map("m11")).unwrap();
    server.faults().mute_watches(false);
    assert_eq!([muted.next(), muted.next()], ["ADDED m10", "ADDED m11"]);
    breaks = &mut muted;
    // An outage refuses connections and cuts open ones.
    server.faults().outage(true);
    assert!(breaks.line().is_err());
    server
        .wait_for("refused connections", SOON, |s| std::net::TcpStream::connect(s.address()).is_err())
        .unwrap();
    server.faults().outage(false);
    server
        .wait_for("connections again", SOON, |s| std::net::TcpStream::connect(s.address()).is_ok())
        .unwrap();
    assert_eq!(get(&server, MAPS).code, 200);
}

#[test]
fn garbage_can_be_planted() {
    let server = ApiServer::builder().start().unwrap();
    let mut watch =
        Watch::open(&server, &format!("/api/v1/services?watch=true&resourceVersion={}", server.revision()));
    let garbage =
        json!({"kind": "Service", "metadata": {"name": "g", "namespace": "default"}, "spec": "no object"});
    server.insert_unchecked("services", garbage).unwrap();
    assert_eq!(watch.event().unwrap().1["spec"], "no object");
    server.plant("services", "default", "worse", b"{\"kind\": 7, ".to_vec()).unwrap();
    assert!(watch.line().unwrap().unwrap().contains("{\"kind\": 7, "));
    // Everything else goes on, and the garbage can be removed.
    assert_eq!(get(&server, "/healthz").code, 200);
    server.remove_unchecked("services", "default", "worse").unwrap();
    let table = request(
        &server,
        "GET",
        "/api/v1/services",
        "Accept: application/json;as=Table;v=v1;g=meta.k8s.io\r\n",
        "",
    );
    assert_eq!(table.body["kind"], "Table");
}

#[test]
fn ten_thousand_services_stream_fast() {
    let server = ApiServer::builder().controllers(false).history_limit(100_000).start().unwrap();
    let slices = (0..10_000).map(|n| {
        let endpoints: Vec<Value> = (0..10)
            .map(|e| json!({"addresses": [format!("10.{}.{}.{e}", n / 250, n % 250)], "nodeName": "node-1",
                "conditions": {"ready": true, "serving": true, "terminating": false}}))
            .collect();
        json!({"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
            "metadata": {"name": format!("s{n}-x"), "namespace": "default",
                "labels": {"kubernetes.io/service-name": format!("s{n}")}},
            "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "", "port": 80, "protocol": "TCP"}]})
    });
    server.load("endpointslices.discovery.k8s.io", slices).unwrap();
    let path = "/apis/discovery.k8s.io/v1/endpointslices";
    let began = Instant::now();
    let mut watch = Watch::open(
        &server,
        &format!(
            "{path}?watch=true&sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan"
        ),
    );
    let mut count = 0;
    while watch.line().unwrap().is_some_and(|line| !line.starts_with("{\"type\":\"BOOKMARK\"")) {
        count += 1;
    }
    println!("streamed {count} slices in {:?}", began.elapsed());
    assert_eq!(count, 10_001);
    let began = Instant::now();
    let (mut token, mut pages) = (String::new(), 0);
    loop {
        let page = get(&server, &format!("{path}?limit=500&continue={token}")).body;
        pages += 1;
        match page["metadata"]["continue"].as_str() {
            Some(next) => token = next.to_owned(),
            None => break,
        }
    }
    println!("listed {pages} pages in {:?}", began.elapsed());
    assert_eq!(pages, 21);
}
