use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};

use super::super::client::{self, Patience};
use super::super::protocol::{Identity, Pod};
use super::*;

#[derive(Debug, PartialEq)]
enum Told {
    Starting(String, Vec<IpAddr>),
    Gone(String, Vec<IpAddr>),
}

/// Notes what it is told; the namespace of a pod says how it answers.
struct Fake(Mutex<Sender<Told>>);

fn not_programmed() -> NotEnforced {
    NotEnforced { reason: Reason::NotProgrammed, message: "xtables is locked".to_owned() }
}

impl Enforcement for Fake {
    fn pod_starting(
        &self,
        pod: &ObjectKey,
        _: Option<&str>,
        addresses: &[IpAddr],
        timeout: Duration,
    ) -> Result<(), NotEnforced> {
        self.0.lock().unwrap().send(Told::Starting(pod.to_string(), addresses.to_vec())).unwrap();
        match &*pod.namespace {
            "slow" => {
                std::thread::sleep(timeout);
                Err(not_programmed())
            }
            "panic" => panic!("as the test wants"),
            _ => Ok(()),
        }
    }

    fn pod_gone(&self, pod: &ObjectKey, _: Option<&str>, addresses: &[IpAddr]) {
        self.0.lock().unwrap().send(Told::Gone(pod.to_string(), addresses.to_vec())).unwrap();
    }

    fn is_enforced(&self, pod: &ObjectKey, _: &[IpAddr], _: Duration) -> Result<(), NotEnforced> {
        if &*pod.namespace == "shop" { Ok(()) } else { Err(not_programmed()) }
    }

    fn readiness(&self) -> Result<(), NotEnforced> {
        Err(NotEnforced { reason: Reason::Starting, message: "no list yet".to_owned() })
    }
}

/// A server in a runtime of its own; gone when dropped.
struct Running {
    _runtime: tokio::runtime::Runtime,
    socket: PathBuf,
    told: std::sync::mpsc::Receiver<Told>,
}

