//! A small HTTP client, so that the tests see the bytes a client sees.
// Each test file uses a part of this.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use ferroute_apiserver::{ApiServer, Kubelet, NodeSpec};
use serde_json::Value;

/// Longer than anything here takes on a busy machine.
pub const SOON: Duration = Duration::from_secs(20);

pub fn dual_stack() -> ferroute_apiserver::Builder {
    let node = |n: u8, zone: &str| {
        let v4 = format!("192.0.2.{n}").parse().unwrap();
        let v6 = format!("2001:db8::{n}").parse().unwrap();
        NodeSpec::new(&format!("node-{n}"), [v4, v6]).zone(zone)
    };
    ApiServer::builder()
        .service_cidrs(["10.96.0.0/16".parse().unwrap(), "fd00:96::/112".parse().unwrap()])
        .pod_cidrs(["10.244.0.0/16".parse().unwrap(), "fd00:244::/56".parse().unwrap()])
        .nodes([node(1, "east"), node(2, "east"), node(3, "west")])
        .kubelet(Kubelet::Simulated {
            ready_after: Duration::from_millis(20),
            gone_after: Duration::from_millis(100),
        })
}

pub struct Answer {
    pub code: u16,
    pub head: String,
    pub body: Value,
}

fn send(server: &ApiServer, method: &str, path: &str, headers: &str, body: &str) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    BufReader::new(stream)
}

fn read_head(reader: &mut impl BufRead) -> (u16, String) {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(reader.read_line(&mut head).unwrap(), 0, "the answer ends in its head: {head:?}");
    }
    let code = head.split(' ').nth(1).and_then(|c| c.parse().ok()).expect("a status line");
    (code, head.to_lowercase())
}

pub fn request(server: &ApiServer, method: &str, path: &str, headers: &str, body: &str) -> Answer {
    let mut reader = send(server, method, path, headers, body);
    let (code, head) = read_head(&mut reader);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    Answer { code, head, body: serde_json::from_str(&text).unwrap_or(Value::String(text)) }
}

pub fn get(server: &ApiServer, path: &str) -> Answer {
    request(server, "GET", path, "", "")
}

pub fn post(server: &ApiServer, path: &str, body: &Value) -> Answer {
    request(server, "POST", path, "Content-Type: application/json\r\n", &body.to_string())
}

pub fn patch(server: &ApiServer, path: &str, kind: &str, body: &Value) -> Answer {
    request(server, "PATCH", path, &format!("Content-Type: application/{kind}\r\n"), &body.to_string())
}

/// An open watch.
pub struct Watch {
    reader: BufReader<TcpStream>,
    buffer: Vec<u8>,
    pub code: u16,
}

impl Watch {
    pub fn open(server: &ApiServer, path: &str) -> Self {
        let mut reader = send(server, "GET", path, "", "");
        let (code, head) = read_head(&mut reader);
        assert!(code != 200 || head.contains("transfer-encoding: chunked"), "{head}");
        Self { reader, buffer: Vec::new(), code }
    }

    /// The next line as it is; none when the stream ends cleanly; an error when it is cut.
    pub fn line(&mut self) -> std::io::Result<Option<String>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line).trim().to_owned()));
            }
            let mut size = String::new();
            let read = self.reader.read_line(&mut size);
            let late = |e: &std::io::Error| e.kind() == std::io::ErrorKind::WouldBlock;
            assert!(!read.as_ref().is_err_and(late), "nothing came in {SOON:?}");
            if read? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let size = usize::from_str_radix(size.trim(), 16).expect("a chunk size");
            let mut chunk = vec![0; size + 2];
            self.reader.read_exact(&mut chunk)?;
            if size == 0 {
                return Ok(None);
            }
            self.buffer.extend_from_slice(&chunk[..size]);
        }
    }

    /// The next event: type and object.
    pub fn event(&mut self) -> Option<(String, Value)> {
        let line = self.line().expect("the stream goes on")?;
        let event: Value = serde_json::from_str(&line).expect("a JSON event");
        Some((event["type"].as_str().unwrap().to_owned(), event["object"].clone()))
    }

    /// The next event as `TYPE name`.
    pub fn next(&mut self) -> String {
        match self.event() {
            Some((kind, object)) => {
                format!("{kind} {}", object["metadata"]["name"].as_str().unwrap_or_default())
                    .trim()
                    .to_owned()
            }
            None => "END".to_owned(),
        }
    }
}
