//! The source/destination check is switched off for the own instance, whichever way the key comes, and
//! what stands in the way is told. A server on loopback plays the metadata service, STS and EC2.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferroute::aws::{Environment, run, switch_off};
use ferroute::cluster::Cluster;
use ferroute::cluster::node::Node;
use ferroute::report::Reporter;
use ferroute_kit::assert::eventually;

const INSTANCE: &str = "i-0123456789abcdef0";
const ROLE_KEY: &str =
    r#"{"Code": "Success", "AccessKeyId": "ROLE", "SecretAccessKey": "hush", "Token": "role-token"}"#;

/// One request: its line, its headers in small letters, its body.
#[derive(Clone, Debug)]
struct Asked {
    line: String,
    headers: Vec<String>,
    body: String,
}

impl Asked {
    fn has(&self, header: &str) -> bool {
        self.headers.iter().any(|known| known.starts_with(header))
    }
}

/// How EC2 answers.
#[derive(Clone, Copy, PartialEq)]
enum Ec2 {
    Grants,
    Refuses,
    HasTwoInterfaces,
}

struct Cloud {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Cloud {
    fn start(ec2: Ec2, has_role: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let kept = asked.clone();
        // Ends with the process: it may wait for a request that does not come.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let request = read(&mut BufReader::new(&stream));
                let (status, text) = answer(&request, ec2, has_role);
                kept.lock().unwrap().push(request);
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    text.len()
                );
                stream.write_all((head + &text).as_bytes()).unwrap();
            }
        });
        Self { address, asked }
    }

    fn environment(&self, more: &[(&str, &str)]) -> Environment {
        let base = format!("http://{}", self.address);
        let own = ["AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_ENDPOINT_URL"].map(|name| (name, base.as_str()));
        let all = own.iter().chain(more);
        Environment::of(all.map(|(name, value)| ((*name).to_owned(), value.replace("BASE", &base))))
    }

    fn actions(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().iter().filter(|asked| asked.line.starts_with("POST / ")).cloned().collect()
    }
}

fn read(stream: &mut impl BufRead) -> Asked {
    let mut line = || {
        let mut text = String::new();
        stream.read_line(&mut text).unwrap();
        text.trim_end().to_owned()
    };
    let first = line();
    let headers: Vec<String> = std::iter::from_fn(|| Some(line()).filter(|text| !text.is_empty())).collect();
    let headers: Vec<String> = headers
        .iter()
        .map(|header| {
            header.split_once(':').map(|(name, value)| name.to_lowercase() + ":" + value.trim()).unwrap()
        })
        .collect();
    let length = headers.iter().find_map(|header| header.strip_prefix("content-length:")).map(str::parse);
    let mut body = vec![0; length.map_or(0, Result::unwrap)];
    stream.read_exact(&mut body).unwrap();
    Asked { line: first, headers, body: String::from_utf8(body).unwrap() }
}

fn answer(request: &Asked, ec2: Ec2, has_role: bool) -> (&'static str, String) {
    let ok = |text: &str| ("200 OK", text.to_owned());
    let mut words = request.line.split(' ');
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    if method == "PUT" && path == "/latest/api/token" && request.has("x-aws-ec2-metadata-token-ttl-seconds:")
    {
        return ok("session");
    }
    if let Some(item) = path.strip_prefix("/latest/meta-data/") {
        if !request.has("x-aws-ec2-metadata-token:session") {
            return ("401 Unauthorized", String::new());
        }
        return match item {
            "instance-id" => ok(INSTANCE),
            "placement/region" => ok("eu-west-1"),
            "services/domain" => ok("amazonaws.com"),
            "mac" => ok("02:00:00:00:00:01"),
            "network/interfaces/macs/02:00:00:00:00:01/interface-id" => ok("eni-1"),
            "iam/security-credentials/" if has_role => ok("node-role"),
            "iam/security-credentials/node-role" if has_role => ok(ROLE_KEY),
            _ => ("404 Not Found", String::new()),
        };
    }
    if path == "/pod-identity" && request.has("authorization:agent-token") {
        return ok(&ROLE_KEY.replace("ROLE", "AGENT"));
    }
    let refused = |code: &str, message: &str| {
        let text = format!(
            "<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors></Response>"
        );
        ("403 Forbidden", text)
    };
    if request.body.starts_with("Action=AssumeRoleWithWebIdentity&") {
        assert!(request.body.contains("RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fr&"), "{request:?}");
        return ok("<Credentials><AccessKeyId>WEB</AccessKeyId><SecretAccessKey>hush</SecretAccessKey>\
                   <SessionToken>web-token</SessionToken></Credentials>");
    }
    match ec2 {
        Ec2::Refuses => refused("UnauthorizedOperation", "You are not authorized"),
        Ec2::HasTwoInterfaces if request.body.contains("InstanceId=") => refused(
            "InvalidInstanceID",
            "There are multiple interfaces attached to instance. Specify an interface ID",
        ),
        _ => ok("<ModifyInstanceAttributeResponse><return>true</return></ModifyInstanceAttributeResponse>"),
    }
}

