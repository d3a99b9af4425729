//! `ferroute cni install` and `ferroute cni uninstall`. (`ferroute cni` alone is the plugin itself,
//! which `main` runs before any flag is read.)

use std::ffi::OsString;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::command_line::{self, Given, Stop};
use super::flags::{Flag, Kind, Room};
use super::{Command, Mistake};
use crate::cni::install::{BIN_DIR, CONF_DIR, Install};
use crate::cni::netconf::{self, WhenUnavailable};

const fn flag(name: &'static str, default: &'static str, help: &'static str) -> Flag {
    Flag { name, kind: Kind::Text, default, room: Room::Daemon, asks: false, help }
}

const CONF: Flag = flag(
    "conf-dir",
    CONF_DIR,
    "Folder of the network configurations; empty installs the program only and leaves the entry to the daemon's --cni-conf-dir",
);
const BIN: Flag = flag("bin-dir", BIN_DIR, "Folder of the CNI plugins");
const TIMEOUT: Flag = flag(
    "timeout",
    "",
    "How long a pod's start waits for its policy, 100ms to 60s; the plugin's default is 5s",
);
const WHEN: Flag = flag(
    "when-unavailable",
    "",
    "What happens to a pod whose policy cannot be confirmed in time: deny (the plugin's default) fails its start, allow lets it start",
);

/// Reads the words behind `cni`.
pub(super) fn command(mut words: Vec<OsString>) -> Result<Command, Stop> {
    let verb = if words.is_empty() { OsString::new() } else { words.remove(0) };
    match verb.to_str() {
        Some("install") => {
            let extra = [CONF, BIN, TIMEOUT, WHEN];
            let about =
                "Puts the CNI plugin onto this host: program, and entry in the network configuration.";
            let given = command_line::read(
                "ferroute cni install",
                about,
                |flag| flag.name == "cni-socket",
                &extra,
                words,
            )?;
            install(&given)
        }
        Some("uninstall") => {
            let about =
                "Takes the CNI plugin off this host: entry in the network configuration, and program.";
            let given = command_line::read("ferroute cni uninstall", about, |_| false, &[CONF, BIN], words)?;
            let mut mistakes = Vec::new();
            let (conf, bin) =
                (folder(&given, "conf-dir", &mut mistakes), folder(&given, "bin-dir", &mut mistakes));
            finish(mistakes)?;
            Ok(Command::CniUninstall {
                conf_dir: conf.unwrap_or_else(|| PathBuf::from(CONF_DIR)),
                bin_dir: bin.unwrap_or_else(|| PathBuf::from(BIN_DIR)),
            })
        }
        _ => Err(Stop::Wrong(vec![Mistake::usage(
            "cni: write `ferroute cni install` or `ferroute cni uninstall` (each has --help); `ferroute cni` alone is \
             the plugin, for container runtimes",
        )])),
    }
}

fn install(given: &Given) -> Result<Command, Stop> {
    let mut mistakes = Vec::new();
    let mut settings = Map::new();
    let conf_dir = folder(given, "conf-dir", &mut mistakes);
    let bin_dir = folder(given, "bin-dir", &mut mistakes).unwrap_or_else(|| PathBuf::from(BIN_DIR));
    if given.is_explicit("cni-socket") {
        if let Some(path) = folder(given, "cni-socket", &mut mistakes) {
            settings.insert("socket".to_owned(), Value::from(path.to_string_lossy()));
        } else {
            mistakes.push(Mistake::meaning("--cni-socket=: the plugin needs the daemon's socket"));
        }
    }
    let timeout = given.text("timeout");
    if !timeout.is_empty() {
        match netconf::timeout(timeout) {
            Ok(_) => drop(settings.insert("timeout".to_owned(), timeout.into())),
            Err(cure) => mistakes.push(Mistake::usage(format!("--timeout={timeout}: {cure}"))),
        }
    }
    let when = given.text("when-unavailable");
    if !when.is_empty() {
        match when.parse::<WhenUnavailable>() {
            Ok(_) => drop(settings.insert("whenUnavailable".to_owned(), when.into())),
            Err(cure) => mistakes.push(Mistake::usage(format!("--when-unavailable={when}: {cure}"))),
        }
    }
    finish(mistakes)?;
    Ok(Command::CniInstall(Install { conf_dir, bin_dir, settings }))
}

/// An absolute path; `None` when empty.
fn folder(given: &Given, name: &str, mistakes: &mut Vec<Mistake>) -> Option<PathBuf> {
    let path = PathBuf::from(given.text(name));
    if path.as_os_str().is_empty() {
        return None;
    }
    if !path.is_absolute() {
        mistakes.push(Mistake::meaning(format!("--{name}={}: must be an absolute path", path.display())));
    }
    Some(path)
}

fn finish(mistakes: Vec<Mistake>) -> Result<(), Stop> {
    if mistakes.is_empty() { Ok(()) } else { Err(Stop::Wrong(mistakes)) }
}
