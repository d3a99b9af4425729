//! Measures ferroute against the floor: the least netlink messages that make the same kernel state,
//! replayed raw on the same kernel; and its BGP speaker against other routers. Started by `scripts/bench`,
//! in a lab and outside.

mod daemon;
mod policies;
mod pure;
mod report;
mod routers;
mod sessions;
mod shape;
mod sides;
mod tables;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use serde::Serialize;
use serde::de::DeserializeOwned;

use report::{Figures, Report};
use shape::Shape;

#[derive(Parser)]
#[command(about = "Measures ferroute against the floor; needs root in a kernel with IPVS (scripts/bench)")]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Everything, in processes of their own.
    All {
        /// Numbers of Services.
        #[arg(long, value_delimiter = ',', default_value = "100,1000,10000")]
        sizes: Vec<u32>,
        /// Interleaved runs of each side.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Numbers of NetworkPolicies.
        #[arg(long, value_delimiter = ',', default_value = "10,1000,10000")]
        policies: Vec<u32>,
        /// Numbers of routes from one sender to one receiver.
        #[arg(long, value_delimiter = ',', default_value = "10000,100000,500000")]
        routes: Vec<u32>,
        /// What to measure.
        #[arg(long, value_enum, value_delimiter = ',', default_value = "services,policies,routers,sessions")]
        parts: Vec<Part>,
        /// Sizes 100 and 1,000 and three runs, no variants.
        #[arg(long)]
        quick: bool,
        /// The ferroute binary.
        #[arg(long)]
        program: PathBuf,
        /// Write all samples here as JSON.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// One run of ferroute's Service room.
    Ferroute {
        #[command(flatten)]
        shape: Shape,
        /// Read the kernel between the steps and write the floor's script to this folder.
        #[arg(long)]
        capture: Option<PathBuf>,
    },
    /// One run of ferroute's policy room.
    Policies {
        /// Policies in the cluster.
        #[arg(long)]
        policies: u32,
        /// Read the kernel after every event and write the floor's script to this folder.
        #[arg(long)]
        capture: Option<PathBuf>,
    },
    /// One run of the floor of policies.
    PolicyFloor {
        /// Where the script is.
        #[arg(long)]
        folder: PathBuf,
    },
    /// What packets pay for being judged.
    Packets {
        /// Local isolated pods.
        #[arg(long)]
        isolated: u32,
    },
    /// One run of one router.
    Router {
        /// Whose.
        #[arg(long, value_enum)]
        make: routers::Make,
        #[command(flatten)]
        load: routers::Load,
    },
    /// Is ferroute's router in such a run.
    Speak {
        /// Peers that send.
        #[arg(long)]
        senders: u32,
    },
    /// One start of a speaker beside a router that waits for it.
    SessionStart {
        /// Who starts.
        #[arg(long, value_enum)]
        starter: routers::Make,
        /// Who waits.
        #[arg(long, value_enum)]
        receiver: routers::Make,
        /// The ferroute binary.
        #[arg(long)]
        program: PathBuf,
    },
    /// Changes of one Service, to the UPDATEs they cause.
    ServiceChange {
        /// The ferroute binary.
        #[arg(long)]
        program: PathBuf,
    },
    /// One run of the floor.
    Floor {
        /// Where the script is.
        #[arg(long)]
        folder: PathBuf,
        /// Compare the kernel's state with ferroute's.
        #[arg(long)]
        verify: bool,
    },
    /// ipset restore and ipvsadm --restore.
    Commands {
        /// Where their input is.
        #[arg(long)]
        folder: PathBuf,
    },
    /// Times of the parts that need no kernel.
    Pure {
        #[command(flatten)]
        shape: Shape,
    },
    /// The whole daemon against an API server.
    Daemon {
        #[command(flatten)]
        shape: Shape,
        /// The ferroute binary.
        #[arg(long)]
        program: PathBuf,
    },
}

/// A part of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// The Service proxy.
    Services,
    /// Network policy.
    Policies,
    /// The BGP speaker beside other routers.
    Routers,
    /// The daemon's sessions beside those of other routers.
    Sessions,
}

