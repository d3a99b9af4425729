//! What a user sees who starts `ferroute` wrongly: the real binary, its words and its exit code.
//! None of these runs gets as far as the kernel.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A failed test may panic anywhere.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const BINARY: &str = env!("CARGO_BIN_EXE_ferroute");

struct Seen {
    code: i32,
    out: String,
    err: String,
}

fn see(command: &mut Command) -> Seen {
    let output = command
        .env_remove("KUBERNETES_SERVICE_HOST")
        .env_remove("KUBECONFIG")
        .env("NODE_NAME", "n1")
        .output()
        .unwrap();
    let seen = Seen {
        code: output.status.code().expect("ended by a signal"),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    };
    assert!(!seen.err.contains("panicked"), "{}", seen.err);
    seen
}

fn ferroute(words: &[&str]) -> Seen {
    see(Command::new(BINARY).args(words))
}

/// An error that only root gets to see; others are told to be root, which is checked instead.
fn refused_as_root(words: &[&str], parts: &[&str]) {
    let seen = ferroute(words);
    assert_eq!(seen.code, 1, "{words:?}: {}", seen.err);
    let not_root: &[&str] = &["must run as root"];
    let parts = if nix::unistd::geteuid().is_root() { parts } else { not_root };
    for part in parts {
        assert!(seen.err.contains(part), "{words:?}: {part:?} is missing in:\n{}", seen.err);
    }
}

