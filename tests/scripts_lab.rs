//! What `scripts/lab` promises, tried from outside: exit statuses, output, files, and that nothing stays behind.
//!
//! Runs on the host and boots User-Mode Linux itself (`uml`, or `uml-built` where `FERROUTE_LAB_KERNEL` says so): a
//! panic must not hit the machine. As root the tests without privilege run as user 65534.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// A boot takes 2 to 4 seconds; a loaded machine gets more.
const BOOTED: Duration = Duration::from_secs(60);
/// How long processes may take to vanish once their lab has ended.
const GONE: Duration = Duration::from_secs(10);
const NOBODY: u32 = 65534;

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts")
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A folder of its own for one test, gone on drop.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("scripts-lab-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        Self(path)
    }

    fn entries(&self) -> Vec<PathBuf> {
        fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One call of `scripts/lab`, whose temporary files would lie in `temporary`.
struct Lab {
    command: Command,
    temporary: Folder,
}

impl Lab {
    fn new(options: &[&str]) -> Self {
        Self::with(&scripts().join("lab"), options)
    }

    fn with(script: &Path, options: &[&str]) -> Self {
        let kernel = match std::env::var("FERROUTE_LAB_KERNEL") {
            Ok(kernel) if kernel == "uml-built" => "uml-built",
            _ => "uml",
        };
        let temporary = Folder::new();
        let mut command = Command::new("env");
        // Under a shell's `&` an interrupt would be ignored from the start.
        command.arg("--default-signal=INT").arg(script).args(["--kernel", kernel]).args(options);
        command.env("TMPDIR", &temporary.0).env_remove("FERROUTE_LAB").stdin(Stdio::null()).process_group(0);
        Self { command, temporary }
    }

    /// The command to run in the lab, given by a shell's text.
    fn shell(mut self, text: &str) -> Self {
        self.command.args(["--", "sh", "-c", text]);
        self
    }

    fn run(mut self) -> Output {
        let output = self.command.output().unwrap();
        assert_eq!(self.temporary.entries(), Vec::<PathBuf>::new(), "files were left behind");
        output
    }

    /// Starts it and waits until the command in the guest says so by making the file `up` in its output folder.
    fn start(mut self, up: &Path) -> Running {
        let child = self.command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + BOOTED;
        while !up.exists() {
            assert!(Instant::now() < deadline, "the lab does not come up");
            sleep(Duration::from_millis(50));
        }
        let processes = descendants(child.id());
        assert!(processes.len() > 2, "a lab has more processes than {processes:?}");
        Running { child, processes, temporary: self.temporary }
    }
}

struct Running {
    child: Child,
    processes: BTreeSet<u32>,
    temporary: Folder,
}

impl Running {
    /// Waits for the script's end; then all its processes and files must vanish.
    fn end(self) -> Output {
        let output = self.child.wait_with_output().unwrap();
        let deadline = Instant::now() + GONE;
        loop {
            let left: Vec<_> = self
                .processes
                .iter()
                .filter(|process| Path::new(&format!("/proc/{process}/exe")).exists())
                .collect();
            let files = self.temporary.entries();
            if left.is_empty() && files.is_empty() {
                return output;
            }
            assert!(Instant::now() < deadline, "left behind: processes {left:?}, files {files:?}");
            sleep(Duration::from_millis(50));
        }
    }
}

/// All processes below `ancestor`, itself included, by the parents in `/proc/PID/stat`.
fn descendants(ancestor: u32) -> BTreeSet<u32> {
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| {
            let process: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
            let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            Some((process, parent))
        })
        .collect();
    let mut found = BTreeSet::from([ancestor]);
    loop {
        let before = found.len();
        found.extend(
            parents.iter().filter(|(_, parent)| found.contains(parent)).map(|(p, _)| *p).collect::<Vec<_>>(),
        );
        if found.len() == before {
            return found;
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The repository may lie where only its owner may read: a copy of the scripts for user 65534.
fn copied_scripts(into: &Path) -> PathBuf {
    let target = into.join("scripts");
    fs::create_dir_all(target.join("lab.d")).unwrap();
    for part in ["", "lab.d"] {
        for entry in fs::read_dir(scripts().join(part)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::copy(&path, target.join(part).join(path.file_name().unwrap())).unwrap();
            }
        }
    }
    target.join("lab")
}

fn without_privilege(lab: &mut Lab) {
    lab.command.current_dir("/");
    if is_root() {
        lab.command.uid(NOBODY).gid(NOBODY);
    }
}

#[test]
fn exit_status_output_arguments_environment_and_folder_come_through() {
    for status in [0, 101] {
        let output = Lab::new(&[]).shell(&format!("exit {status}")).run();
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(status), String::new()));
        assert_eq!(text(&output.stderr), "");
    }
    let mut lab = Lab::new(&[]);
    lab.command.args(["--", "sh", "-c"]);
    lab.command.arg(r#"printf '<%s>' "$@" "$NASTY" "$PWD" "$FERROUTE_LAB"; echo err >&2; exit 7"#);
    lab.command.args(["sh", "", "a b", "*", "line\nbreak", "'\"\\$HOME"]);
    lab.command.env("NASTY", "x='1' \n$2 \"3\"").current_dir("/usr/share");
    let output = lab.run();
    let printed = text(&output.stdout);
    let expected = "<><a b><*><line\nbreak><'\"\\$HOME><x='1' \n$2 \"3\"></usr/share><uml";
    assert!(printed.starts_with(expected), "{printed:?}");
    assert_eq!(text(&output.stderr), "err\n");
    assert_eq!(output.status.code(), Some(7));
}

#[test]
fn standard_output_is_exact_to_the_byte() {
    let folder = Folder::new();
    let bytes: Vec<u8> = (0..2_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let file = folder.0.join("bytes");
    fs::write(&file, &bytes).unwrap();
    let output = Lab::new(&[]).shell(&format!("cat {0}; wc -c <{0} >&2", file.display())).run();
    assert!(output.stdout == bytes, "{} bytes came of {}", output.stdout.len(), bytes.len());
    assert_eq!(text(&output.stderr), "2000000\n");
}

#[test]
fn the_kernel_has_what_is_promised() {
    let output = Lab::new(&[])
        .shell(
            "set -e
            id -u
            for family in 10.0.0.1 '[fd00::1]'; do
              ipvsadm -A -t $family:80 -s mh; ipvsadm -A -u $family:80 -s wlc; ipvsadm -A --sctp-service $family:80
            done
            ipset create ports hash:ip,port
            ipset create six hash:ip,port family inet6
            ip link add name dummy9 type dummy
            ip link add name bridge9 type bridge
            ip link add name veth8 type veth peer name veth9
            ip link add name ipip9 type ipip local 127.0.0.1
            ip netns add ns9
            ip -n ns9 link add name dummy9 type dummy
            for command in iptables ip6tables; do
              $command -A INPUT -m comment --comment lab -p tcp -m multiport --dports 1,2 -m ipvs --ipvs -j REJECT
              $command -t nat -A POSTROUTING -m mark --mark 1 -j MASQUERADE --random-fully
            done
            iptables -A INPUT -m set --match-set ports dst,dst -j ACCEPT
            conntrack -L >/dev/null 2>&1
            sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.ipv4.vs.conntrack=1
            ipvsadm -Ln | grep -c 80",
        )
        .run();
    assert_eq!(text(&output.stderr), "");
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(0), "0\n6\n"));
}