fn main() -> Result<()> {
    match Arguments::parse().what {
        What::All { sizes, policies, routes, parts, runs, quick, program, json } => {
            let (sizes, runs) = if quick { (vec![100, 1000], 3) } else { (sizes, runs) };
            let policies = if quick { vec![10, 1000] } else { policies };
            let routes = if quick { vec![10_000] } else { routes };
            ensure!(runs > 0, "--runs: at least one");
            // Service and pod addresses of this size still fit their ranges.
            ensure!(sizes.iter().all(|size| (1..=50_000).contains(size)), "--sizes: from 1 to 50000");
            // Their namespaces and addresses fit theirs.
            ensure!(policies.iter().all(|count| (1..=50_000).contains(count)), "--policies: from 1 to 50000");
            let mut report = Report::begin(runs)?;
            if parts.contains(&Part::Services) {
                services(&mut report, &sizes, runs, quick, &program)?;
            }
            if parts.contains(&Part::Policies) {
                policy_tables(&mut report, &policies, runs)?;
            }
            if parts.contains(&Part::Routers) {
                router_tables(&mut report, &routes, runs, quick)?;
            }
            if parts.contains(&Part::Sessions) {
                session_tables(&mut report, runs, &program)?;
            }
            if let Some(path) = json {
                std::fs::write(&path, serde_json::to_string_pretty(&report)?)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
            Ok(())
        }
        What::Ferroute { shape, capture } => print(&sides::ferroute(&shape, capture.as_deref())?),
        What::Policies { policies, capture } => print(&policies::room(policies, capture.as_deref())?),
        What::PolicyFloor { folder } => print(&policies::floor(&folder)?),
        What::Packets { isolated } => print(&policies::packets(isolated)?),
        What::Router { make, load } => print(&routers::measure(make, load)?),
        What::Speak { senders } => routers::speak(senders),
        What::SessionStart { starter, receiver, program } => {
            print(&sessions::start(starter, receiver, &program)?)
        }
        What::ServiceChange { program } => print(&sessions::change(&program)?),
        What::Floor { folder, verify } => print(&sides::floor(&folder, verify)?),
        What::Pure { shape } => pure::pure(&shape),
        What::Commands { folder } => print(&sides::commands(&folder)?),
        What::Daemon { shape, program } => print(&daemon::daemon(&shape, &program)?),
    }
}

fn print(value: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}

fn services(report: &mut Report, sizes: &[u32], runs: usize, quick: bool, program: &Path) -> Result<()> {
    let mut shapes: Vec<Shape> =
        sizes.iter().map(|&services| Shape { services, scheduler: None, no_range: false }).collect();
    if !quick && let Some(services) = sizes.iter().copied().filter(|size| *size <= 1000).max() {
        shapes.push(Shape { services, scheduler: Some("mh".into()), no_range: false });
        shapes.push(Shape { services, scheduler: None, no_range: true });
    }
    for shape in shapes {
        eprintln!("bench: {shape}");
        let figures = measure(&shape, runs, program).with_context(|| shape.to_string())?;
        print!("{}", report.add(&shape, figures));
    }
    Ok(())
}

/// Isolated pods with which packets are timed; the kubelet's usual limit, and a full /24.
const ISOLATED: [u32; 3] = [0, 110, 250];

fn policy_tables(report: &mut Report, counts: &[u32], runs: usize) -> Result<()> {
    let folder = std::env::temp_dir().join(format!("ferroute-bench-policies-{}", std::process::id()));
    for &policies in counts {
        eprintln!("bench: {policies} policies");
        // Left from another count.
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder)?;
        let text = folder.display().to_string();
        let own = ["policies".to_owned(), "--policies".to_owned(), policies.to_string()];
        let _: policies::Run = child(&[own.to_vec(), vec!["--capture".to_owned(), text.clone()]].concat())?;
        let mut figures = policies::Figures { policies, ..Default::default() };
        for _ in 0..runs {
            figures.room.push(child(&own)?);
            figures.floor.push(child(&["policy-floor".to_owned(), "--folder".to_owned(), text.clone()])?);
        }
        print!("{}", figures.table());
        report.add_policies(figures);
    }
    // Absent when no count was asked for.
    let _ = std::fs::remove_dir_all(&folder);
    eprintln!("bench: packets");
    let mut packets = Vec::new();
    for _ in 0..runs {
        let one =
            |isolated: u32| child(&["packets".to_owned(), "--isolated".to_owned(), isolated.to_string()]);
        packets.push(ISOLATED.into_iter().map(one).collect::<Result<Vec<policies::Packets>>>()?);
    }
    print!("{}", policies::packet_table(&packets)?);
    report.packets = packets;
    Ok(())
}

