use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::Value;

use super::*;

fn environment(command: &str) -> Environment {
    Environment {
        command: Some(command.to_owned()),
        container: Some("0a1b2c".to_owned()),
        netns: Some("/var/run/netns/cni-1".to_owned()),
        interface: Some("eth0".to_owned()),
        args: Some(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_INFRA_CONTAINER_ID=0a1b2c;K8S_POD_UID=u-1"
                .to_owned(),
        ),
    }
}

fn error(outcome: &Outcome) -> (u64, String) {
    assert!(outcome.failed, "{outcome:?}");
    let value: Value = serde_json::from_str(&outcome.output).unwrap();
    assert!(VERSIONS.contains(&value["cniVersion"].as_str().unwrap()), "{value}");
    (value["code"].as_u64().unwrap(), value["msg"].as_str().unwrap().to_owned())
}

/// A folder for a socket, gone when dropped.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ferroute-plugin-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("cni.sock")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const RESULT: &str = r#"{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"/var/run/netns/cni-1"}],"ips":[{"address":"10.244.1.2/24","interface":0},{"address":"fd00::2/64"}],"dns":{}}"#;

fn input(socket: &Path, extra: &str) -> String {
    format!(
        r#"{{"cniVersion":"1.1.0","name":"mynet","type":"ferroute-cni","socket":"{}","prevResult":{RESULT}{extra}}}"#,
        socket.display()
    )
}

fn call(command: &str, input: &str) -> Outcome {
    run(&environment(command), input.as_bytes())
}

/// What a fake daemon does with a connection once it has the question.
type Reply = Box<dyn FnOnce(&mut UnixStream) + Send>;

/// A daemon that gives these answers, one per connection, and returns the questions.
fn daemon(socket: &Path, answers: Vec<Reply>) -> std::thread::JoinHandle<Vec<Value>> {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        answers
            .into_iter()
            .map(|answer| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
                answer(&mut stream);
                serde_json::from_str(&line).unwrap_or(Value::Null)
            })
            .collect()
    })
}

fn says(text: &'static str) -> Reply {
    Box::new(move |stream| stream.write_all(text.as_bytes()).unwrap())
}

#[test]
fn versions_are_listed_without_a_configuration() {
    for text in ["", "{\"cniVersion\":\"1.0.0\"}", "nonsense"] {
        let outcome = call("VERSION", text);
        assert!(!outcome.failed);
        let value: Value = serde_json::from_str(&outcome.output).unwrap();
        assert_eq!(value["cniVersion"], "1.1.0");
        assert_eq!(
            value["supportedVersions"],
            serde_json::json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
        );
    }
}

#[test]
fn add_tells_the_daemon_and_passes_the_result_on() {
    let place = Place::new("add");
    let daemon = daemon(&place.socket(), vec![says("{\"answer\":\"done\"}\n")]);
    let outcome = call("ADD", &input(&place.socket(), ""));
    assert_eq!(outcome, Outcome { output: format!("{RESULT}\n"), failed: false });
    let asked = daemon.join().unwrap().remove(0);
    assert!((4000..=5000).contains(&asked["timeoutMs"].as_u64().unwrap()), "{asked}");
    assert_eq!((&asked["verb"], &asked["network"]), (&"add".into(), &"mynet".into()));
    assert_eq!((&asked["container"], &asked["netns"]), (&"0a1b2c".into(), &"/var/run/netns/cni-1".into()));
    assert_eq!(asked["pod"], serde_json::json!({"namespace": "shop", "name": "cart-0", "uid": "u-1"}));
    assert_eq!(asked["addresses"], serde_json::json!(["10.244.1.2", "fd00::2"]));
}

#[test]
fn the_daemons_reason_reaches_the_kubelet() {
    let place = Place::new("reason");
    let no = |reason| {
        let text = format!("{{\"answer\":\"failed\",\"reason\":\"{reason}\",\"message\":\"because\"}}\n");
        says(Box::leak(text.into_boxed_str()))
    };
    let answers = vec![
        no("podUnknown"),
        no("notProgrammed"),
        no("starting"),
        no("failing"),
        no("somethingNew"),
        no("notProgrammed"),
    ];
    let daemon = daemon(&place.socket(), answers);
    let input = |extra| input(&place.socket(), extra);
    let (code, text) = error(&call("ADD", &input("")));
    assert_eq!(code, 11);
    assert_eq!(
        text,
        "pod shop/cart-0 was not started because its network policy cannot be confirmed: because"
    );
    assert_eq!(error(&call("CHECK", &input(""))).0, 100);
    let (code, text) = error(&call("STATUS", &input("")));
    assert!(code == 50 && text.starts_with("because;"), "{code} {text}");
    assert_eq!(error(&call("STATUS", &input(""))), (51, "because".to_owned()));
    assert_eq!(error(&call("ADD", &input(""))).0, 11);
    let open = call("ADD", &input(",\"whenUnavailable\":\"allow\""));
    assert_eq!(open, Outcome { output: format!("{RESULT}\n"), failed: false });
    assert_eq!(daemon.join().unwrap().len(), 6);
}

