//! The routers of others that tests and measurements put beside ferroute's speaker: BIRD 2, FRR and GoBGP
//! as Debian has them.

use std::path::Path;
use std::process::{Command, Stdio};

/// Whose router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Make {
    /// BIRD 2.
    Bird,
    /// bgpd of FRR, without zebra.
    Frr,
    /// gobgpd, with its API at 127.0.0.1:50051.
    Gobgp,
}

/// The configuration in the router's folder.
pub const CONFIG: &str = "router.conf";
/// BIRD's control socket in its folder.
pub const CONTROL: &str = "router.ctl";
/// What to install, for messages.
pub const PACKAGES: &str = "Debian: bird2, frr, gobgpd";

impl Make {
    /// Runs it in the foreground with [`CONFIG`] of this folder, where its sockets go too. Start it in the
    /// namespace that it is to live in.
    pub fn command(self, folder: &Path) -> Command {
        let (program, arguments): (&str, &[&str]) = match self {
            Self::Bird => ("bird", &["-f", "-c", CONFIG, "-s", CONTROL, "-P", "router.pid"]),
            Self::Frr => (
                "/usr/lib/frr/bgpd",
                &["-n", "-Z", "-S", "-f", CONFIG, "-i", "router.pid", "--vty_socket", ".", "-P", "0"],
            ),
            Self::Gobgp => {
                ("gobgpd", &["-f", CONFIG, "--api-hosts=127.0.0.1:50051", "--pprof-disable", "-l", "warn"])
            }
        };
        let mut command = Command::new(program);
        command.current_dir(folder).args(arguments).stdout(Stdio::null());
        command
    }
}
