//! The manifests of `daemonset/` as they are: they parse, their flags are flags, their rights are
//! those the code uses, and the pod holds no more than it needs.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A failed test may panic anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::Path;

use ferroute::cluster::Interests;
use ferroute::cluster::Kind;
use ferroute::cluster::wire::{
    ApiKind, NamespaceObject, NetworkPolicyObject, NodeObject, PodObject, SecretObject, ServiceCidrObject,
    ServiceObject, SliceObject,
};
use ferroute::config::{self, Command, Config, Environment};
use serde_json::{Value, json};

fn documents(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset").join(name);
    let text = std::fs::read_to_string(&path).unwrap();
    text.split("\n---\n").map(|document| serde_saphyr::from_str(document).unwrap()).collect()
}

const DAEMON_SETS: [&str; 2] = ["ferroute-proxy.yaml", "ferroute-all-features.yaml"];

fn daemon_set(name: &str) -> Value {
    let mut documents = documents(name);
    assert_eq!(documents.len(), 1, "{name}");
    documents.remove(0)
}

fn strings(value: &Value) -> BTreeSet<String> {
    value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

fn config(args: &Value, address: &str) -> Config {
    let words = args.as_array().unwrap().iter();
    let words =
        words.map(|word| OsString::from(word.as_str().unwrap().replace("%APISERVER%", address))).collect();
    let environment = Environment { node_name: Some("n1".to_owned()), ..Environment::default() };
    match config::parse(words, &environment) {
        Ok(Command::Run(config)) => *config,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_flags_run_what_the_name_says() {
    for name in DAEMON_SETS {
        let set = daemon_set(name);
        let container = &set["spec"]["template"]["spec"]["containers"][0];
        let config = config(&container["args"], "192.0.2.10:6443");
        assert!(config.proxy.is_some(), "{name}");
        assert_eq!(config.netpol.is_some(), name.contains("all-features"), "{name}");
        assert_eq!(config.notices, Vec::<String>::new(), "{name}: every flag has an effect");
        // The placeholder must not get as far as a connection attempt.
        let words =
            container["args"].as_array().unwrap().iter().map(|w| w.as_str().unwrap().into()).collect();
        let mistakes = config::parse(words, &Environment::default()).unwrap_err();
        assert!(mistakes.to_string().contains("placeholder"), "{mistakes}");
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            let get = &container[probe]["httpGet"];
            let target = format!("{}:{}", get["host"].as_str().unwrap(), get["port"]);
            assert_eq!(target.parse().ok(), config.health, "{name} {probe}");
            let path = get["path"].as_str().unwrap();
            assert_eq!(path, if probe == "readinessProbe" { "/readyz" } else { "/livez" });
        }
    }
}

#[test]
fn flags_prepared_in_comments_are_flags() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset/ferroute-all-features.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    let flags: Vec<&str> = text.lines().filter_map(|line| line.trim().strip_prefix("# - ")).collect();
    assert!(flags.len() >= 8, "{flags:?}");
    for flag in flags {
        let environment = Environment { node_name: Some("n1".to_owned()), ..Environment::default() };
        if let Err(mistakes) = config::parse(vec![flag.into()], &environment) {
            // Refused for what it asks, never for how it is written.
            assert_eq!(mistakes.exit_code(), 1, "{flag}: {mistakes}");
        }
    }
}

#[test]
fn the_pod_holds_no_more_than_it_needs() {
    for name in DAEMON_SETS {
        let set = daemon_set(name);
        let template = &set["spec"]["template"];
        assert_eq!(template["metadata"]["labels"], set["spec"]["selector"]["matchLabels"]);
        let pod = &template["spec"];
        assert_eq!(pod["hostNetwork"], true);
        assert_eq!(pod["priorityClassName"], "system-node-critical");
        assert_eq!(pod["hostPID"], Value::Null);
        let container = &pod["containers"][0];
        let security = &container["securityContext"];
        assert_eq!(security["capabilities"]["drop"], json!(["ALL"]));
        assert_eq!(security["capabilities"]["add"], json!(["NET_ADMIN", "NET_RAW"]));
        assert_eq!(security["readOnlyRootFilesystem"], true);
        assert_eq!(security["allowPrivilegeEscalation"], false);
        assert_eq!(security["privileged"], Value::Null);
        // Every mount has its volume, and what the daemon writes is mounted writable.
        let volumes: BTreeMap<&str, &str> = pod["volumes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| (v["name"].as_str().unwrap(), v["hostPath"]["path"].as_str().unwrap()))
            .collect();
        let mut writable = BTreeSet::new();
        let before = pod["initContainers"].as_array().unwrap().iter();
        let mounts = before.chain([container]).flat_map(|c| c["volumeMounts"].as_array().unwrap());
        for mount in mounts {
            let path = mount["mountPath"].as_str().unwrap();
            assert_eq!(volumes.get(mount["name"].as_str().unwrap()), Some(&path), "{name}");
            if mount["readOnly"] != true {
                writable.insert(path);
            }
        }
        let config = config(&container["args"], "192.0.2.10:6443");
        let socket_folder = config.admin_socket.parent().unwrap().to_str().unwrap();
        let mut wanted = BTreeSet::from([socket_folder, "/run/xtables.lock"]);
        if let Some(folder) = &config.cni.conf_dir {
            wanted.extend([folder.to_str().unwrap(), "/opt/cni/bin"]);
        }
        assert_eq!(writable, wanted, "{name}");
    }
}

#[test]
fn the_cni_plugin_is_installed_where_the_daemon_answers_it() {
    let set = daemon_set("ferroute-all-features.yaml");
    let pod = &set["spec"]["template"]["spec"];
    let install = &pod["initContainers"][1];
    let words = install["args"].as_array().unwrap().iter().map(|w| w.as_str().unwrap().into()).collect();
    let Ok(Command::CniInstall(install_command)) = config::parse(words, &Environment::default()) else {
        panic!("{install}");
    };
    // The program only: an entry before the daemon answers would keep pods from starting.
    assert_eq!(install_command.conf_dir, None);
    let names = |container: &Value| -> Vec<String> {
        let mounts = container["volumeMounts"].as_array().unwrap().iter();
        mounts.map(|mount| mount["mountPath"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(install), [install_command.bin_dir.to_str().unwrap()]);
    let security = &install["securityContext"];
    assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}));
    assert_eq!((&security["readOnlyRootFilesystem"], &security["privileged"]), (&json!(true), &Value::Null));
    let daemon = &pod["containers"][0];
    let config = config(&daemon["args"], "192.0.2.10:6443");
    let folder = config.cni.conf_dir.unwrap();
    assert!(names(daemon).contains(&folder.to_str().unwrap().to_owned()));
    assert!(config.netpol.is_some());
    // The plugin on the host looks there unless its entry says otherwise.
    assert_eq!(config.cni.socket.as_deref(), Some(Path::new(ferroute::cni::SOCKET)));
}

#[test]
fn the_rights_are_those_the_code_uses() {
    let documents = documents("rbac.yaml");
    let role = documents.iter().find(|d| d["kind"] == "ClusterRole").unwrap();
    let mut granted: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
    for rule in role["rules"].as_array().unwrap() {
        for group in strings(&rule["apiGroups"]) {
            for resource in strings(&rule["resources"]) {
                granted.entry((group.clone(), resource)).or_default().extend(strings(&rule["verbs"]));
            }
        }
    }
    let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<BTreeSet<_>>();
    let mut used = BTreeMap::from([
        // report.rs: creates an event, and counts it up when another node was first.
        ((String::new(), "events".to_owned()), words(&["create", "get", "patch"])),
    ]);
    fn resource<T: ApiKind>() -> (Kind, (String, String)) {
        (T::KIND, (T::GROUP.to_owned(), T::PLURAL.to_owned()))
    }
    let watched = BTreeMap::from([
        resource::<ServiceObject>(),
        resource::<SliceObject>(),
        resource::<NodeObject>(),
        resource::<ServiceCidrObject>(),
        resource::<PodObject>(),
        resource::<NamespaceObject>(),
        resource::<NetworkPolicyObject>(),
    ]);
    // Secrets are a matter of bgp-passwords.yaml.
    let all = Interests::service_proxy().and(Interests::network_policy("n1")).and(Interests::routes());
    for kind in all.kinds.into_iter().filter(|kind| *kind != Kind::Secret) {
        used.insert(watched[&kind].clone(), words(&["list", "watch"]));
    }
    assert_eq!(granted, used);
    // The binding joins the account of the pods to the role.
    let account = documents.iter().find(|d| d["kind"] == "ServiceAccount").unwrap();
    let binding = documents.iter().find(|d| d["kind"] == "ClusterRoleBinding").unwrap();
    assert_eq!(binding["roleRef"]["name"], role["metadata"]["name"]);
    assert_eq!(binding["subjects"][0]["name"], account["metadata"]["name"]);
    assert_eq!(binding["subjects"][0]["namespace"], account["metadata"]["namespace"]);
    for name in DAEMON_SETS {
        let set = daemon_set(name);
        assert_eq!(set["metadata"]["namespace"], account["metadata"]["namespace"]);
        assert_eq!(set["spec"]["template"]["spec"]["serviceAccountName"], account["metadata"]["name"]);
    }
}

#[test]
fn secrets_are_readable_by_name_in_the_own_namespace_only() {
    let documents = documents("bgp-passwords.yaml");
    let [role, binding] = &documents[..] else { panic!("{documents:?}") };
    assert_eq!((&role["kind"], &binding["kind"]), (&json!("Role"), &json!("RoleBinding")));
    let rules = json!([{
        "apiGroups": [SecretObject::GROUP], "resources": [SecretObject::PLURAL],
        "resourceNames": ["bgp-passwords"], "verbs": ["list", "watch"],
    }]);
    assert_eq!(role["rules"], rules);
    assert_eq!(binding["roleRef"]["name"], role["metadata"]["name"]);
    let account = daemon_set(DAEMON_SETS[1]);
    let namespace = &account["metadata"]["namespace"];
    assert_eq!(
        [
            &role["metadata"]["namespace"],
            &binding["metadata"]["namespace"],
            &binding["subjects"][0]["namespace"]
        ],
        [namespace; 3]
    );
    assert_eq!(binding["subjects"][0]["name"], account["spec"]["template"]["spec"]["serviceAccountName"]);
}

/// systemd's word on a unit whose program lies where this test's lies; and how exposed it finds it,
/// from 0 to 10.
fn systemd(unit: &str) -> (bool, String, f64) {
    let folder = std::env::temp_dir().join(format!("ferroute-unit-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("ferroute.service");
    std::fs::write(&path, unit.replace("/usr/local/bin/ferroute", env!("CARGO_BIN_EXE_ferroute"))).unwrap();
    let analyze = |arguments: &[&str]| {
        let output = std::process::Command::new("systemd-analyze").args(arguments).arg(&path).output();
        output.expect("systemd-analyze; cure: apt-get install systemd")
    };
    let verified = analyze(&["verify", "--man=no"]);
    let judged = analyze(&["security", "--offline=true", "--no-pager"]);
    std::fs::remove_dir_all(&folder).unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let said = text(&verified.stdout) + &text(&verified.stderr);
    let judgement = text(&judged.stdout);
    let level = judgement.split("exposure level for ferroute.service:").nth(1).unwrap_or_default();
    let level = level.split_whitespace().next().and_then(|number| number.parse().ok());
    (verified.status.success(), said, level.unwrap_or_else(|| panic!("{judgement}{}", text(&judged.stderr))))
}

#[test]
fn systemd_understands_every_line_of_the_unit() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset/ferroute.service");
    let unit = std::fs::read_to_string(path).unwrap();
    let (accepted, said, exposure) = systemd(&unit);
    assert!(accepted && said.trim().is_empty(), "{said}");
    println!("exposure {exposure}");
    // What is left is what it is for: root, the host's network, its sysctls and modules.
    assert!(exposure <= 4.7, "{exposure}");
    // That silence means something, and the level too.
    let (_, said, open) = systemd(&unit.replace("ProtectHome=", "ProtectHouse="));
    assert!(said.contains("ProtectHouse"), "{said}");
    assert!(open > exposure, "{open}");
    let (accepted, said, _) = systemd(&unit.replace("ExecStart=", "ExecStart=/no/such/program "));
    assert!(!accepted && said.contains("/no/such/program"), "{said}");
}