#[test]
fn files_change_in_the_output_folder_only() {
    let (inside, outside) = (Folder::new(), Folder::new());
    fs::write(outside.0.join("kept"), "old").unwrap();
    let output = Lab::new(&["--out", inside.0.to_str().unwrap()])
        .shell(&format!(
            "cd {}; echo new >kept; echo more >another; cat kept; cp * \"$OUT\"",
            outside.0.display()
        ))
        .run();
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(0), "new\n"));
    assert_eq!(fs::read_to_string(outside.0.join("kept")).unwrap(), "old");
    assert_eq!(outside.entries().len(), 1);
    assert_eq!(fs::read_to_string(inside.0.join("kept")).unwrap(), "new\n");
    assert_eq!(fs::read_to_string(inside.0.join("another")).unwrap(), "more\n");
}

#[test]
fn a_hang_ends_at_the_time_limit() {
    let out = Folder::new();
    let lab = Lab::new(&["--time-limit", "30", "--out", out.0.to_str().unwrap()]);
    let output =
        lab.shell("touch $OUT/up; trap '' TERM INT; while :; do :; done").start(&out.0.join("up")).end();
    assert_eq!(output.status.code(), Some(124), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("time limit of 30 s"), "{}", text(&output.stderr));
}

#[test]
fn a_panic_is_told_and_leaves_nothing() {
    let out = Folder::new();
    let lab = Lab::new(&["--out", out.0.to_str().unwrap()]);
    let output =
        lab.shell("touch $OUT/up; sleep 2; echo c >/proc/sysrq-trigger").start(&out.0.join("up")).end();
    assert_eq!(output.status.code(), Some(70), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("sysrq triggered crash"), "{}", text(&output.stderr));
}