impl Running {
    fn start(name: &str) -> Self {
        let socket = std::env::temp_dir().join(format!("ferroute-cnid-{name}-{}.sock", std::process::id()));
        let _ = std::fs::remove_file(&socket);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (sender, told) = channel();
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(&socket).unwrap()
        };
        runtime.spawn(serve(listener, Arc::new(Fake(Mutex::new(sender)))));
        Self { _runtime: runtime, socket, told }
    }

    fn ask(&self, verb: Verb, limit: Duration) -> Answer {
        ask(&self.socket, verb, limit)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

const SECOND: Duration = Duration::from_secs(1);

fn ask(socket: &Path, verb: Verb, limit: Duration) -> Answer {
    let request = Request { version: VERSION, timeout_ms: 0, network: "mynet".to_owned(), verb };
    client::ask(socket, &request, limit, Patience::Once).unwrap()
}

fn attachment(namespace: &str, container: &str, address: &str) -> Attachment {
    Attachment {
        identity: Identity { container: container.to_owned(), interface: "eth0".to_owned() },
        netns: String::new(),
        pod: Some(Pod { namespace: namespace.to_owned(), name: "p".to_owned(), uid: None }),
        addresses: vec![address.parse().unwrap()],
    }
}

fn reason(answer: Answer) -> (Reason, String) {
    match answer {
        Answer::Failed { reason, message } => (reason, message),
        Answer::Done => panic!("done"),
    }
}

fn ip(text: &str) -> Vec<IpAddr> {
    vec![text.parse().unwrap()]
}

#[test]
fn a_pod_from_its_start_to_its_end() {
    let server = Running::start("life");
    let pod = attachment("shop", "c1", "10.0.0.1");
    assert_eq!(server.ask(Verb::Add(pod.clone()), SECOND), Answer::Done);
    assert_eq!(server.told.recv().unwrap(), Told::Starting("shop/p".to_owned(), ip("10.0.0.1")));
    assert_eq!(server.ask(Verb::Check(pod.clone()), SECOND), Answer::Done);
    // A DEL without pod and addresses: the daemon remembers both.
    let bare = Attachment { pod: None, addresses: vec![], ..pod.clone() };
    assert_eq!(server.ask(Verb::Del(bare.clone()), SECOND), Answer::Done);
    assert_eq!(server.told.recv().unwrap(), Told::Gone("shop/p".to_owned(), ip("10.0.0.1")));
    assert_eq!(server.ask(Verb::Del(bare.clone()), SECOND), Answer::Done);
    server.ask(Verb::Add(pod), SECOND);
    server.ask(Verb::Gc { valid: vec![bare.identity] }, SECOND);
    server.ask(Verb::Gc { valid: vec![] }, SECOND);
    let told: Vec<Told> = server.told.try_iter().collect();
    assert_eq!(
        told,
        [
            Told::Starting("shop/p".to_owned(), ip("10.0.0.1")),
            Told::Gone("shop/p".to_owned(), ip("10.0.0.1"))
        ]
    );
    assert_eq!(reason(server.ask(Verb::Status, SECOND)), (Reason::Starting, "no list yet".to_owned()));
    assert_eq!(
        reason(server.ask(Verb::Check(attachment("x", "c", "10.0.0.9")), SECOND)).0,
        Reason::NotProgrammed
    );
    let nobody = Attachment { pod: None, ..attachment("x", "c", "10.0.0.9") };
    assert_eq!(reason(server.ask(Verb::Add(nobody), SECOND)).0, Reason::Malformed);
}

#[test]
fn slow_answers_do_not_hold_up_others_and_come_before_the_plugin_gives_up() {
    let server = Running::start("slow");
    let slow: Vec<_> = (0..40)
        .map(|number| {
            let socket = server.socket.clone();
            std::thread::spawn(move || {
                let pod = attachment("slow", &number.to_string(), "10.0.0.1");
                reason(ask(&socket, Verb::Add(pod), 4 * SECOND))
            })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(server.ask(Verb::Add(attachment("shop", "c", "10.0.0.2")), 2 * SECOND), Answer::Done);
    assert!(!slow.iter().any(std::thread::JoinHandle::is_finished), "it waited for another");
    // A plugin that had given up would say so itself.
    for thread in slow {
        assert_eq!(thread.join().unwrap(), (Reason::NotProgrammed, "xtables is locked".to_owned()));
    }
}

#[test]
fn a_panic_inside_is_that_answers_failure() {
    let server = Running::start("panic");
    let answer = server.ask(Verb::Add(attachment("panic", "c", "10.0.0.1")), SECOND);
    assert!(reason(answer).1.contains("see its log"));
    assert_eq!(server.ask(Verb::Add(attachment("shop", "c", "10.0.0.1")), SECOND), Answer::Done);
}

fn raw(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    let _ = stream.write_all(bytes);
    let mut line = String::new();
    let _ = BufReader::new(stream).read_line(&mut line);
    line
}

#[test]
fn nonsense_is_answered_or_hung_up_on() {
    let server = Running::start("nonsense");
    for question in
        ["\n", "GET / HTTP/1.0\r\n", "{\"version\":1}\n", "[]\n", "{\"version\":1,\"verb\":\"dance\"}\n"]
    {
        let answer = raw(&server.socket, question.as_bytes());
        assert!(answer.contains("\"malformed\""), "{question}: {answer}");
    }
    assert!(raw(&server.socket, b"{\"version\":2,\"verb\":\"new\"}\n").contains("install the plugin"));
    assert!(raw(&server.socket, b"\xff\n").contains("\"malformed\""));
    assert_eq!(raw(&server.socket, &vec![b'x'; REQUEST_LIMIT + 5000]), "", "too long");
    assert_eq!(server.ask(Verb::Del(attachment("shop", "c", "10.0.0.1")), SECOND), Answer::Done);
}

#[test]
fn silent_clients_are_hung_up_on_and_shut_nobody_out() {
    let server = Running::start("silent");
    let mut silent: Vec<_> = (0..CONNECTIONS - 1)
        .map(|_| std::os::unix::net::UnixStream::connect(&server.socket).unwrap())
        .collect();
    assert_eq!(server.ask(Verb::Add(attachment("shop", "c", "10.0.0.1")), 5 * SECOND), Answer::Done);
    let mut rest = Vec::new();
    // No answer, but an end.
    silent[0].read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
}
