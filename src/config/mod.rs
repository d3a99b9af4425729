//! The command line: every flag, its default and its checks; typed values out.
//!
//! The flags are kube-router's, so that its manifests run unchanged, and a few of our own. All of
//! them parse; those of rooms that this version does not have are refused only when they ask for
//! something that would silently be missing. Nothing here reads the machine: the environment comes
//! in as [`Environment`].
//!
//! `flags` is the table, `command_line` turns words into values, `check` turns values into
//! [`Config`] and collects every mistake on the way.

mod check;
mod cni;
mod command_line;
mod flags;

use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use command_line::Stop;
use flags::{Flag, Kind, Room};

use crate::cni::install::Install;
use crate::netpol;
use crate::network;
use crate::proxy::settings::Settings;
use crate::routes;

/// What the user wants done.
#[derive(Debug)]
pub enum Command {
    /// Run the daemon.
    Run(Box<Config>),
    /// `--cleanup-config`: remove what is ours.
    CleanUp {
        /// `--dry-run`: only print it.
        dry_run: bool,
        /// `--cni-conf-dir`, or where it mostly is.
        cni_conf_dir: PathBuf,
        /// How to log.
        log: Log,
    },
    /// `ferroute plan`: what a daemon with these flags would change.
    Plan {
        /// The daemon's flags.
        config: Box<Config>,
        /// How to print it.
        output: Output,
    },
    /// `ferroute status`: ask the running daemon.
    Status {
        /// Its socket.
        socket: PathBuf,
        /// How to print it.
        output: Output,
    },
    /// `ferroute explain`: whether a connection is allowed, and why.
    Explain {
        /// The daemon's socket.
        socket: PathBuf,
        /// How to print it.
        output: Output,
        /// A pod, address or node.
        from: String,
        /// The same with a port.
        to: String,
    },
    /// `ferroute bgp`: sessions and routes.
    Bgp {
        /// The daemon's socket.
        socket: PathBuf,
        /// How to print it.
        output: Output,
        /// `neighbors`, `routes`, `advertised` or `received`.
        what: &'static str,
        /// Of which peer.
        peer: Option<String>,
    },
    /// `ferroute cni install`: the CNI plugin onto this host.
    CniInstall(Install),
    /// `ferroute cni uninstall`: the CNI plugin off this host.
    CniUninstall {
        /// Where the network configuration is.
        conf_dir: PathBuf,
        /// Where plugins are.
        bin_dir: PathBuf,
    },
    /// `--help` or `--version`: text for standard output.
    Print(String),
}

/// Everything the daemon needs to know.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where objects come from.
    pub source: Source,
    /// Name of the Node object of this machine.
    pub node_name: Arc<str>,
    /// Warn when the first lists take longer than this.
    pub cache_sync_timeout: Duration,
    /// Where health is served.
    pub health: Option<SocketAddr>,
    /// Where metrics are served.
    pub metrics: Option<Metrics>,
    /// The Unix socket of `ferroute status`.
    pub admin_socket: PathBuf,
    /// The CNI plugin's part.
    pub cni: Cni,
    /// How to log.
    pub log: Log,
    /// The service proxy's choices; `None` when it is off.
    pub proxy: Option<Settings>,
    /// Network policy's choices; `None` when it is off.
    pub netpol: Option<netpol::Settings>,
    /// The choices for routes and BGP; `None` when they are off.
    pub routes: Option<routes::Settings>,
    /// The choices for the pod network; it runs where routes do.
    pub network: Option<network::Settings>,
    /// What the user should know about the flags, as whole sentences.
    pub notices: Vec<String>,
}

/// Where objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder of YAML and JSON files.
    Manifests(PathBuf),
    /// An API server; both absent means the pod's service account.
    Api {
        /// `--kubeconfig`.
        kubeconfig: Option<PathBuf>,
        /// `--master`, which overrides the server of either.
        master: Option<String>,
    },
}

/// What the daemon does for the CNI plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cni {
    /// `--cni-socket`: where it answers.
    pub socket: Option<PathBuf>,
    /// `--cni-conf-dir`: the network configuration in which it keeps the plugin.
    pub conf_dir: Option<PathBuf>,
}