#[test]
fn an_interrupt_and_a_kill_leave_nothing() {
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let out = Folder::new();
        let lab = Lab::new(&["--out", out.0.to_str().unwrap()]);
        let running = lab.shell("touch $OUT/up; sleep 1000").start(&out.0.join("up"));
        let process = Pid::from_raw(i32::try_from(running.child.id()).unwrap());
        // Ctrl-C reaches the whole foreground group; a kill hits the script alone.
        match signal {
            Signal::SIGINT => killpg(process, signal).unwrap(),
            _ => kill(process, signal).unwrap(),
        }
        let output = running.end();
        if signal == Signal::SIGINT {
            assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
        }
    }
}

#[test]
fn what_the_command_left_running_does_not_hold_the_lab() {
    let output = Lab::new(&[]).shell("sleep 1000 & echo started; exit 3").run();
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(3), "started\n"));
}

#[test]
fn two_at_once_are_pinned_to_one_processor_each() {
    let started: Vec<_> = [11, 12]
        .map(|status| {
            let out = Folder::new();
            let lab = Lab::new(&["--out", out.0.to_str().unwrap()]);
            let text = format!("touch $OUT/up; until [ -e $OUT/go ]; do sleep 0.1; done; exit {status}");
            (status, lab.shell(&text).start(&out.0.join("up")), out)
        })
        .into();
    for (_, running, out) in &started {
        let pinned = running.processes.iter().any(|process| {
            let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
            let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            let kernel = fs::read_to_string(format!("/proc/{process}/cmdline")).unwrap_or_default();
            kernel.contains("uml_dir=") && allowed.is_some_and(|list| list.trim().parse::<u32>().is_ok())
        });
        assert!(pinned, "a lab's kernel may run on more than one processor");
        fs::write(out.0.join("go"), "").unwrap();
    }
    for (status, running, _out) in started {
        assert_eq!(running.end().status.code(), Some(status));
    }
}

#[test]
fn the_host_kind_isolates_files_network_and_settings() {
    // The guest plays the host: it has IPVS, and nothing here can be harmed.
    let output = Lab::new(&[])
        .shell(&format!(
            "touch /etc/before
            {} --kernel host -- sh -c '
              echo changed >/etc/before; ipvsadm -A -t 10.0.0.1:80; ip link add name dummy9 type dummy
              sysctl -w kernel.panic=77 2>&1; echo $FERROUTE_LAB; exit 9'
            echo $?; cat /etc/before; ipvsadm -Ln | grep -c 10.0.0.1; ls /sys/class/net | grep dummy9; cat /proc/sys/kernel/panic",
            scripts().join("lab").display()
        ))
        .run();
    let printed = text(&output.stdout);
    let lines: Vec<_> = printed.lines().collect();
    assert_eq!(lines[1..4], ["host", "9", "0"], "{printed}{}", text(&output.stderr));
    assert!(lines[0].contains("permission denied on key"), "{printed}");
    assert!(lines.len() == 5 && lines[4] != "77", "{printed}");
}

