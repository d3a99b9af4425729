//! `ferroute-apiserver`: the test API server on its own, for labs and demos.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use ferroute_apiserver::{ApiServer, Kubelet, NodeSpec};
use ipnet::IpNet;

/// A Kubernetes API server for tests, with controllers; everything in memory.
#[derive(Debug, Parser)]
struct Args {
    /// Address and port to listen on.
    #[arg(long, default_value = "127.0.0.1:8001")]
    listen: SocketAddr,
    /// Service range; repeat or separate by commas for dual stack, primary family first.
    #[arg(long, value_delimiter = ',', default_value = "10.96.0.0/16")]
    service_cidr: Vec<IpNet>,
    /// Pod range that nodes get theirs from; repeat or separate by commas for dual stack.
    #[arg(long, value_delimiter = ',', default_value = "10.244.0.0/16")]
    pod_cidr: Vec<IpNet>,
    /// Addresses for Services of type LoadBalancer.
    #[arg(long, value_delimiter = ',')]
    load_balancer_cidr: Vec<IpNet>,
    /// Register a node: name=IP[,IP6]
    #[arg(long, value_name = "NAME=IP[,IP6]")]
    node: Vec<String>,
    /// Addresses of this server for the Service default/kubernetes.
    #[arg(long, value_delimiter = ',')]
    advertise: Vec<IpAddr>,
    /// simulated: pods become ready by themselves; external: somebody else writes their status.
    #[arg(long, default_value = "simulated")]
    kubelet: String,
    /// Ask for the bearer token in this file.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// Apply the YAML and JSON files of this folder at the start.
    #[arg(long)]
    manifests: Option<PathBuf>,
    /// Write a kubeconfig here.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Remove the simulated pods this long after their deletion.
    #[arg(long, value_name = "MILLISECONDS", default_value = "200")]
    pod_gone_after: u64,
    /// Report the simulated pods ready this long after their assignment.
    #[arg(long, value_name = "MILLISECONDS", default_value = "50")]
    pod_ready_after: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let kubelet = match args.kubelet.as_str() {
        "simulated" => Kubelet::Simulated {
            ready_after: Duration::from_millis(args.pod_ready_after),
            gone_after: Duration::from_millis(args.pod_gone_after),
        },
        "external" => Kubelet::External,
        other => bail!("--kubelet is simulated or external, not {other:?}"),
    };
    let mut builder = ApiServer::builder()
        .listen(args.listen)
        .service_cidrs(args.service_cidr)
        .pod_cidrs(args.pod_cidr)
        .load_balancers(args.load_balancer_cidr)
        .advertise(args.advertise)
        .kubelet(kubelet);
    for node in &args.node {
        builder = builder.node(parse_node(node)?);
    }
    if let Some(path) = args.token_file {
        builder = builder.token_file(path);
    }
    let server = builder.start().with_context(|| format!("cannot serve on {}", args.listen))?;
    if let Some(path) = &args.kubeconfig {
        server.kubeconfig(path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(folder) = &args.manifests {
        apply_folder(&server, folder)?;
    }
    println!("{}", server.url());
    loop {
        std::thread::park();
    }
}

fn parse_node(text: &str) -> Result<NodeSpec> {
    let (name, addresses) =
        text.split_once('=').with_context(|| format!("--node {text:?} is not NAME=IP"))?;
    let addresses: Result<Vec<IpAddr>, _> = addresses.split(',').map(str::parse).collect();
    Ok(NodeSpec::new(name, addresses.with_context(|| format!("--node {text:?}"))?))
}

fn apply_folder(server: &ApiServer, folder: &PathBuf) -> Result<()> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json"));
    files.sort();
    for file in files {
        let text =
            std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        server.apply(&text).with_context(|| format!("{} is refused", file.display()))?;
    }
    Ok(())
}
