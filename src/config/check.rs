//! From values to [`Config`]: every check, all mistakes together.

mod network;
mod routing;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ferroute_policy::UnknownPods;
use ipnet::IpNet;

use super::command_line::{Given, Stop};
use super::flags::{FLAGS, Kind, Room};
use super::{Cni, Command, Config, Environment, Log, Metrics, Mistake, Output, Source};
use crate::cni::install::CONF_DIR;
use crate::duration::GoDuration;
use crate::netpol;
use crate::proxy::settings::Settings;

/// The daemon's command line.
pub(super) fn command(given: &Given, environment: &Environment) -> Result<Command, Stop> {
    let mut check = Check { given, mistakes: Vec::new() };
    if check.switch("cleanup-config") {
        check.types();
        let log = check.log();
        let cni_conf_dir = check.cni_conf_dir().unwrap_or_else(|| PathBuf::from(CONF_DIR));
        check.finish()?;
        return Ok(Command::CleanUp { dry_run: check.switch("dry-run"), cni_conf_dir, log });
    }
    if check.switch("dry-run") {
        check
            .meaning("--dry-run belongs to --cleanup-config; to see what the daemon would do: ferroute plan");
    }
    check.config(environment).map(|config| Command::Run(Box::new(config)))
}

/// The daemon's flags behind `ferroute plan`.
pub(super) fn config(given: &Given, environment: &Environment) -> Result<Config, Stop> {
    let mut check = Check { given, mistakes: Vec::new() };
    for name in ["cleanup-config", "dry-run"] {
        if check.switch(name) {
            check.meaning(format!("--{name} does not go with plan, which never writes"));
        }
    }
    check.config(environment)
}

/// `--output`.
pub(super) fn output(given: &Given) -> Result<Output, Stop> {
    match given.text("output") {
        "text" | "human" => Ok(Output::Text),
        "json" => Ok(Output::Json),
        other => {
            Err(Stop::Wrong(vec![Mistake::usage(format!("--output={other}: unknown; write text or json"))]))
        }
    }
}

/// Go's `strconv.ParseBool`.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Which rooms run.
struct Running {
    proxy: bool,
    policy: bool,
    routes: bool,
}

struct Check<'a> {
    given: &'a Given,
    mistakes: Vec<Mistake>,
}