/// A folder of its own, gone at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ferroute-cli-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.0.join(name), text).unwrap();
        self.path(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_wrong_command_line_ends_with_2_and_says_why() {
    for (words, parts) in [
        (&["--no-such-flag"][..], &["--no-such-flag", "ferroute --help"][..]),
        (&["--ipvs-sync-perod=1m"], &["--ipvs-sync-period"]),
        (&["--ipvs-sync-period=5"], &["--ipvs-sync-period=5", "a number without unit"]),
        (&["--ipvs-sync-period=1d"], &["unknown unit \"d\""]),
        (&["--masquerade-all=maybe"], &["--masquerade-all=maybe", "true or false"]),
        (&["--health-port=70000"], &["--health-port=70000", "65535"]),
        (&["--run-router", "false"], &["write --run-router=false"]),
        (&["-master=http://192.0.2.1"], &["write --master"]),
        (&["--peer-router=192.0.2.1"], &["--peer-router-ips"]),
        (&["-v"], &["-v"]),
        (&["status", "--output=xml"], &["--output=xml"]),
        (&["--ipvs-sync-period=x", "--health-port=y"], &["--ipvs-sync-period=x", "--health-port=y"]),
    ] {
        let seen = ferroute(words);
        assert_eq!(seen.code, 2, "{words:?}: {}", seen.err);
        assert_eq!(seen.out, "", "{words:?}");
        for part in parts {
            assert!(seen.err.contains(part), "{words:?}: {part:?} is missing in:\n{}", seen.err);
        }
    }
}

#[test]
fn values_that_make_no_sense_end_with_1_all_of_them_named() {
    let seen = ferroute(&[
        "--ipvs-sync-period=0s",
        "--service-cluster-ip-range=10.0.0.0/99",
        "--run-loadbalancer=true",
        "--advertise-cluster-ip",
        "--master=https://%APISERVER%",
    ]);
    assert_eq!(seen.code, 1, "{}", seen.err);
    for part in ["--ipvs-sync-period=0s", "\"10.0.0.0/99\"", "--run-loadbalancer=true", "placeholder"] {
        assert!(seen.err.contains(part), "{part:?} is missing in:\n{}", seen.err);
    }
    assert!(seen.err.lines().all(|line| line.starts_with("ferroute: ")), "{}", seen.err);
}

#[test]
fn help_and_version_go_to_standard_output() {
    let seen = ferroute(&["--help"]);
    assert_eq!((seen.code, seen.err.as_str()), (0, ""));
    for part in ["--ipvs-graceful-period", "Service proxy", "ferroute status", "[default: 20244]"] {
        assert!(seen.out.contains(part), "{part:?} is missing in:\n{}", seen.out);
    }
    let seen = ferroute(&["--version"]);
    assert_eq!((seen.code, seen.out.as_str()), (0, concat!("ferroute ", env!("CARGO_PKG_VERSION"), "\n")));
}

#[test]
fn only_root_may_run_it() {
    // Others must be able to reach the binary, so that it is the program that refuses.
    let folder = Folder::new("root");
    let copy = folder.path("ferroute");
    std::fs::copy(BINARY, &copy).unwrap();
    for path in [folder.0.as_path(), Path::new(&copy)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    for words in
        [&["--manifests=/"][..], &["--cleanup-config"], &["--cleanup-config", "--dry-run"], &["plan"]]
    {
        let mut command = Command::new(&copy);
        command.args(words);
        if nix::unistd::geteuid().is_root() {
            command.uid(65534).gid(65534);
        }
        let seen = see(&mut command);
        assert_eq!(seen.code, 1, "{words:?}");
        assert!(seen.err.contains("must run as root (user 0)"), "{words:?}: {}", seen.err);
    }
}

#[test]
fn sources_that_do_not_exist_are_named() {
    let folder = Folder::new("sources");
    let file = folder.write("file.yaml", "kind: Service\n");
    let broken = folder.write("kubeconfig", "clusters: {");
    let socket = format!("--admin-socket={}", folder.path("a.sock"));
    let start = |source: &str, parts: &[&str]| refused_as_root(&[&socket, "--health-port=0", source], parts);
    start("--manifests=/nonexistent", &["--manifests=/nonexistent", "No such file"]);
    start(&format!("--manifests={file}"), &["is no folder"]);
    start("--kubeconfig=/nonexistent", &["--kubeconfig=/nonexistent", "No such file"]);
    start(&format!("--kubeconfig={broken}"), &[&format!("--kubeconfig={broken}")]);
    start("--master=http://", &["--master"]);
    start("-v=0", &["--kubeconfig", "--master", "--manifests"]);
    assert!(!Path::new(&folder.path("a.sock")).exists(), "a failed start leaves no socket behind");
}

#[test]
fn ports_and_sockets_in_use_are_named() {
    let folder = Folder::new("ports");
    let manifests = format!("--manifests={}", folder.0.display());
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let socket = folder.path("a.sock");
    let admin = format!("--admin-socket={socket}");
    refused_as_root(&[&manifests, &admin, &format!("--health-port={port}")], &["--health-port", "in use"]);
    refused_as_root(
        &[
            &manifests,
            &admin,
            "--health-port=0",
            "--metrics-addr=127.0.0.1",
            &format!("--metrics-port={port}"),
        ],
        &["--metrics-port", "in use"],
    );
    let file = format!("--admin-socket={}", folder.write("file", "precious"));
    refused_as_root(&[&manifests, &file, "--health-port=0"], &["is no socket"]);
    let _other = UnixListener::bind(&socket).unwrap();
    refused_as_root(&[&manifests, &admin, "--health-port=0"], &["another ferroute is running"]);
}

#[test]
fn status_without_a_daemon_says_so_once() {
    let seen = ferroute(&["status", "--admin-socket=/nonexistent/a.sock"]);
    assert_eq!(seen.code, 1);
    assert_eq!(seen.out, "");
    assert!(seen.err.contains("is the daemon running here, and are you root?"), "{}", seen.err);
    assert_eq!(seen.err.matches("No such file").count(), 1, "{}", seen.err);
}

/// As a container runtime calls it: without arguments, by variables and standard input.
fn plugin(program: &Path, words: &[&str], environment: &[(&str, &str)], input: &str) -> Seen {
    use std::io::Write;
    let mut child = Command::new(program)
        .args(words)
        .env_clear()
        .envs(environment.iter().copied())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Ten megabytes are not read to the end.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    Seen {
        code: output.status.code().expect("ended by a signal"),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

#[test]
fn it_is_a_cni_plugin_under_every_name_a_runtime_may_use() {
    let folder = Folder::new("plugin");
    let (installed, other) = (PathBuf::from(folder.path("ferroute-cni")), PathBuf::from(folder.path("x")));
    for path in [&installed, &other] {
        std::os::unix::fs::symlink(BINARY, path).unwrap();
    }
    let binary = Path::new(BINARY);
    let version = [("CNI_COMMAND", "VERSION")];
    for (program, words) in [(&*installed, &[][..]), (&*other, &[]), (binary, &[]), (binary, &["cni"])] {
        let seen = plugin(program, words, &version, "{\"cniVersion\":\"1.0.0\"}");
        assert_eq!((seen.code, &*seen.err), (0, ""), "{}", seen.out);
        assert!(seen.out.contains("\"1.1.0\"]"), "{}", seen.out);
    }
    // By hand and without a command it says what it is, in the form runtimes read.
    for (program, words) in [(&*installed, &[][..]), (binary, &["cni"])] {
        let seen = plugin(program, words, &[], "");
        assert_eq!((seen.code, &*seen.err), (1, ""));
        let error: serde_json::Value = serde_json::from_str(&seen.out).unwrap();
        assert_eq!(error["code"], 4);
        assert!(error["msg"].as_str().unwrap().contains("ferroute cni install"), "{error}");
    }
    let add = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", "/n"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart"),
    ];
    let conf = format!(
        "{{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"socket\":{:?},\"timeout\":\"200ms\",\"prevResult\":{{\"ips\":[{{\"address\":\"10.0.0.2/24\"}}]}}}}",
        folder.path("cni.sock")
    );
    let seen = plugin(&installed, &[], &add, &conf);
    assert_eq!((seen.code, &*seen.err), (1, ""));
    assert!(seen.out.contains("\"code\":11") && seen.out.contains("pod shop/cart"), "{}", seen.out);
    let seen = plugin(&installed, &[], &add, &"x".repeat(10 << 20));
    assert_eq!((seen.code, seen.out.contains("\"code\":6")), (1, true), "{}", seen.out);
}

#[test]
fn the_cni_plugin_goes_onto_a_host_and_off_it() {
    let folder = Folder::new("install");
    let list = "{\"cniVersion\":\"0.3.0\",\"name\":\"mynet\",\"plugins\":[{\"type\":\"bridge\"},{\"type\":\"portmap\"}]}";
    let conf = folder.path("net.d");
    std::fs::create_dir(&conf).unwrap();
    let file = folder.write("net.d/10-kuberouter.conflist", list);
    let (conf, bin) = (format!("--conf-dir={conf}"), format!("--bin-dir={}", folder.path("bin")));
    let seen = ferroute(&["cni", "install", &conf, &bin]);
    assert_eq!(seen.code, 0, "{}", seen.err);
    assert!(seen.out.contains("wrote") && seen.out.contains("put CNI plugin"), "{}", seen.out);
    let own = PathBuf::from(folder.path("bin/ferroute-cni"));
    assert_eq!(plugin(&own, &[], &[("CNI_COMMAND", "VERSION")], "").code, 0);
    assert!(std::fs::read_to_string(&file).unwrap().contains("ferroute-cni"));
    let seen = ferroute(&["cni", "install", &conf, &bin]);
    assert_eq!((seen.code, seen.out.matches("unchanged:").count()), (0, 2), "{}", seen.out);
    let seen = ferroute(&["cni", "uninstall", &conf, &bin]);
    assert_eq!(seen.code, 0, "{}", seen.err);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), list);
    assert!(!own.exists());
    let seen = ferroute(&["cni", "uninstall", &conf, &bin]);
    assert_eq!((seen.code, &*seen.out), (0, "CNI plugin ferroute-cni is not installed\n"));
    std::fs::remove_file(&file).unwrap();
    let seen = ferroute(&["cni", "install", &conf, &bin]);
    assert!(seen.code == 1 && seen.err.contains("install the cluster's pod network first"), "{}", seen.err);
}