#[tokio::test]
async fn the_own_instance_is_changed_with_the_key_of_its_role() {
    let cloud = Cloud::start(Ec2::Grants, true);
    switch_off(INSTANCE, &cloud.environment(&[])).await.unwrap();
    let [call] = &cloud.actions()[..] else { panic!("{:?}", cloud.actions()) };
    assert_eq!(
        call.body,
        format!(
            "Action=ModifyInstanceAttribute&SourceDestCheck.Value=false&Version=2016-11-15&InstanceId={INSTANCE}"
        )
    );
    assert!(call.has("authorization:AWS4-HMAC-SHA256 Credential=ROLE/"), "{call:?}");
    let signed =
        "/eu-west-1/ec2/aws4_request, SignedHeaders=content-type;host;x-amz-date;x-amz-security-token, ";
    assert!(call.headers.iter().any(|header| header.contains(signed)), "{call:?}");
    assert!(call.has("x-amz-security-token:role-token") && call.has(&format!("host:{}", cloud.address)));
}

#[tokio::test]
async fn of_several_interfaces_the_first_is_meant() {
    let cloud = Cloud::start(Ec2::HasTwoInterfaces, true);
    switch_off(INSTANCE, &cloud.environment(&[])).await.unwrap();
    let bodies: Vec<String> = cloud.actions().into_iter().map(|call| call.body).collect();
    assert_eq!(bodies.len(), 2);
    assert!(
        bodies[1].starts_with("Action=ModifyNetworkInterfaceAttribute&")
            && bodies[1].ends_with("NetworkInterfaceId=eni-1")
    );
}

#[tokio::test]
async fn keys_come_from_where_aws_programs_have_them() {
    let token = std::env::temp_dir().join(format!("ferroute-aws-token-{}", std::process::id()));
    std::fs::write(&token, "web-identity\n").unwrap();
    let path = token.to_str().unwrap();
    for (variables, key) in [
        (vec![("AWS_ACCESS_KEY_ID", "GIVEN"), ("AWS_SECRET_ACCESS_KEY", "hush")], "GIVEN"),
        (vec![("AWS_ROLE_ARN", "arn:aws:iam::1:role/r"), ("AWS_WEB_IDENTITY_TOKEN_FILE", path)], "WEB"),
        (
            vec![
                ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "BASE/pod-identity"),
                ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "agent-token"),
            ],
            "AGENT",
        ),
    ] {
        let cloud = Cloud::start(Ec2::Grants, false);
        switch_off(INSTANCE, &cloud.environment(&variables)).await.unwrap();
        let call = cloud.actions().pop().unwrap();
        assert!(call.has(&format!("authorization:AWS4-HMAC-SHA256 Credential={key}/")), "{call:?}");
    }
    std::fs::remove_file(token).unwrap();
}

#[tokio::test]
async fn what_stands_in_the_way_is_said() {
    let cloud = Cloud::start(Ec2::Refuses, true);
    let told = async |instance: &str, cloud: &Cloud, more: &[(&str, &str)]| {
        switch_off(instance, &cloud.environment(more)).await.unwrap_err().to_string()
    };
    assert_eq!(
        told(INSTANCE, &cloud, &[]).await,
        "EC2 refuses ModifyInstanceAttribute: UnauthorizedOperation: You are not authorized"
    );
    let other = told("i-1", &cloud, &[]).await;
    assert_eq!(other, format!("the Node says instance i-1, the metadata of this machine {INSTANCE}"));
    assert_eq!(cloud.actions().len(), 1, "another instance is left alone");
    let roleless = Cloud::start(Ec2::Grants, false);
    let error = told(INSTANCE, &roleless, &[]).await;
    assert!(error.ends_with("this instance has no role (instance profile)"), "{error}");
    let missing =
        told(INSTANCE, &roleless, &[("AWS_ROLE_ARN", "r"), ("AWS_WEB_IDENTITY_TOKEN_FILE", "/nowhere")])
            .await;
    assert!(missing.starts_with("AWS_WEB_IDENTITY_TOKEN_FILE=/nowhere: "), "{missing}");
    // Nobody listens on the discard port.
    let nobody =
        Environment::of([("AWS_EC2_METADATA_SERVICE_ENDPOINT".to_owned(), "http://127.0.0.1:9".to_owned())]);
    let error = switch_off(INSTANCE, &nobody).await.unwrap_err().to_string();
    assert!(
        error.starts_with(
            "the instance metadata service at http://127.0.0.1:9/latest/api/token cannot be reached: "
        ),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_asked_about_only_once_it_says_that_aws_runs_it() {
    let (cluster, reporter) = (Cluster::new(), Reporter::new("n1"));
    let node = |provider: Option<&str>| Node {
        name: "n1".into(),
        provider_id: provider.map(Into::into),
        ..Node::default()
    };
    let cloud = Cloud::start(Ec2::Refuses, true);
    let running = tokio::spawn(run(cluster.clone(), "n1".into(), reporter.clone(), cloud.environment(&[])));
    cluster.apply_node(node(None));
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(cloud.asked.lock().unwrap().is_empty());
    cluster.apply_node(node(Some(&format!("aws:///eu-west-1a/{INSTANCE}"))));
    eventually("an event that says what to allow", Duration::from_secs(30), || {
        let problems = reporter.current();
        let told = problems.iter().any(|problem| {
            problem.reason == "SourceDestCheck" && problem.message.contains("ec2:ModifyInstanceAttribute")
        });
        if told { Ok(()) } else { Err(format!("{problems:?}")) }
    });
    running.abort();

    let elsewhere = tokio::spawn(run(cluster.clone(), "n1".into(), reporter, cloud.environment(&[])));
    cluster.apply_node(node(Some("gce://project/zone/vm")));
    tokio::time::timeout(Duration::from_secs(30), elsewhere).await.unwrap().unwrap();
}