#[test]
fn without_a_daemon_the_configuration_decides() {
    let place = Place::new("away");
    let input = |extra| input(&place.socket(), extra);
    let started = Instant::now();
    let (code, text) = error(&call("ADD", &input(",\"timeout\":\"300ms\"")));
    let waited = started.elapsed();
    assert_eq!(code, 11);
    for part in
        ["pod shop/cart-0 was not started", "no ferroute daemon answers on", "see that the ferroute pod"]
    {
        assert!(text.contains(part), "{text}");
    }
    assert!((Duration::from_millis(300)..Duration::from_millis(1500)).contains(&waited), "{waited:?}");
    let outcome = call("ADD", &input(",\"timeout\":\"100ms\",\"whenUnavailable\":\"allow\""));
    assert_eq!(outcome, Outcome { output: format!("{RESULT}\n"), failed: false });
    assert_eq!(error(&call("CHECK", &input(",\"timeout\":\"100ms\""))).0, 11);
    assert_eq!(error(&call("STATUS", &input(",\"timeout\":\"100ms\""))).0, 50);
    assert!(!call("STATUS", &input(",\"timeout\":\"100ms\",\"whenUnavailable\":\"allow\"")).failed);
    // DEL and GC end at once and well.
    let started = Instant::now();
    for command in ["DEL", "GC"] {
        assert_eq!(call(command, &input("")), Outcome { output: String::new(), failed: false });
    }
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_daemon_that_comes_back_in_time_is_asked() {
    let place = Place::new("restart");
    let (socket, text) = (place.socket(), input(&place.socket(), ""));
    let adding = std::thread::spawn(move || call("ADD", &text));
    std::thread::sleep(Duration::from_millis(300));
    // It dies once with the question in hand.
    let daemon = daemon(&socket, vec![Box::new(|_| {}), says("{\"answer\":\"done\"}\n")]);
    assert!(!adding.join().unwrap().failed);
    assert_eq!(daemon.join().unwrap().len(), 2);
}

#[test]
fn a_silent_or_raving_daemon_is_bounded() {
    let place = Place::new("raving");
    let silent: Reply = Box::new(|_| std::thread::sleep(Duration::from_millis(700)));
    let trickle: Reply = Box::new(|stream| {
        for _ in 0..20 {
            let _ = stream.write_all(b" ");
            std::thread::sleep(Duration::from_millis(35));
        }
    });
    let flood: Reply = Box::new(|stream| {
        let _ = stream.write_all(&vec![b'x'; 1 << 20]);
    });
    let answers =
        vec![silent, trickle, flood, says("HTTP/1.0 400 Bad Request\r\n"), says("{}\n"), says("\n")];
    let daemon = daemon(&place.socket(), answers);
    let input = input(&place.socket(), ",\"timeout\":\"300ms\"");
    for part in [
        "did not answer within 300ms",
        "did not answer within 300ms",
        "longer than",
        "no valid",
        "no valid",
        "no valid",
    ] {
        let started = Instant::now();
        let (code, text) = error(&call("ADD", &input));
        assert_eq!(code, 11);
        assert!(text.contains(part), "{part}: {text}");
        // The next connection is taken only when this one is done with.
        assert!(started.elapsed() < Duration::from_millis(1500));
        std::thread::sleep(Duration::from_millis(700));
    }
    daemon.join().unwrap();
}

#[test]
fn a_full_queue_of_connections_does_not_hang_the_plugin() {
    let place = Place::new("queue");
    // Nobody accepts; each attempt leaves one connection in the queue until it is full.
    let listener = UnixListener::bind(place.socket()).unwrap();
    let filled: Vec<_> = (0..5000)
        .map_while(|_| {
            let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket.connect(&socket2::SockAddr::unix(place.socket()).unwrap()).ok().map(|()| socket)
        })
        .collect();
    assert!(filled.len() < 5000, "the queue has a bound");
    let started = Instant::now();
    let (code, text) = error(&call("ADD", &input(&place.socket(), ",\"timeout\":\"200ms\"")));
    assert!(code == 11 && text.contains("did not answer within 200ms"), "{text}");
    assert!(started.elapsed() < Duration::from_millis(1500));
    drop(listener);
}

#[test]
fn del_and_gc_say_what_is_free() {
    let place = Place::new("del");
    let done = || says("{\"answer\":\"done\"}\n");
    let daemon = daemon(&place.socket(), vec![done(), done(), says("nonsense\n")]);
    let minimal = Environment { netns: None, args: None, ..environment("DEL") };
    let text = format!(r#"{{"cniVersion":"0.4.0","name":"mynet","socket":"{}"}}"#, place.socket().display());
    assert_eq!(run(&minimal, text.as_bytes()), Outcome { output: String::new(), failed: false });
    let gc = input(&place.socket(), r#","cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}]"#);
    assert!(
        !run(&Environment { command: Some("GC".to_owned()), ..Environment::default() }, gc.as_bytes()).failed
    );
    assert!(!call("DEL", &input(&place.socket(), "")).failed);
    let asked = daemon.join().unwrap();
    assert_eq!(
        (&asked[0]["verb"], &asked[0]["pod"], &asked[0]["addresses"]),
        (&"del".into(), &Value::Null, &serde_json::json!([]))
    );
    assert_eq!(asked[1]["valid"], serde_json::json!([{"container": "c1", "interface": "eth0"}]));
    assert_eq!(asked[2]["addresses"], serde_json::json!(["10.244.1.2", "fd00::2"]));
}

#[test]
fn every_wrong_environment_is_named() {
    let text = input(Path::new("/nonexistent/cni.sock"), "");
    let mistakes: [(Environment, &str); 12] = [
        (Environment::default(), "CNI_COMMAND is not set"),
        (environment("add"), "CNI_COMMAND=add"),
        (Environment { container: None, ..environment("ADD") }, "CNI_CONTAINERID is not set"),
        (Environment { container: Some("-x".to_owned()), ..environment("ADD") }, "CNI_CONTAINERID="),
        (Environment { container: Some("../x".to_owned()), ..environment("DEL") }, "CNI_CONTAINERID="),
        (Environment { interface: None, ..environment("CHECK") }, "CNI_IFNAME is not set"),
        (Environment { interface: Some("a/b".to_owned()), ..environment("ADD") }, "CNI_IFNAME="),
        (Environment { interface: Some("sixteen-letters-".to_owned()), ..environment("ADD") }, "CNI_IFNAME="),
        (Environment { netns: None, ..environment("ADD") }, "CNI_NETNS is not set"),
        (Environment { args: None, ..environment("ADD") }, "K8S_POD_NAMESPACE"),
        (
            Environment { args: Some("K8S_POD_NAME=a;;=;x".to_owned()), ..environment("ADD") },
            "K8S_POD_NAMESPACE",
        ),
        (
            Environment {
                args: Some("K8S_POD_NAME=a;K8S_POD_NAMESPACE=".to_owned()),
                ..environment("CHECK")
            },
            "CNI_ARGS",
        ),
    ];
    for (environment, part) in mistakes {
        let (code, message) = error(&run(&environment, text.as_bytes()));
        assert_eq!(code, 4, "{message}");
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn every_wrong_configuration_is_named() {
    for (command, text, code, part) in [
        ("ADD", "", 6, "no JSON object"),
        ("DEL", "garbage", 6, "no JSON object"),
        ("ADD", "{}", 1, "0.1.0"),
        ("ADD", r#"{"cniVersion":"3.0.0"}"#, 1, "3.0.0"),
        ("GC", r#"{"cniVersion":"1.0.0"}"#, 1, "GC needs cniVersion 1.1.0"),
        ("STATUS", r#"{"cniVersion":"1.0.0"}"#, 1, "STATUS needs cniVersion 1.1.0"),
        ("CHECK", r#"{"cniVersion":"0.3.1"}"#, 1, "CHECK needs cniVersion 0.4.0"),
        ("ADD", r#"{"cniVersion":"1.0.0","name":"n"}"#, 7, "prevResult is missing"),
        ("CHECK", r#"{"cniVersion":"1.0.0","prevResult":null}"#, 7, "prevResult is missing"),
        ("ADD", r#"{"cniVersion":"1.0.0","timeout":"1y"}"#, 7, "timeout=\"1y\""),
    ] {
        let (found, message) = error(&call(command, text));
        assert_eq!(found, code, "{command} {text}: {message}");
        assert!(message.contains(part), "{message}");
    }
    // Ten megabytes: refused after the first.
    let big = format!("{{\"cniVersion\":\"1.0.0\",\"x\":\"{}\"}}", "x".repeat(10 << 20));
    let (code, message) = error(&call("ADD", &big));
    assert!(code == 6 && message.contains("longer than"), "{message}");
}

#[test]
fn a_result_without_addresses_needs_no_daemon() {
    let text = r#"{"cniVersion":"0.4.0","socket":"/nonexistent/cni.sock","prevResult":{"cniVersion":"0.4.0","interfaces":[]}}"#;
    let outcome = call("ADD", text);
    assert_eq!(
        outcome,
        Outcome { output: "{\"cniVersion\":\"0.4.0\",\"interfaces\":[]}\n".to_owned(), failed: false }
    );
}