/// Routes from one sender, and from a hundred.
fn router_tables(report: &mut Report, routes: &[u32], runs: usize, quick: bool) -> Result<()> {
    let one = routes.iter().map(|&routes| routers::Load { senders: 1, routes });
    let many = (!quick).then_some(routers::Load { senders: 100, routes: 1000 });
    for load in one.chain(many) {
        eprintln!("bench: {load:?}");
        let mut figures = routers::Figures::new(load);
        for _ in 0..runs {
            for (make, runs, failure) in figures.runs.iter_mut().filter(|(.., failure)| failure.is_none()) {
                let (senders, routes) = (load.senders.to_string(), load.routes.to_string());
                let words = ["router", "--make", make.word(), "--senders", &senders, "--routes", &routes];
                match child(&words.map(str::to_owned)) {
                    Ok(run) => runs.push(run),
                    // What others cannot do is a figure too; what ferroute cannot is an error.
                    Err(error) if *make != routers::Make::Ferroute => *failure = Some(format!("{error:#}")),
                    Err(error) => return Err(error),
                }
            }
        }
        print!("{}", figures.table());
        report.routers.push(figures);
    }
    Ok(())
}

/// Starts of every speaker beside every router, and changes of a Service.
fn session_tables(report: &mut Report, runs: usize, program: &Path) -> Result<()> {
    eprintln!("bench: sessions");
    let program = program.display().to_string();
    let mut figures = sessions::Figures::new();
    for _ in 0..runs {
        for (starter, receiver, runs, failure) in &mut figures.starts {
            if failure.is_some() {
                continue;
            }
            let words = ["session-start", "--starter", starter.word(), "--receiver", receiver.word()];
            let words = [&words[..], &["--program", &program]].concat();
            match child(&words.into_iter().map(str::to_owned).collect::<Vec<_>>()) {
                Ok(run) => runs.push(run),
                // What others cannot do is a figure too; what ferroute cannot is an error.
                Err(error) if *starter != routers::Make::Ferroute => *failure = Some(format!("{error:#}")),
                Err(error) => return Err(error),
            }
        }
        figures.changes.push(child(&["service-change", "--program", &program].map(str::to_owned))?);
    }
    print!("{}", figures.table());
    report.sessions = Some(figures);
    Ok(())
}

fn measure(shape: &Shape, runs: usize, program: &Path) -> Result<Figures> {
    let folder = std::env::temp_dir().join(format!("ferroute-bench-{}", std::process::id()));
    // Left from another shape.
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder)?;
    let text = folder.display().to_string();
    let with_shape = |word: &str, more: &[&str]| {
        let mut arguments = vec![word.to_owned()];
        arguments.extend(shape.arguments());
        arguments.extend(more.iter().map(ToString::to_string));
        arguments
    };
    let mut figures =
        Figures { captured: child(&with_shape("ferroute", &["--capture", &text]))?, ..Figures::default() };
    for run in 0..runs {
        figures.ferroute.push(child(&with_shape("ferroute", &[]))?);
        let mut floor = vec!["floor".to_owned(), "--folder".to_owned(), text.clone()];
        if run == 0 {
            // Its times are not used: reading back warms or cools what follows.
            let _: sides::Samples = child(&[floor.clone(), vec!["--verify".to_owned()]].concat())?;
        }
        figures.floor.push(child(&std::mem::take(&mut floor))?);
    }
    figures.commands = child(&["commands".to_owned(), "--folder".to_owned(), text])?;
    if shape.scheduler.is_none() && !shape.no_range {
        for _ in 0..runs.min(3) {
            let program = program.display().to_string();
            figures.daemon.push(child(&with_shape("daemon", &["--program", &program]))?);
        }
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(figures)
}

/// Runs this program again, for a namespace and a memory of its own.
fn child<T: DeserializeOwned>(arguments: &[String]) -> Result<T> {
    let output = Command::new(std::env::current_exe()?)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run this program again")?;
    if !output.status.success() {
        bail!("{}: {}", arguments.join(" "), output.status);
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}