/// Where metrics are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// Address and port to listen on.
    pub address: SocketAddr,
    /// The HTTP path.
    pub path: String,
}

/// How to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    /// One JSON object per line instead of text.
    pub json: bool,
    /// kube-router's `-v` level.
    pub level: i32,
}

/// How a command prints its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// What the machine says about itself.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// Environment variable `NODE_NAME`.
    pub node_name: Option<String>,
    /// Environment variable `KUBE_ROUTER_CNI_CONF_FILE`.
    pub cni_conf_file: Option<String>,
    /// The operating system's host name.
    pub host_name: Option<String>,
}

/// One thing that is wrong with the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Whether the words themselves are wrong (exit 2), as opposed to what they mean (exit 1).
    pub is_usage: bool,
    /// What, where and what to do.
    pub text: String,
}

impl Mistake {
    fn usage(text: impl Into<String>) -> Self {
        Self { is_usage: true, text: text.into() }
    }

    fn meaning(text: impl Into<String>) -> Self {
        Self { is_usage: false, text: text.into() }
    }
}

/// All mistakes of one command line; never empty.
#[derive(Debug, PartialEq, Eq)]
pub struct Mistakes(pub Vec<Mistake>);

impl Mistakes {
    /// 2 when the words are wrong, 1 when only their meaning is.
    pub fn exit_code(&self) -> u8 {
        if self.0.iter().any(|mistake| mistake.is_usage) { 2 } else { 1 }
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for mistake in &self.0 {
            writeln!(f, "ferroute: {}", mistake.text)?;
        }
        if self.exit_code() == 2 {
            writeln!(f, "Run 'ferroute --help' for the flags.")?;
        }
        Ok(())
    }
}

impl std::error::Error for Mistakes {}

const ABOUT: &str = "One Kubernetes node network agent: Services through IPVS, network policy through iptables.\n\n\
    ferroute [FLAGS]          run the daemon (as root)\n\
    ferroute status [FLAGS]   what the running daemon wants, what the kernel has, the difference\n\
    ferroute plan [FLAGS]     what a daemon with these flags would change; writes nothing\n\
    ferroute explain FROM TO:PORT  whether policies allow a connection, and what the kernel does with it\n\
    ferroute bgp neighbors|routes|advertised|received   BGP sessions, and why a route is taken or sent\n\
    ferroute cni install      the CNI plugin onto this host: pods start when their policy is in force\n\
    ferroute cni uninstall    the CNI plugin off this host\n\n\
    Flags are compatible with kube-router's. Durations are Go's (1m30s), lists go by comma or repetition.";

const OUTPUT: Flag = Flag {
    name: "output",
    kind: Kind::Text,
    default: "text",
    room: Room::Daemon,
    asks: false,
    help: "Print `text` or `json`",
};

/// Reads a command line; `words` do not include the program's own name.
pub fn parse(words: Vec<OsString>, environment: &Environment) -> Result<Command, Mistakes> {
    let outcome = match words.first().and_then(|word| word.to_str()) {
        Some("status") => command_line::read(
            "ferroute status",
            "What the running daemon wants, what the kernel has, and the difference.",
            |flag| flag.name == "admin-socket",
            &[OUTPUT],
            words.into_iter().skip(1).collect(),
        )
        .and_then(|given| {
            let output = check::output(&given)?;
            Ok(Command::Status { socket: PathBuf::from(given.text("admin-socket")), output })
        }),
        Some("plan") => command_line::read(
            "ferroute plan",
            "What a daemon with these flags would change in the kernel. Writes nothing.",
            |_| true,
            &[OUTPUT],
            words.into_iter().skip(1).collect(),
        )
        .and_then(|given| {
            let output = check::output(&given)?;
            Ok(Command::Plan { config: Box::new(check::config(&given, environment)?), output })
        }),
        Some("explain") => explain(words.into_iter().skip(1).collect()),
        Some("bgp") => bgp(words.into_iter().skip(1).collect()),
        Some("cni") => cni::command(words.into_iter().skip(1).collect()),
        _ => command_line::read("ferroute", ABOUT, |_| true, &[], words)
            .and_then(|given| check::command(&given, environment)),
    };
    match outcome {
        Ok(command) => Ok(command),
        Err(Stop::Print(text)) => Ok(Command::Print(text)),
        Err(Stop::Wrong(mistakes)) => Err(Mistakes(mistakes)),
    }
}