impl Check<'_> {
    fn config(mut self, environment: &Environment) -> Result<Config, Stop> {
        self.types();
        let mut notices = self.given.warnings.clone();
        let Running { proxy, policy, routes } = self.rooms(&mut notices);
        let config = Config {
            source: self.source(),
            node_name: self.node_name(environment),
            cache_sync_timeout: self.period("cache-sync-timeout"),
            health: self.listener("health-addr", "health-port"),
            metrics: self.metrics(),
            admin_socket: self.socket("admin-socket"),
            cni: self.cni(),
            log: self.log(),
            proxy: None,
            netpol: None,
            routes: None,
            network: None,
            notices,
        };
        if let (Some(health), Some(metrics)) = (config.health, &config.metrics)
            && health.port() == metrics.address.port()
        {
            self.meaning("--health-port and --metrics-port are the same; give each its own");
        }
        if self.switch("enable-pprof") {
            self.meaning(
                "--enable-pprof=true: there are no Go profiles here; remove the flag and use /metrics",
            );
        }
        let settings = self.proxy(config.node_name.clone());
        let netpol = self.policy(&settings, proxy);
        let routing = self.routes(&settings);
        let network = self.network(&settings, environment);
        self.finish()?;
        Ok(Config {
            proxy: proxy.then_some(settings),
            netpol: policy.then_some(netpol),
            routes: routing.filter(|_| routes),
            network: network.filter(|_| routes),
            ..config
        })
    }

    fn finish(&mut self) -> Result<(), Stop> {
        if self.mistakes.is_empty() { Ok(()) } else { Err(Stop::Wrong(std::mem::take(&mut self.mistakes))) }
    }

    fn meaning(&mut self, text: impl Into<String>) {
        self.mistakes.push(Mistake::meaning(text));
    }

    /// Every value has its flag's type.
    fn types(&mut self) {
        for flag in FLAGS {
            let text = self.given.text(flag.name);
            let problem = match flag.kind {
                Kind::Switch if parse_bool(text).is_none() => Some("write true or false".to_owned()),
                Kind::Duration => text.parse::<GoDuration>().err().map(|error| error.to_string()),
                Kind::Number(max) => match text.parse::<u64>() {
                    Ok(number) if number <= max => None,
                    _ => Some(format!("write a number from 0 to {max}")),
                },
                _ => None,
            };
            if let Some(problem) = problem {
                self.mistakes.push(Mistake::usage(format!("--{}={text}: {problem}", flag.name)));
            }
        }
    }

    fn switch(&self, name: &str) -> bool {
        parse_bool(self.given.text(name)).unwrap_or_default()
    }

    /// A number; its type was checked before, so a bad one counts as absent here.
    fn number(&self, name: &str) -> Option<u64> {
        self.given.text(name).parse().ok()
    }

    fn duration(&self, name: &str) -> Option<GoDuration> {
        self.given.text(name).parse().ok()
    }

    /// A duration that must be positive.
    fn period(&mut self, name: &str) -> Duration {
        match self.duration(name) {
            Some(value) if value.nanoseconds() <= 0 => {
                self.meaning(format!("--{name}={value}: must be longer than zero"));
                Duration::ZERO
            }
            value => value.and_then(GoDuration::unsigned).unwrap_or_default(),
        }
    }

    /// Which rooms run; and what is refused.
    fn rooms(&mut self, notices: &mut Vec<String>) -> Running {
        let first = notices.len();
        let (proxy, policy) = (self.switch("run-service-proxy"), self.switch("run-firewall"));
        // Without an API server there are rarely other nodes, and the host is no cluster's: not unasked.
        let is_unasked = !self.given.is_explicit("run-router") && !self.given.text("manifests").is_empty();
        let routes = self.switch("run-router") && !is_unasked;
        if is_unasked {
            self.asked_in_vain(Room::Routes, notices);
        }
        if self.switch("run-loadbalancer") {
            let words = Room::LoadBalancer.words();
            self.meaning(format!(
                "--run-loadbalancer=true: {words} is not part of this version; write --run-loadbalancer=false and \
                 leave it to another program"
            ));
        } else if !self.given.is_explicit("run-loadbalancer") {
            self.asked_in_vain(Room::LoadBalancer, notices);
        }
        if is_unasked {
            if !proxy && !policy {
                self.meaning(
                    "nothing to run: --run-service-proxy=false and --run-firewall=false, and with --manifests routes \
                     are off unless --run-router=true; write --run-router=false as well if that is meant",
                );
            }
            let running: Vec<&str> = [(proxy, Room::Proxy), (policy, Room::Policy)]
                .into_iter()
                .filter(|(runs, _)| *runs)
                .map(|(_, room)| room.words())
                .collect();
            notices.insert(
                first,
                format!(
                    "with --manifests routes and BGP are off unless --run-router=true; running {} only",
                    running.join(" and ")
                ),
            );
        }
        if !self.given.text("runtime-endpoint").is_empty() {
            notices.push(
                "--runtime-endpoint has no effect: direct server return is not part of this version"
                    .to_owned(),
            );
        }
        if policy && self.switch("use-nftables-for-netpol") {
            notices.push(
                "--use-nftables-for-netpol=true has no effect: policies are written through iptables, in the form \
                 (nft or legacy) the host uses"
                    .to_owned(),
            );
        }
        if routes {
            self.without_effect(notices);
        }
        Running { proxy, policy, routes }
    }

    /// Flags of a room that was neither switched on nor off.
    fn asked_in_vain(&mut self, room: Room, notices: &mut Vec<String>) {
        let mut idle = Vec::new();
        let (why, cure) = match room {
            Room::Routes => {
                ("is off with --manifests unless --run-router=true", "write that, or remove the flag")
            }
            _ => ("is not part of this version", "remove the flag"),
        };
        for flag in FLAGS.iter().filter(|flag| flag.room == room) {
            if !self.given.is_explicit(flag.name) || self.is_default(flag.name, flag.kind, flag.default) {
                continue;
            }
            if flag.asks {
                self.meaning(format!("--{}: {} {why}; {cure}", flag.name, room.words()));
            } else if flag.kind != Kind::Switch || self.switch(flag.name) {
                idle.push(format!("--{}", flag.name));
            }
        }
        if !idle.is_empty() {
            notices.push(format!("no effect, because {} {why}: {}", room.words(), idle.join(" ")));
        }
    }

    fn is_default(&self, name: &str, kind: Kind, default: &str) -> bool {
        let text = self.given.text(name);
        match kind {
            Kind::Switch => parse_bool(text) == parse_bool(default),
            Kind::Duration => self.duration(name) == default.parse().ok(),
            Kind::Number(_) => self.number(name) == default.parse().ok(),
            Kind::Text => text == default,
            Kind::List => {
                self.items(name) == default.split(',').filter(|item| !item.is_empty()).collect::<Vec<_>>()
            }
        }
    }

    fn source(&mut self) -> Source {
        let path = |name| Some(self.given.text(name)).filter(|text| !text.is_empty());
        let (manifests, kubeconfig, master) = (path("manifests"), path("kubeconfig"), path("master"));
        if let Some(master) = master {
            if master.contains('%') {
                self.meaning(format!(
                    "--master={master}: still holds the placeholder of the manifest; write the address of the API server"
                ));
            } else if let Some((scheme, _)) = master.split_once("://")
                && !["http", "https"].contains(&scheme)
            {
                self.meaning(format!("--master={master}: write an http:// or https:// URL"));
            }
        }
        match manifests {
            Some(folder) => {
                if kubeconfig.is_some() || master.is_some() {
                    self.meaning("--manifests replaces the API server; remove --kubeconfig and --master, or --manifests");
                }
                Source::Manifests(PathBuf::from(folder))
            }
            None => {
                Source::Api { kubeconfig: kubeconfig.map(PathBuf::from), master: master.map(str::to_owned) }
            }
        }
    }

    /// `--hostname-override`, else `NODE_NAME`, else the host name in lower case, as the kubelet
    /// registers it.
    fn node_name(&mut self, environment: &Environment) -> Arc<str> {
        let given = Some(self.given.text("hostname-override").trim()).filter(|name| !name.is_empty());
        let variable = environment.node_name.as_deref().map(str::trim).filter(|name| !name.is_empty());
        let host = environment.host_name.as_deref().map(str::trim).filter(|name| !name.is_empty());
        match given.or(variable) {
            Some(name) => Arc::from(name),
            None => match host {
                Some(name) => Arc::from(name.to_lowercase()),
                None => {
                    self.meaning(
                        "this machine has no host name; give --hostname-override or the environment variable NODE_NAME",
                    );
                    Arc::from("")
                }
            },
        }
    }

    fn listener(&mut self, address: &str, port: &str) -> Option<SocketAddr> {
        let number = self.number(port).and_then(|number| u16::try_from(number).ok())?;
        let text = self.given.text(address);
        let parsed = if text.is_empty() {
            // The IPv6 wildcard takes IPv4 as well; the server falls back where IPv6 is off.
            Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED))
        } else {
            text.trim_start_matches('[').trim_end_matches(']').parse().ok()
        };
        if parsed.is_none() {
            self.meaning(format!("--{address}={text}: not an IP address; write for example 127.0.0.1"));
        }
        parsed.filter(|_| number != 0).map(|address| SocketAddr::new(address, number))
    }

    fn metrics(&mut self) -> Option<Metrics> {
        let path = self.given.text("metrics-path").to_owned();
        if !path.starts_with('/') {
            self.meaning(format!("--metrics-path={path}: must begin with /"));
        }
        self.listener("metrics-addr", "metrics-port").map(|address| Metrics { address, path })
    }

    fn socket(&mut self, name: &str) -> PathBuf {
        let path = PathBuf::from(self.given.text(name));
        if !path.is_absolute() || path.file_name().is_none() {
            self.meaning(format!("--{name}={}: must be an absolute path of a socket", path.display()));
        } else if path.as_os_str().len() > 107 {
            // sockaddr_un holds 108 bytes with the final zero.
            self.meaning(format!("--{name}: the path is longer than 107 bytes, which no socket can have"));
        }
        path
    }

    fn cni(&mut self) -> Cni {
        let socket = (!self.given.text("cni-socket").is_empty()).then(|| self.socket("cni-socket"));
        let conf_dir = self.cni_conf_dir();
        if socket.as_deref() == Some(Path::new(self.given.text("admin-socket"))) {
            self.meaning("--cni-socket and --admin-socket are the same; give each its own");
        }
        if socket.is_none() && conf_dir.is_some() {
            self.meaning("--cni-conf-dir needs --cni-socket: without it every start of a pod would fail");
        }
        Cni { socket, conf_dir }
    }

    fn cni_conf_dir(&mut self) -> Option<PathBuf> {
        let text = self.given.text("cni-conf-dir");
        if !text.is_empty() && !text.starts_with('/') {
            self.meaning(format!("--cni-conf-dir={text}: must be an absolute path, such as {CONF_DIR}"));
        }
        (!text.is_empty()).then(|| PathBuf::from(text))
    }

    fn log(&mut self) -> Log {
        let level = self.given.text("v");
        let format = self.given.text("log-format");
        if level.parse::<i32>().is_err() {
            self.mistakes.push(Mistake::usage(format!("-v={level}: write a number, for example -v=2")));
        }
        if !["text", "json"].contains(&format) {
            self.mistakes.push(Mistake::usage(format!("--log-format={format}: write text or json")));
        }
        Log { json: format == "json", level: level.parse().unwrap_or_default() }
    }

    fn proxy(&mut self, node_name: Arc<str>) -> Settings {
        let graceful = match self.duration("ipvs-graceful-period") {
            Some(period) if period.nanoseconds() < 0 => {
                self.meaning(format!("--ipvs-graceful-period={period}: must not be negative"));
                None
            }
            period => period.and_then(GoDuration::unsigned),
        };
        let drains = self.switch("ipvs-graceful-termination");
        let (external_ip_ranges, load_balancer_ranges) =
            (self.ranges("service-external-ip-range"), self.ranges("loadbalancer-ip-range"));
        let whole = [
            ("advertise-external-ip", &external_ip_ranges),
            ("advertise-loadbalancer-ip", &load_balancer_ranges),
        ];
        let whole =
            whole.into_iter().filter(|(kind, _)| self.switch("advertise-ranges") && self.switch(kind));
        let mut whole_ranges: Vec<IpNet> = whole.flat_map(|(_, ranges)| ranges.iter().copied()).collect();
        whole_ranges.sort_unstable();
        whole_ranges.dedup();
        Settings {
            node_name,
            audit_period: self.period("ipvs-sync-period"),
            graceful_period: graceful.filter(|period| drains && !period.is_zero()),
            hairpin_all: self.switch("hairpin-mode"),
            masquerade_all: self.switch("masquerade-all"),
            node_port_on_all_addresses: self.switch("nodeport-bindon-all-ip"),
            firewall: self.switch("ipvs-permit-all"),
            excluded_cidrs: self.cidrs("excluded-cidrs"),
            strict_external_ips: self.switch("strict-external-ip-validation"),
            external_ip_ranges,
            load_balancer_ranges,
            whole_ranges,
            cluster_ip_ranges: self.cluster_ip_ranges(),
            cluster_ip_ranges_given: self.given.is_explicit("service-cluster-ip-range"),
            node_port_range: self.node_port_range(),
            tcp_timeout: self.ipvs_timeout("service-tcp-timeout"),
            tcp_fin_timeout: self.ipvs_timeout("service-tcpfin-timeout"),
            udp_timeout: self.ipvs_timeout("service-udp-timeout"),
        }
    }

    /// The items of a list without blank ones.
    fn items(&self, name: &str) -> Vec<&str> {
        let mut items = self.given.list(name);
        items.retain(|item| !item.is_empty());
        items
    }

    fn cidrs(&mut self, name: &str) -> Vec<IpNet> {
        let mut cidrs = Vec::new();
        let mut wrong = Vec::new();
        for item in self.items(name) {
            match item.parse::<IpNet>() {
                Ok(cidr) => cidrs.push(cidr.trunc()),
                Err(_) => wrong.push(format!("--{name}: {item:?} is no CIDR; write for example 10.0.0.0/8")),
            }
        }
        wrong.into_iter().for_each(|text| self.meaning(text));
        cidrs
    }

    /// CIDRs whose family must not be switched off. kube-router's default of `--enable-ipv6` is
    /// false; an IPv6 range given without that flag is taken as meant.
    fn ranges(&mut self, name: &str) -> Vec<IpNet> {
        let cidrs = self.cidrs(name);
        for (family, is_ipv6) in [("ipv4", false), ("ipv6", true)] {
            let switch = format!("enable-{family}");
            if self.given.is_explicit(&switch)
                && !self.switch(&switch)
                && let Some(cidr) = cidrs.iter().find(|cidr| matches!(cidr, IpNet::V6(_)) == is_ipv6)
            {
                self.meaning(format!("--{name}: {cidr} contradicts --{switch}=false; remove one of them"));
            }
        }
        cidrs
    }

    fn cluster_ip_ranges(&mut self) -> Vec<IpNet> {
        const NAME: &str = "service-cluster-ip-range";
        let off = |name| self.given.is_explicit(name) && !self.switch(name);
        if off("enable-ipv4") && off("enable-ipv6") {
            self.meaning("--enable-ipv4=false and --enable-ipv6=false: one family must stay");
        }
        if !self.given.is_explicit(NAME) {
            // The default is IPv4; without IPv4 it says nothing.
            return if self.switch("enable-ipv4") { self.cidrs(NAME) } else { Vec::new() };
        }
        let count = self.items(NAME).len();
        if count == 0 || count > 2 {
            self.meaning(format!("--{NAME}: {count} CIDRs; give one, or one per family"));
        }
        self.ranges(NAME)
    }

    fn node_port_range(&mut self) -> RangeInclusive<u16> {
        let text = self.given.text("service-node-port-range");
        let ends = text.split_once(['-', ':']).and_then(|(first, last)| {
            Some((first.trim().parse::<u16>().ok()?, last.trim().parse::<u16>().ok()?))
        });
        match ends {
            Some((first, last)) if first < last && first > 0 => first..=last,
            _ => {
                self.meaning(format!(
                    "--service-node-port-range={text}: write two ports, the lower first, for example 30000-32767"
                ));
                30000..=32767
            }
        }
    }

    /// Whole seconds; the kernel multiplies by its tick rate (at most 1000) within a signed 32-bit
    /// number (`ip_vs_set_timeout` in net/netfilter/ipvs/ip_vs_ctl.c).
    fn ipvs_timeout(&mut self, name: &str) -> u32 {
        const MAX: i64 = i32::MAX as i64 / 1000;
        let Some(value) = self.duration(name) else { return 0 };
        let seconds = value.nanoseconds() / 1_000_000_000;
        if value.nanoseconds() < 0 || seconds > MAX || (seconds == 0 && value.nanoseconds() > 0) {
            self.meaning(format!(
                "--{name}={value}: write 0s to leave the kernel's, or whole seconds from 1s to {MAX}s"
            ));
        }
        u32::try_from(seconds).unwrap_or_default()
    }

    /// Network policy; `services` are the proxy's choices, of which some tell where Services are.
    fn policy(&mut self, services: &Settings, has_proxy: bool) -> netpol::Settings {
        let text = self.given.text("netpol-unknown-pods").to_owned();
        let unknown_pods = match text.as_str() {
            "deny" => UnknownPods::Deny,
            "allow" => UnknownPods::Allow,
            _ => {
                self.meaning(format!("--netpol-unknown-pods={text}: write deny or allow"));
                UnknownPods::Deny
            }
        };
        if unknown_pods == UnknownPods::Allow && self.switch("netpol-default-deny") {
            self.meaning(
                "--netpol-default-deny=true contradicts --netpol-unknown-pods=allow: the one closes pods until their \
                 policies are known, the other opens them; remove one of them",
            );
        }
        netpol::Settings {
            node_name: services.node_name.clone(),
            audit_period: self.period("iptables-sync-period"),
            unknown_pods,
            services: if has_proxy {
                netpol::Services::Own { guarded: services.firewall }
            } else {
                netpol::Services::Foreign {
                    cluster: services.cluster_ip_ranges.clone(),
                    external: services.external_ip_ranges.clone(),
                    load_balancer: services.load_balancer_ranges.clone(),
                    node_ports: services.node_port_range.clone(),
                }
            },
        }
    }
}