#[test]
fn a_host_that_does_not_serve_is_told_what_it_lacks() {
    // The guest plays the host again, and is taken a link type, then a command.
    let lab = scripts().join("lab");
    let output = Lab::new(&[])
        .shell(&format!(
            "mkdir /run/shim && cd /run/shim && ip=$(command -v ip)
            printf '#!/bin/sh\\ncase $* in *type?dummy*) exit 2;; esac; exec %s \"$@\"' $ip >ip && chmod +x ip
            PATH=/run/shim:$PATH {lab} --kernel host -- true; echo $?
            rm $(command -v ipvsadm); {lab} --kernel host -- true; echo $?",
            lab = lab.display()
        ))
        .run();
    let said = text(&output.stderr);
    assert_eq!(text(&output.stdout), "69\n69\n", "{said}");
    assert!(
        said.contains("It lacks: dummy. Cure:") && said.contains("It lacks: the command ipvsadm. Cure:"),
        "{said}"
    );

    let copy = Folder::new();
    let mut lab = Lab::with(&copied_scripts(&copy.0), &["--kernel", "host"]);
    without_privilege(&mut lab);
    let said = text(&lab.shell("true").run().stderr);
    assert!(said.contains("It lacks: root (this is user "), "{said}");
}

#[test]
fn without_privilege_the_command_is_root_in_the_lab_all_the_same() {
    let copy = Folder::new();
    let mut lab = Lab::with(&copied_scripts(&copy.0), &[]);
    without_privilege(&mut lab);
    let output =
        lab.shell("id -u; ip link add name dummy9 type dummy && ipvsadm -A -t 10.0.0.1:80 && exit 5").run();
    assert_eq!(
        (output.status.code(), text(&output.stdout).as_str()),
        (Some(5), "0\n"),
        "{}",
        text(&output.stderr)
    );

    let out = Folder::new();
    let mut lab = Lab::with(&copy.0.join("scripts/lab"), &["--out", out.0.to_str().unwrap()]);
    without_privilege(&mut lab);
    let running = lab.shell("touch $OUT/up; sleep 1000").start(&out.0.join("up"));
    kill(Pid::from_raw(i32::try_from(running.child.id()).unwrap()), Signal::SIGKILL).unwrap();
    running.end();
}

#[test]
fn a_missing_package_is_named_with_its_cure() {
    let copy = Folder::new();
    let programs = copy.0.join("programs");
    fs::create_dir(&programs).unwrap();
    for entry in fs::read_dir("/usr/bin").unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap() != "linux.uml" {
            symlink(&path, programs.join(path.file_name().unwrap())).unwrap();
        }
    }
    let mut lab = Lab::with(&copied_scripts(&copy.0), &[]);
    without_privilege(&mut lab);
    lab.command.env("PATH", &programs).env("FERROUTE_LAB_KERNEL", "uml");
    let output = lab.shell("true").run();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{said}");
    assert!(
        said.contains("missing: linux.uml") && said.contains("apt-get install user-mode-linux"),
        "{said}"
    );
}

#[test]
fn a_wrong_command_line_is_explained() {
    for (arguments, word) in [
        (&["--kernel", "vms", "--", "true"][..], "unknown kernel 'vms'"),
        (&["--mem", "lots", "--", "true"], "whole number"),
        (&["--mem"], "wants a value"),
        (&["--colour", "--", "true"], "unknown option --colour"),
        (&["--sim-time", "--kernel", "uml", "--", "true"], "--sim-time needs --kernel uml-built"),
        (&["--out", "/proc/none", "--", "true"], "output folder"),
        (&[], "no command given"),
    ] {
        let output =
            Command::new(scripts().join("lab")).args(arguments).stdin(Stdio::null()).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {said}");
        assert!(said.contains(word), "{arguments:?}: {said}");
    }
    let missing = Lab::new(&[]).shell("exec no-such-command").run();
    assert_eq!(missing.status.code(), Some(127));
    let help = Command::new(scripts().join("lab")).arg("--help").output().unwrap();
    assert!(help.status.success() && text(&help.stdout).starts_with("Usage: scripts/lab"));
}