/// Reads the words behind `explain`: two ends, and flags around them.
fn explain(words: Vec<OsString>) -> Result<Command, Stop> {
    let (flags, ends): (Vec<OsString>, Vec<OsString>) = split_ends(words);
    let given = command_line::read(
        "ferroute explain",
        "Whether policies allow a connection, which of them decide, and what this node's kernel really does with its \
         first packet.\n\nferroute explain FROM TO:PORT[/PROTOCOL]\n\nFROM and TO are a pod (NAMESPACE/NAME), an \
         address ([v6] before a port) or a node; PORT is a number or a name of the pod's.",
        |flag| flag.name == "admin-socket",
        &[OUTPUT],
        flags,
    )?;
    let output = check::output(&given)?;
    let text = |word: &OsString| word.to_string_lossy().into_owned();
    match ends.as_slice() {
        [from, to] => {
            let (from, to) = (text(from), text(to));
            netpol::Question::parse(&from, &to)
                .map_err(|error| Stop::Wrong(vec![Mistake::usage(format!("explain: {error}"))]))?;
            let socket = PathBuf::from(given.text("admin-socket"));
            Ok(Command::Explain { socket, output, from, to })
        }
        _ => Err(Stop::Wrong(vec![Mistake::usage(
            "explain: write `ferroute explain FROM TO:PORT`, for example `ferroute explain shop/cart shop/db:5432`",
        )])),
    }
}

/// Reads the words behind `bgp`: what to show, perhaps of which peer, and flags around them.
fn bgp(words: Vec<OsString>) -> Result<Command, Stop> {
    let (flags, rest) = split_ends(words);
    let given = command_line::read(
        "ferroute bgp",
        "BGP sessions and routes of the running daemon.\n\nferroute bgp neighbors            sessions: state, since \
         when, paths, last error\nferroute bgp routes               all paths, and why one is best or not\n\
         ferroute bgp advertised ADDRESS   what a peer is told, and why it is not told the rest\n\
         ferroute bgp received ADDRESS     what a peer sent, and what became of it",
        |flag| flag.name == "admin-socket",
        &[OUTPUT],
        flags,
    )?;
    let output = check::output(&given)?;
    let rest: Vec<String> = rest.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let wrong = |text: String| Err(Stop::Wrong(vec![Mistake::usage(format!("bgp: {text}"))]));
    let (name, peer) = match rest.as_slice() {
        [name] => (name.as_str(), None),
        [name, peer] => (name.as_str(), Some(peer.as_str())),
        _ => ("", None),
    };
    let Some(what) = ["neighbors", "routes", "advertised", "received"].into_iter().find(|what| *what == name)
    else {
        return wrong(
            "write `ferroute bgp neighbors`, `routes`, `advertised ADDRESS` or `received ADDRESS`".to_owned(),
        );
    };
    if what == "neighbors" && peer.is_some() {
        return wrong("neighbors takes no address".to_owned());
    }
    if what != "neighbors"
        && let Err(cure) = routes::Listing::parse(what, peer)
    {
        return wrong(cure);
    }
    let socket = PathBuf::from(given.text("admin-socket"));
    Ok(Command::Bgp { socket, output, what, peer: peer.map(str::to_owned) })
}

/// Words that begin with a dash, with the value of `-o`, from the others.
fn split_ends(words: Vec<OsString>) -> (Vec<OsString>, Vec<OsString>) {
    let (mut flags, mut ends) = (Vec::new(), Vec::new());
    let mut takes_value = false;
    for word in words {
        let is_flag = word.to_string_lossy().starts_with('-');
        if is_flag || std::mem::take(&mut takes_value) {
            takes_value = is_flag && ["-o", "--output", "--admin-socket"].iter().any(|flag| word == *flag);
            flags.push(word);
        } else {
            ends.push(word);
        }
    }
    (flags, ends)
}

#[cfg(test)]
mod tests;
