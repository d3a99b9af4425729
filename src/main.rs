//! The `ferroute` program: command line in, exit code out. 0 is success, 1 an error at start or
//! while running, 2 a wrong command line. Called by a container runtime it is a CNI plugin.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use ferroute::config::{self, Command, Environment};
use ferroute::{admin, cleanup, cni, daemon, log, supervise};

fn main() -> ExitCode {
    // First and with nothing set up: a pod waits for it.
    if is_plugin_call(&std::env::args_os().collect::<Vec<_>>()) {
        return run_plugin();
    }
    let environment = Environment {
        node_name: std::env::var("NODE_NAME").ok(),
        cni_conf_file: std::env::var("KUBE_ROUTER_CNI_CONF_FILE").ok(),
        host_name: nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()),
    };
    let command = match config::parse(std::env::args_os().skip(1).collect(), &environment) {
        Ok(command) => command,
        Err(mistakes) => {
            eprint!("{mistakes}");
            return ExitCode::from(mistakes.exit_code());
        }
    };
    match execute(command) {
        Ok(code) => code,
        Err(error) => {
            // Also for people who read no logs, and whatever the log's format.
            eprintln!("ferroute: {}", supervise::chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Runtimes call plugins by file name, with a variable and without arguments.
fn is_plugin_call(words: &[OsString]) -> bool {
    let name = words.first().and_then(|word| Path::new(word).file_name()).unwrap_or_default();
    match words.get(1..).unwrap_or_default() {
        [] => name == cni::PLUGIN || std::env::var_os("CNI_COMMAND").is_some(),
        [only] => only == "cni",
        _ => false,
    }
}

fn run_plugin() -> ExitCode {
    let outcome = cni::plugin::run(&cni::plugin::Environment::of_process(), std::io::stdin().lock());
    let mut out = std::io::stdout().lock();
    let written = out.write_all(outcome.output.as_bytes()).and_then(|()| out.flush());
    if outcome.failed || written.is_err() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Print(text) => print(&text),
        Command::Status { socket, output } => print(&line(admin::ask_status(&socket, output)?)),
        Command::Explain { socket, output, from, to } => {
            print(&line(admin::ask_explain(&socket, output, &from, &to)?))
        }
        Command::Bgp { socket, output, what, peer } => {
            print(&line(admin::ask_bgp(&socket, output, what, peer.as_deref())?))
        }
        Command::CniInstall(install) => print(&cni::install::install(&install)?),
        Command::CniUninstall { conf_dir, bin_dir } => {
            let outcome = cni::install::uninstall(&conf_dir, &bin_dir, false);
            print(&outcome.text())?;
            for failure in &outcome.failures {
                eprintln!("ferroute: {failure}");
            }
            Ok(if outcome.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Plan { config, output } => {
            log::start(config.log)?;
            print(&line(daemon::plan(*config, output)?))
        }
        Command::CleanUp { dry_run, cni_conf_dir, log } => {
            log::start(log)?;
            daemon::require_root()?;
            let outcome = cleanup::run(&cni_conf_dir, dry_run);
            print(&outcome.text)?;
            for failure in &outcome.failures {
                eprintln!("ferroute: {failure}");
            }
            Ok(if outcome.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Run(config) => {
            let level = log::start(config.log)?;
            supervise::log_panics();
            daemon::run(*config, level)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Text for standard output; a reader that stopped reading (`| head`) is no error.
fn print(text: &str) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn line(text: String) -> String {
    if text.ends_with('\n') { text } else { text + "\n" }
}
