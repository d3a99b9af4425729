use std::collections::BTreeSet;

use super::flags::{FLAGS, find};
use super::*;

fn environment() -> Environment {
    Environment { host_name: Some("Worker-1".to_owned()), ..Environment::default() }
}

fn parse_line(line: &str) -> Result<Command, Mistakes> {
    parse(line.split_whitespace().map(OsString::from).collect(), &environment())
}

fn run(line: &str) -> Config {
    match parse_line(line) {
        Ok(Command::Run(config)) => *config,
        other => panic!("{line:?} gave {other:?}"),
    }
}

fn settings(line: &str) -> Settings {
    run(line).proxy.unwrap()
}

fn refused(line: &str) -> (u8, String) {
    match parse_line(line) {
        Err(mistakes) => (mistakes.exit_code(), mistakes.to_string()),
        other => panic!("{line:?} gave {other:?}"),
    }
}

const U32: Kind = Kind::Number(u32::MAX as u64);
const U16: Kind = Kind::Number(u16::MAX as u64);

/// kube-router 2.11's flags with their kinds and defaults.
const KUBE_ROUTER: &[(&str, Kind, &str)] = &[
    ("cache-sync-timeout", Kind::Duration, "1m0s"),
    ("cleanup-config", Kind::Switch, "false"),
    ("enable-pprof", Kind::Switch, "false"),
    ("health-addr", Kind::Text, ""),
    ("health-port", U16, "20244"),
    ("hostname-override", Kind::Text, ""),
    ("kubeconfig", Kind::Text, ""),
    ("master", Kind::Text, ""),
    ("metrics-addr", Kind::Text, ""),
    ("metrics-path", Kind::Text, "/metrics"),
    ("metrics-port", U16, "0"),
    ("v", Kind::Text, "0"),
    ("run-router", Kind::Switch, "true"),
    ("run-firewall", Kind::Switch, "true"),
    ("run-service-proxy", Kind::Switch, "true"),
    ("run-loadbalancer", Kind::Switch, "false"),
    ("enable-ipv4", Kind::Switch, "true"),
    ("enable-ipv6", Kind::Switch, "false"),
    ("excluded-cidrs", Kind::List, ""),
    ("hairpin-mode", Kind::Switch, "false"),
    ("ipvs-graceful-period", Kind::Duration, "30s"),
    ("ipvs-graceful-termination", Kind::Switch, "false"),
    ("ipvs-permit-all", Kind::Switch, "true"),
    ("ipvs-sync-period", Kind::Duration, "5m0s"),
    ("masquerade-all", Kind::Switch, "false"),
    ("nodeport-bindon-all-ip", Kind::Switch, "false"),
    ("runtime-endpoint", Kind::Text, ""),
    ("service-tcp-timeout", Kind::Duration, "0s"),
    ("service-tcpfin-timeout", Kind::Duration, "0s"),
    ("service-udp-timeout", Kind::Duration, "0s"),
    ("strict-external-ip-validation", Kind::Switch, "true"),
    ("service-external-ip-range", Kind::List, ""),
    ("iptables-sync-period", Kind::Duration, "5m0s"),
    ("netpol-default-deny", Kind::Switch, "false"),
    ("service-cluster-ip-range", Kind::List, "10.96.0.0/12"),
    ("service-node-port-range", Kind::Text, "30000-32767"),
    ("use-nftables-for-netpol", Kind::Switch, "false"),
    ("advertise-cluster-ip", Kind::Switch, "false"),
    ("advertise-external-ip", Kind::Switch, "false"),
    ("advertise-loadbalancer-ip", Kind::Switch, "false"),
    ("advertise-pod-cidr", Kind::Switch, "true"),
    ("auto-mtu", Kind::Switch, "true"),
    ("bfd-desired-min-tx-interval", U32, "1000"),
    ("bfd-detection-multiplier", U32, "3"),
    ("bfd-port", U32, "3784"),
    ("bfd-required-min-rx-interval", U32, "1000"),
    ("enable-bfd", Kind::Switch, "false"),
    ("bgp-graceful-restart", Kind::Switch, "false"),
    ("bgp-graceful-restart-deferral-time", Kind::Duration, "6m0s"),
    ("bgp-graceful-restart-time", Kind::Duration, "1m30s"),
    ("bgp-holdtime", Kind::Duration, "1m30s"),
    ("bgp-port", U32, "179"),
    ("cluster-asn", U32, "0"),
    ("disable-source-dest-check", Kind::Switch, "true"),
    ("enable-cni", Kind::Switch, "true"),
    ("enable-ibgp", Kind::Switch, "true"),
    ("enable-overlay", Kind::Switch, "true"),
    ("enable-pod-egress", Kind::Switch, "true"),
    ("gobgp-admin-address", Kind::Text, "127.0.0.1"),
    ("gobgp-admin-port", U16, "50051"),
    ("injected-routes-sync-period", Kind::Duration, "1m0s"),
    ("nodes-full-mesh", Kind::Switch, "true"),
    ("overlay-encap", Kind::Text, "ipip"),
    ("overlay-encap-port", U16, "5555"),
    ("overlay-type", Kind::Text, "subnet"),
    ("override-nexthop", Kind::Switch, "false"),
    ("peer-router-asns", Kind::List, ""),
    ("peer-router-ips", Kind::List, ""),
    ("peer-router-multihop-ttl", Kind::Number(255), "0"),
    ("peer-router-passwords", Kind::List, ""),
    ("peer-router-passwords-file", Kind::Text, ""),
    ("peer-router-ports", Kind::List, ""),
    ("router-id", Kind::Text, ""),
    ("routes-sync-period", Kind::Duration, "5m0s"),
    ("loadbalancer-default-class", Kind::Switch, "true"),
    ("loadbalancer-ip-range", Kind::List, ""),
    ("loadbalancer-sync-period", Kind::Duration, "1m0s"),
];

/// Where we differ on purpose; each is in the flag's help text.
const OTHER_DEFAULTS: &[(&str, &str)] =
    &[("health-addr", "127.0.0.1"), ("ipvs-graceful-termination", "true")];

/// Flags that kube-router does not have.
const OURS: &[&str] = &[
    "advertise-range-specifics",
    "advertise-ranges",
    "bgp-next-hop-address",
    "bgp-source-address",
    "overlay-address",
    "pod-egress-exclude-cidrs",
    "netpol-unknown-pods",
    "cni-conf-dir",
    "cni-socket",
    "admin-socket",
    "dry-run",
    "log-format",
    "manifests",
];

#[test]
fn every_flag_of_kube_router_exists_with_its_kind_and_default() {
    for (name, kind, default) in KUBE_ROUTER {
        let flag = find(name).unwrap_or_else(|| panic!("--{name} is missing"));
        assert_eq!(flag.kind, *kind, "kind of --{name}");
        let wanted = OTHER_DEFAULTS.iter().find(|(other, _)| other == name).map_or(*default, |(_, d)| *d);
        assert_eq!(flag.default, wanted, "default of --{name}");
        if wanted != *default {
            assert!(flag.help.contains("kube-router"), "--{name} does not say that its default differs");
        }
    }
    let known: BTreeSet<&str> =
        KUBE_ROUTER.iter().map(|(name, ..)| *name).chain(OURS.iter().copied()).collect();
    let ours: BTreeSet<&str> = FLAGS.iter().map(|flag| flag.name).collect();
    assert_eq!(known, ours);
    assert_eq!(FLAGS.len(), ours.len(), "a flag is listed twice");
}

#[test]
fn every_default_may_be_restated() {
    for flag in FLAGS {
        let restated = format!("--{}={}", flag.name, flag.default);
        if flag.name == "service-cluster-ip-range" {
            continue; // Said, it stands for all ranges: tested below.
        }
        if ["manifests", "kubeconfig", "master", "hostname-override"].contains(&flag.name) {
            run(&restated); // An empty text means unset.
            continue;
        }
        // That a flag without effect was written is told.
        let without_notices = |line: &str| Config { notices: Vec::new(), ..run(line) };
        assert_eq!(without_notices(&restated), without_notices(""), "{restated}");
    }
}

#[test]
fn every_typed_flag_is_checked_and_named() {
    for flag in FLAGS {
        let bad = match flag.kind {
            Kind::Switch => "maybe",
            Kind::Duration => "5",
            Kind::Number(_) => "-1",
            Kind::Text | Kind::List => continue,
        };
        let (code, text) = refused(&format!("--{}={bad}", flag.name));
        assert_eq!(code, 2, "{text}");
        assert!(text.contains(&format!("--{}={bad}", flag.name)), "{text}");
        if let Kind::Number(max) = flag.kind {
            let (code, text) = refused(&format!("--{}={}", flag.name, max + 1));
            assert_eq!((code, text.contains(flag.name)), (2, true), "{text}");
        }
    }
}

#[test]
fn defaults_of_the_service_proxy() {
    let config = run("");
    assert_eq!(&*config.node_name, "worker-1");
    assert_eq!(config.health, Some("127.0.0.1:20244".parse().unwrap()));
    assert_eq!(config.metrics, None);
    assert_eq!(config.log, Log { json: false, level: 0 });
    assert_eq!(config.source, Source::Api { kubeconfig: None, master: None });
    assert_eq!(config.cache_sync_timeout, Duration::from_secs(60));
    assert_eq!(
        config.proxy.unwrap(),
        Settings {
            node_name: "worker-1".into(),
            audit_period: Duration::from_secs(300),
            graceful_period: Some(Duration::from_secs(30)),
            hairpin_all: false,
            masquerade_all: false,
            node_port_on_all_addresses: false,
            firewall: true,
            excluded_cidrs: vec![],
            strict_external_ips: true,
            external_ip_ranges: vec![],
            load_balancer_ranges: vec![],
            whole_ranges: vec![],
            cluster_ip_ranges: vec!["10.96.0.0/12".parse().unwrap()],
            cluster_ip_ranges_given: false,
            node_port_range: 30000..=32767,
            tcp_timeout: 0,
            tcp_fin_timeout: 0,
            udp_timeout: 0,
        }
    );
    assert!(config.routes.is_some() && config.network.is_some());
    assert_eq!(config.notices, Vec::<String>::new());
    let config = run("--manifests=/x");
    assert_eq!((config.routes, config.network), (None, None));
    assert_eq!(
        config.notices,
        [
            "with --manifests routes and BGP are off unless --run-router=true; running the service proxy and network \
             policy only"
        ]
    );
    assert!(run("--manifests=/x --run-router").routes.is_some());
    for line in ["--run-router=false", "--manifests=/x --run-router=false"] {
        let config = run(line);
        assert_eq!((config.routes, config.notices), (None, Vec::<String>::new()), "{line}");
    }
}

#[test]
fn every_flag_of_the_service_proxy_arrives() {
    let line = "--excluded-cidrs=192.0.2.0/24 --hairpin-mode --ipvs-graceful-period=1m30s --ipvs-permit-all=false \
        --ipvs-sync-period 1m --masquerade-all=true --nodeport-bindon-all-ip=T --service-tcp-timeout=15m \
        --service-tcpfin-timeout=2m --service-udp-timeout=1m0.5s --strict-external-ip-validation=0 \
        --service-external-ip-range=198.51.100.0/24,2001:db8::/32 --loadbalancer-ip-range=203.0.113.9/24 \
        --service-cluster-ip-range=10.0.0.0/16 --service-cluster-ip-range=fd00::/112 \
        --service-node-port-range=20000:20010 --hostname-override=Node-A --runtime-endpoint=unix:///run/x.sock";
    assert_eq!(
        settings(line),
        Settings {
            node_name: "Node-A".into(),
            audit_period: Duration::from_secs(60),
            graceful_period: Some(Duration::from_secs(90)),
            hairpin_all: true,
            masquerade_all: true,
            node_port_on_all_addresses: true,
            firewall: false,
            excluded_cidrs: vec!["192.0.2.0/24".parse().unwrap()],
            strict_external_ips: false,
            external_ip_ranges: vec!["198.51.100.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
            load_balancer_ranges: vec!["203.0.113.0/24".parse().unwrap()],
            whole_ranges: vec![],
            cluster_ip_ranges: vec!["10.0.0.0/16".parse().unwrap(), "fd00::/112".parse().unwrap()],
            cluster_ip_ranges_given: true,
            node_port_range: 20000..=20010,
            tcp_timeout: 900,
            tcp_fin_timeout: 120,
            udp_timeout: 60,
        }
    );
    assert_eq!(settings("--ipvs-graceful-termination=false").graceful_period, None);
    assert_eq!(settings("--ipvs-graceful-period=0s").graceful_period, None);
    assert_eq!(settings("--enable-ipv4=false --enable-ipv6").cluster_ip_ranges, vec![]);
}

#[test]
fn every_flag_of_the_process_arrives() {
    let config = run(
        "--kubeconfig=/etc/k --master=https://[2001:db8::1]:6443 --health-addr= --health-port=1 \
        --metrics-addr=::1 --metrics-port=8080 --metrics-path=/m --log-format=json -v 3 --cache-sync-timeout=2s \
        --admin-socket=/run/x/y.sock",
    );
    assert_eq!(
        config.source,
        Source::Api { kubeconfig: Some("/etc/k".into()), master: Some("https://[2001:db8::1]:6443".into()) }
    );
    assert_eq!(config.health, Some("[::]:1".parse().unwrap()));
    assert_eq!(
        config.metrics,
        Some(Metrics { address: "[::1]:8080".parse().unwrap(), path: "/m".to_owned() })
    );
    assert_eq!(config.log, Log { json: true, level: 3 });
    assert_eq!(config.cache_sync_timeout, Duration::from_secs(2));
    assert_eq!(config.admin_socket, PathBuf::from("/run/x/y.sock"));
    assert_eq!(run("--manifests=/m").source, Source::Manifests("/m".into()));
    assert_eq!(run("--health-port=0").health, None);
}

#[test]
fn the_node_is_named_by_flag_then_variable_then_host() {
    let name = |line: &str, variable: Option<&str>, host: Option<&str>| {
        let environment = Environment {
            node_name: variable.map(str::to_owned),
            host_name: host.map(str::to_owned),
            ..Environment::default()
        };
        match parse(line.split_whitespace().map(OsString::from).collect(), &environment) {
            Ok(Command::Run(config)) => Ok(config.node_name.to_string()),
            Err(mistakes) => Err(mistakes.exit_code()),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(name("--hostname-override=F", Some("v"), Some("h")), Ok("F".into()));
    assert_eq!(name("", Some("v"), Some("h")), Ok("v".into()));
    assert_eq!(name("", Some(""), Some("H.example")), Ok("h.example".into()));
    assert_eq!(name("", None, None), Err(1));
}

#[test]
fn booleans_take_the_words_of_go() {
    for (word, value) in [
        ("1", true),
        ("t", true),
        ("T", true),
        ("true", true),
        ("TRUE", true),
        ("True", true),
        ("0", false),
        ("f", false),
        ("F", false),
        ("false", false),
        ("FALSE", false),
        ("False", false),
    ] {
        assert_eq!(settings(&format!("--masquerade-all={word}")).masquerade_all, value, "{word}");
    }
    assert!(settings("--masquerade-all").masquerade_all);
    for word in ["yes", "on", "tRUE", "2", "", "'true'"] {
        assert_eq!(refused(&format!("--masquerade-all={word}")).0, 2, "{word:?}");
    }
}

#[test]
fn repetition_and_short_forms_follow_pflag() {
    assert_eq!(run("--v=1 -v=2 -v3 -v 4").log.level, 4);
    assert_eq!(run("-v=2").log.level, 2);
    assert_eq!(run("-v3").log.level, 3);
    assert_eq!(
        settings("--ipvs-sync-period=1m --ipvs-sync-period=2m").audit_period,
        Duration::from_secs(120)
    );
    assert!(!settings("--masquerade-all --masquerade-all=false").masquerade_all);
    let ranges = |line: &str| settings(line).external_ip_ranges.len();
    assert_eq!(ranges("--service-external-ip-range="), 0);
    assert_eq!(
        ranges("--service-external-ip-range=10.0.0.0/8,11.0.0.0/8 --service-external-ip-range 12.0.0.0/8"),
        3
    );
    assert_eq!(ranges("--service-external-ip-range=\"10.0.0.0/8\",,11.0.0.0/8,"), 2);
    // The first use replaces the default.
    assert_eq!(settings("--service-cluster-ip-range=fd00::/112").cluster_ip_ranges.len(), 1);
}

#[test]
fn mistakes_come_together() {
    let (code, text) = refused(
        "--ipvs-sync-period=0s --excluded-cidrs=10.0.0.0/33,x --metrics-path=m --service-node-port-range=9-1 \
         --service-tcp-timeout=-1s --overlay-type=none",
    );
    assert_eq!(code, 1);
    for part in [
        "--ipvs-sync-period=0s",
        "\"10.0.0.0/33\"",
        "\"x\"",
        "--metrics-path=m",
        "--service-node-port-range=9-1",
        "--service-tcp-timeout=-1s",
        "--overlay-type=none",
    ] {
        assert!(text.contains(part), "{part} is missing in:\n{text}");
    }
    let (code, text) = refused("--ipvs-sync-period=-5m --masquerade-all=maybe");
    assert_eq!(code, 2);
    assert!(text.contains("--ipvs-sync-period=-5m0s") && text.contains("--masquerade-all=maybe"), "{text}");
}

#[test]
fn values_out_of_range_are_refused() {
    for line in [
        "--ipvs-sync-period=-1s",
        "--iptables-sync-period=0",
        "--routes-sync-period=0s",
        "--injected-routes-sync-period=-1m",
        "--loadbalancer-sync-period=0s",
        "--cache-sync-timeout=0s",
        "--ipvs-graceful-period=-1s",
        "--service-udp-timeout=500ms",
        "--service-tcp-timeout=2147484s",
        "--service-node-port-range=30000",
        "--service-node-port-range=5-5",
        "--service-node-port-range=1-70000",
        "--service-cluster-ip-range=",
        "--service-cluster-ip-range=10.0.0.0/8,11.0.0.0/8,12.0.0.0/8",
        "--service-cluster-ip-range=10.0.0.0",
        "--service-cluster-ip-range=fd00::/112 --enable-ipv6=false",
        "--service-cluster-ip-range=10.0.0.0/16 --enable-ipv4=false --enable-ipv6",
        "--loadbalancer-ip-range=10.0.0.0/16 --enable-ipv4=false",
        "--enable-ipv4=false --enable-ipv6=false",
        "--bgp-holdtime=2s",
        "--bgp-holdtime=65537s",
        "--bgp-port=0",
        "--bgp-port=65536",
        "--overlay-encap=gre",
        "--overlay-encap-port=1023",
        "--overlay-type=",
        "--router-id=10.0.0",
        "--cluster-asn=1",
        "--cluster-asn=64511",
        "--cluster-asn=65536",
        "--cluster-asn=4294967295",
        "--bgp-graceful-restart --bgp-graceful-restart-time=4096s",
        "--bgp-graceful-restart --bgp-graceful-restart-deferral-time=0s",
        "--bgp-graceful-restart --bgp-graceful-restart-deferral-time=18h1s",
        "--health-addr=localhost",
        "--metrics-addr=300.0.0.1 --metrics-port=1",
        "--metrics-port=20244",
        "--admin-socket=x.sock",
        "--admin-socket=/",
        "--master=https://%APISERVER%",
        "--master=ftp://x",
        "--manifests=/m --kubeconfig=/k",
        "--dry-run",
        "--enable-pprof",
    ] {
        let (code, text) = refused(line);
        assert_eq!(code, 1, "{line}: {text}");
    }
    for line in [
        "--bgp-holdtime=3s",
        "--bgp-holdtime=65536s",
        "--cluster-asn=64512",
        "--cluster-asn=65535",
        "--cluster-asn=4200000000",
        "--cluster-asn=4294967294",
        "--router-id=generate",
        "--router-id=10.0.0.1",
        "--bgp-graceful-restart-time=2h",
        "--bfd-port=0",
        "--service-cluster-ip-range=fd00::/112",
        "--service-tcp-timeout=2147483s",
        "--overlay-encap=fou",
        "--overlay-type=full",
        "--health-addr=[::1]",
        "--master=10.0.0.1:6443",
        "--v=-1",
    ] {
        run(line);
    }
}

#[test]
fn lists_of_peers_are_checked() {
    const OFF: &str = "--run-router=false --peer-router-ips=192.0.2.1,2001:db8::1";
    run(&format!("{OFF} --peer-router-asns=64512,65000"));
    run(&format!("{OFF} --peer-router-asns=64512 --peer-router-asns=65000 --peer-router-passwords=cHc=,"));
    run(&format!("{OFF} --peer-router-asns=1,2 --peer-router-ports=179,1179"));
    for asn in [1, 23455, 23457, 63999, 64512, 65534, 131_072, 4_199_999_999, 4_200_000_000, 4_294_967_294u32]
    {
        run(&format!("{OFF} --peer-router-asns=1,{asn}"));
    }
    for asn in [0, 23456, 64000, 64511, 65535, 131_071, 4_294_967_295u32] {
        assert_eq!(refused(&format!("{OFF} --peer-router-asns=1,{asn}")).0, 1, "{asn}");
    }
    for rest in [
        "",
        "--peer-router-asns=1",
        "--peer-router-asns=1,2,3",
        "--peer-router-asns=1,2 --peer-router-ports=1",
        "--peer-router-asns=1,2 --peer-router-ports=0,1",
        "--peer-router-asns=1,2 --bfd-port=0",
        "--peer-router-asns=1,2 --bfd-detection-multiplier=256",
        "--peer-router-asns=1,2 --peer-router-passwords=cHc=",
        "--peer-router-asns=1,2 --bfd-desired-min-tx-interval=4294968",
    ] {
        assert_eq!(refused(&format!("{OFF} {rest}")).0, 1, "{rest}");
    }
    for line in ["--peer-router-ips=x", "--peer-router-asns=x", "--peer-router-ports=x"] {
        assert_eq!(refused(&format!("--run-router=false {line}")).0, 2, "{line}");
    }
}

#[test]
fn secrets_are_never_printed() {
    for line in [
        "--peer-router-passwords=hunter2!,hunter2",
        "--peer-router-passwords hunter2x hunter2y",
        "--run-router=false --peer-router-passwords=hunter2 --ipvs-sync-period=0s",
    ] {
        let (_, text) = refused(line);
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[test]
fn absent_rooms_are_refused_only_when_asked_for() {
    for line in [
        "--run-loadbalancer",
        "--advertise-cluster-ip=true --manifests=/x",
        "--advertise-external-ip --manifests=/x",
        "--advertise-loadbalancer-ip=1 --manifests=/x",
        "--enable-bfd --manifests=/x",
        "--peer-router-ips=192.0.2.1 --peer-router-asns=64512 --manifests=/x",
        "--peer-router-passwords-file=/x --manifests=/x",
        "--run-service-proxy=false --run-firewall=false --manifests=/x",
    ] {
        let (code, text) = refused(line);
        assert_eq!(code, 1, "{line}: {text}");
        let flag = line.split(['=', ' ']).next().unwrap();
        assert!(text.contains(flag), "{line}: {text}");
    }
    for line in [
        "--run-router=false --run-firewall=false --run-loadbalancer=false",
        "--advertise-cluster-ip",
        "--manifests=/x --advertise-cluster-ip=false",
        "--manifests=/x --advertise-pod-cidr=true",
        "--manifests=/x --bgp-holdtime=90s",
        "--manifests=/x --peer-router-ips=",
        "--run-router=false --advertise-cluster-ip=true",
        "--run-firewall=false --netpol-default-deny=true --use-nftables-for-netpol",
    ] {
        let config = run(line);
        assert!(!config.notices.iter().any(|notice| notice.contains("no effect")), "{line}: {config:?}");
    }
    let config =
        run("--manifests=/x --bgp-graceful-restart=true --cluster-asn=64513 --iptables-sync-period=1m");
    assert_eq!(
        config.notices[1..],
        [
            "no effect, because routes and BGP is off with --manifests unless --run-router=true: --bgp-graceful-restart \
             --cluster-asn"
        ]
    );
    let idle = run("--run-service-proxy=false --run-router=false --run-firewall=false");
    assert_eq!((idle.proxy, idle.netpol), (None, None));
    let nft = run("--run-router=false --use-nftables-for-netpol");
    assert!(nft.notices[0].contains("has no effect"), "{nft:?}");
}

#[test]
fn every_flag_of_bgp_arrives() {
    use std::net::Ipv4Addr;

    use ferroute_bgp::bfd::Timers;
    use ferroute_bgp::message::{Asn, RouterId};
    use ferroute_bgp::transport::Password;
    use routes::settings::{Advertise, External, ExternalPeer, Restart, RouterIdChoice};

    let routing = |line: &str| run(&format!("--run-router {line}")).routes.unwrap();
    let plain = routing("");
    let off = Advertise {
        cluster_ips: false,
        external_ips: false,
        load_balancer_ips: false,
        pod_cidrs: true,
        ranges: false,
        specifics: false,
    };
    assert_eq!(plain.node_name, Arc::from("worker-1"));
    assert_eq!((plain.advertise, plain.mesh, plain.port), (off, true, 179));
    assert_eq!((plain.cluster_asn, plain.restart), (Some(Asn(64512)), None));
    assert_eq!(
        (plain.router_id, plain.audit_period),
        (RouterIdChoice::NodeAddress, Duration::from_secs(300))
    );
    let nobody = External {
        peers: Vec::new(),
        passwords_file: None,
        hold_time: 90,
        multihop: None,
        override_next_hop: false,
    };
    assert_eq!(plain.external, nobody);
    assert_eq!(run("").routes, Some(routing("")));
    assert_eq!(run("--run-router=false --advertise-cluster-ip").routes, None);

    let all = routing(
        "--advertise-cluster-ip --advertise-external-ip --advertise-loadbalancer-ip --advertise-pod-cidr=false \
         --bgp-graceful-restart --bgp-graceful-restart-time=2m --bgp-graceful-restart-deferral-time=5s --bgp-port=1790 \
         --bgp-holdtime=9s --cluster-asn=4200000000 --enable-ibgp=false --override-nexthop --router-id=192.0.2.77 \
         --peer-router-ips=192.0.2.1,2001:db8::1 --peer-router-asns=65001,65002 --peer-router-ports=179,1179 \
         --peer-router-passwords=,c2VjcmV0 --peer-router-passwords-file=/etc/secrets --peer-router-multihop-ttl=3 \
         --routes-sync-period=1m",
    );
    let on = Advertise {
        cluster_ips: true,
        external_ips: true,
        load_balancer_ips: true,
        pod_cidrs: false,
        ranges: false,
        specifics: false,
    };
    assert_eq!((all.advertise, all.mesh, all.port), (on, false, 1790));
    assert_eq!(all.restart, Some(Restart { time: 120, deferral: Duration::from_secs(5) }));
    assert_eq!((all.cluster_asn, all.audit_period), (Some(Asn(4_200_000_000)), Duration::from_secs(60)));
    assert_eq!(all.router_id, RouterIdChoice::Given(RouterId(Ipv4Addr::new(192, 0, 2, 77))));
    let peer = |address: &str, asn, port, password: Option<&str>| ExternalPeer {
        address: address.parse().unwrap(),
        asn: Asn(asn),
        port,
        password: password.map(|text| Password::new(text.as_bytes()).unwrap()),
        secret: None,
        source: None,
        bfd: None,
    };
    assert_eq!(
        all.external,
        External {
            peers: vec![
                peer("192.0.2.1", 65001, 179, None),
                peer("2001:db8::1", 65002, 1179, Some("secret"))
            ],
            passwords_file: Some("/etc/secrets".into()),
            hold_time: 9,
            multihop: Some(3),
            override_next_hop: true,
        }
    );
    assert!(!format!("{all:?}").contains("secret\""), "a secret shows");
    let ranges =
        "--advertise-ranges --service-external-ip-range=203.0.113.0/25 --loadbalancer-ip-range=2001:db8::/64";
    let whole = |more: &str| {
        let settings = routing(&format!("{ranges} {more}"));
        let list =
            settings.services.whole_ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        (list, settings.advertise.ranges, settings.advertise.specifics)
    };
    assert_eq!(whole(""), (String::new(), true, false));
    assert_eq!(whole("--advertise-external-ip"), ("203.0.113.0/25".to_owned(), true, false));
    let both = "--advertise-external-ip --advertise-loadbalancer-ip --advertise-range-specifics";
    assert_eq!(whole(both), ("203.0.113.0/25 2001:db8::/64".to_owned(), true, true));
    assert!(refused("--advertise-range-specifics").1.contains("without --advertise-ranges"));
    assert_eq!(routing("--nodes-full-mesh=false").cluster_asn, None);
    assert_eq!(routing("--router-id=generate").router_id, RouterIdChoice::Generated);
    assert_eq!(routing("--bgp-holdtime=65536s").external.hold_time, 65535);
    assert_eq!(routing("--peer-router-multihop-ttl=1").external.multihop, None);
    let config = run("--run-router --disable-source-dest-check --gobgp-admin-port=0");
    assert!(config.network.unwrap().disable_source_check);
    assert_eq!(
        config.notices,
        ["no effect, because `ferroute bgp` takes the place of GoBGP's server: --gobgp-admin-port"]
    );
    assert_eq!(refused("--run-router --router-id=0.0.0.0").0, 1);

    let peers = "--peer-router-ips=192.0.2.1 --peer-router-asns=65001 --enable-bfd";
    let timers = |transmit, receive, times| {
        Timers::new(Duration::from_millis(transmit), Duration::from_millis(receive), times).unwrap()
    };
    assert_eq!(routing(peers).external.peers[0].bfd, Some(timers(1000, 1000, 3)));
    let fast =
        "--bfd-desired-min-tx-interval=100 --bfd-required-min-rx-interval=50 --bfd-detection-multiplier=5";
    assert_eq!(routing(&format!("{peers} {fast}")).external.peers[0].bfd, Some(timers(100, 50, 5)));
    assert_eq!(routing("--enable-bfd").external.peers, []);
    let (code, text) = refused(&format!("--run-router {peers} --bfd-port=3785"));
    assert!(code == 1 && text.contains("port 3785"), "{text}");
}

#[test]
fn every_flag_of_the_pod_network_arrives() {
    use crate::host::tunnel::Encapsulation;
    use network::node_address::{Method, Methods};
    use network::settings::{Reach, Settings};

    let network = |line: &str| run(&format!("--run-router {line}")).network.unwrap();
    let plain = Settings {
        node_name: "worker-1".into(),
        audit_period: Duration::from_secs(60),
        overlay: Reach::Subnet,
        encapsulation: Encapsulation::Plain,
        egress: true,
        egress_exclude: Vec::new(),
        auto_mtu: true,
        cni_file: Some("/etc/cni/net.d/10-kuberouter.conf".into()),
        addresses: Methods::default(),
        disable_source_check: true,
    };
    assert_eq!(network(""), plain);
    assert_eq!(run("--run-router=false").network, None);
    let line = "--injected-routes-sync-period=2m --overlay-type=full --overlay-encap=fou --overlay-encap-port=6666 \
        --enable-pod-egress=false --pod-egress-exclude-cidrs=192.0.2.7/24,2001:db8::/32 --auto-mtu=false \
        --enable-cni=false --bgp-next-hop-address=cidr=192.0.2.0/24 --bgp-source-address=first-found";
    let next_hop: Method = "cidr=192.0.2.0/24".parse().unwrap();
    let addresses = Methods { source: Method::FirstFound, next_hop: next_hop.clone(), overlay: next_hop };
    let other = Settings {
        audit_period: Duration::from_secs(120),
        overlay: Reach::Full,
        encapsulation: Encapsulation::Gue(6666),
        egress: false,
        egress_exclude: vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
        auto_mtu: false,
        cni_file: None,
        addresses: addresses.clone(),
        ..plain.clone()
    };
    assert_eq!(network(line), other);
    assert_eq!(run(&format!("--run-router {line}")).routes.unwrap().addresses, addresses);
    assert_eq!(network("--enable-overlay=false --overlay-type=full").overlay, Reach::Off);
    let end = network("--overlay-address=interface=ens.*").addresses;
    assert_eq!((end.overlay, end.next_hop), ("interface=ens.*".parse().unwrap(), Method::default()));

    let file = |path: &str| {
        let environment = Environment { cni_conf_file: Some(path.to_owned()), ..environment() };
        parse(vec!["--run-router".into()], &environment)
    };
    match file("/etc/cni/net.d/10-x.conflist") {
        Ok(Command::Run(config)) => {
            assert_eq!(config.network.unwrap().cni_file, Some("/etc/cni/net.d/10-x.conflist".into()));
        }
        other => panic!("{other:?}"),
    }
    assert!(file("10-x.conflist").unwrap_err().to_string().contains("KUBE_ROUTER_CNI_CONF_FILE"));
    for (line, part) in [
        ("--overlay-type=none", "subnet or full"),
        ("--overlay-encap=vxlan", "ipip or fou"),
        ("--overlay-encap-port=80", "1024 to 65535"),
        ("--injected-routes-sync-period=0s", "longer than zero"),
        ("--pod-egress-exclude-cidrs=10.0.0.1.1", "no CIDR"),
        ("--bgp-next-hop-address=nearest", "kubernetes-internal-ip"),
    ] {
        let (code, text) = refused(line);
        assert!(code == 1 && text.contains(part), "{line}: {text}");
        assert_eq!(text.lines().count(), 1, "{line}: told once: {text}");
    }
}

#[test]
fn questions_about_bgp_are_read() {
    let asked = |line: &str| match parse_line(line) {
        Ok(Command::Bgp { what, peer, output, .. }) => (what, peer, output),
        other => panic!("{line}: {other:?}"),
    };
    assert_eq!(asked("bgp neighbors"), ("neighbors", None, Output::Text));
    assert_eq!(asked("bgp routes -o json"), ("routes", None, Output::Json));
    let peer = Some("fe80::1%eth0".to_owned());
    assert_eq!(asked("bgp --output=json received fe80::1%eth0"), ("received", peer, Output::Json));
    assert_eq!(asked("bgp advertised 192.0.2.1").0, "advertised");
    for line in [
        "bgp",
        "bgp sessions",
        "bgp routes 192.0.2.1",
        "bgp advertised",
        "bgp received router7",
        "bgp neighbors 192.0.2.1",
        "bgp routes --kubeconfig=/x",
        "bgp a b c",
    ] {
        assert_eq!(refused(line).0, 2, "{line}");
    }
}

#[test]
fn every_flag_of_network_policy_arrives() {
    use ferroute_policy::UnknownPods;
    let netpol = |line: &str| run(line).netpol.unwrap();
    assert_eq!(
        netpol(""),
        netpol::Settings {
            node_name: "worker-1".into(),
            audit_period: Duration::from_secs(300),
            unknown_pods: UnknownPods::Deny,
            services: netpol::Services::Own { guarded: true },
        }
    );
    assert_eq!(
        netpol(
            "--run-service-proxy=false --iptables-sync-period=1m --netpol-unknown-pods=allow \
             --service-cluster-ip-range=10.0.0.0/16 --service-external-ip-range=198.51.100.0/24 \
             --loadbalancer-ip-range=203.0.113.0/24 --service-node-port-range=20000-20010"
        ),
        netpol::Settings {
            node_name: "worker-1".into(),
            audit_period: Duration::from_secs(60),
            unknown_pods: UnknownPods::Allow,
            services: netpol::Services::Foreign {
                cluster: vec!["10.0.0.0/16".parse().unwrap()],
                external: vec!["198.51.100.0/24".parse().unwrap()],
                load_balancer: vec!["203.0.113.0/24".parse().unwrap()],
                node_ports: 20000..=20010,
            },
        }
    );
    assert_eq!(
        netpol("--netpol-default-deny --ipvs-permit-all=false").services,
        netpol::Services::Own { guarded: false }
    );
    assert_eq!(run("--run-firewall=false").netpol, None);
    for (line, part) in [
        ("--netpol-unknown-pods=open", "write deny or allow"),
        ("--netpol-default-deny --netpol-unknown-pods=allow", "contradicts"),
    ] {
        let (code, text) = refused(line);
        assert!(code == 1 && text.contains(part), "{line}: {text}");
    }
}

#[test]
fn explain_takes_two_ends() {
    match parse_line("explain -o json shop/cart --admin-socket=/run/x.sock shop/db:5432/tcp") {
        Ok(Command::Explain { socket, output, from, to }) => {
            assert_eq!((socket, output), (PathBuf::from("/run/x.sock"), Output::Json));
            assert_eq!((from.as_str(), to.as_str()), ("shop/cart", "shop/db:5432/tcp"));
        }
        other => panic!("{other:?}"),
    }
    for (line, part) in [
        ("explain", "FROM TO:PORT"),
        ("explain a/b", "FROM TO:PORT"),
        ("explain a/b c/d", "has no port"),
        ("explain a/b c/d:80 e/f:80", "FROM TO:PORT"),
        ("explain a/b c/d:80 --master=x", "--master"),
        ("explain a/b c/d:80 -o xml", "json"),
    ] {
        let (code, text) = refused(line);
        assert!(code == 2 && text.contains(part), "{line}: {text}");
    }
    assert!(matches!(parse_line("explain --help"), Ok(Command::Print(text)) if text.contains("PROTOCOL")));
}

#[test]
fn old_and_wrong_spellings_are_explained() {
    for (line, parts) in [
        ("-master=http://x", ["-master", "--master"]),
        ("-run-router=false -kubeconfig /x", ["--run-router", "--kubeconfig"]),
        ("--peer-router=1.2.3.4", ["--peer-router ", "--peer-router-ips"]),
        ("--peer-asn 5", ["--peer-asn ", "--peer-router-asns"]),
        ("--nodes-full-mesh-password=hunter2", ["--nodes-full-mesh-password", "remove"]),
        ("--run-network-policy-controller", ["--run-network-policy-controller", "--run-firewall"]),
        ("--run-router false", ["\"false\"", "--run-router=false"]),
        ("--masquerade-al", ["--masquerade-al", "--masquerade-all"]),
        ("stop", ["\"stop\"", "--flag=value"]),
        ("--v=1 status", ["\"status\"", "first word"]),
        ("--v=high", ["-v=high", "-v=2"]),
        ("--log-format=xml", ["--log-format=xml", "json"]),
        ("status --masquerade-all", ["--masquerade-all", ""]),
        ("status --output=yaml", ["--output=yaml", "json"]),
        ("--kubeconfig", ["--kubeconfig", "value"]),
    ] {
        let (code, text) = refused(line);
        assert_eq!(code, 2, "{line}: {text}");
        for part in parts {
            assert!(text.contains(part), "{line}: {part:?} is missing in: {text}");
        }
        assert!(!text.contains("hunter2"), "{text}");
    }
    for line in ["--cluster-cidr=10.0.0.0/8", "--config-sync-period=1m", "--cluster-cidr 10.0.0.0/8"] {
        let flag = line.split(['=', ' ']).next().unwrap();
        assert!(run(line).notices[0].starts_with(&format!("{flag} is deprecated")), "{line}");
    }
}

#[test]
fn commands_are_told_apart() {
    let socket = PathBuf::from("/run/ferroute/ferroute.sock");
    assert!(
        matches!(parse_line("status").unwrap(), Command::Status { socket: s, output: Output::Text } if s == socket)
    );
    assert!(matches!(parse_line("status -o json").unwrap(), Command::Status { output: Output::Json, .. }));
    assert!(matches!(
        parse_line("plan --manifests=/m --output json").unwrap(),
        Command::Plan { output: Output::Json, config } if config.source == Source::Manifests("/m".into())
    ));
    assert!(matches!(parse_line("--cleanup-config").unwrap(), Command::CleanUp { dry_run: false, .. }));
    assert!(matches!(
        parse_line("--cleanup-config --dry-run").unwrap(),
        Command::CleanUp { dry_run: true, .. }
    ));
    // A clean-up works with the flags of the DaemonSet it cleans up after.
    assert!(matches!(
        parse_line("--run-router=true --master=https://%APISERVER% --cleanup-config=true").unwrap(),
        Command::CleanUp { .. }
    ));
    assert_eq!(refused("plan --cleanup-config").0, 1);
    for (line, part) in [
        ("--help", "--ipvs-sync-period"),
        ("-h", "ferroute status"),
        ("--version", env!("CARGO_PKG_VERSION")),
        ("-V", "ferroute "),
        ("status --help", "--admin-socket"),
        ("plan -h", "--manifests"),
    ] {
        match parse_line(line).unwrap() {
            Command::Print(text) => assert!(text.contains(part), "{line}: {text}"),
            other => panic!("{other:?}"),
        }
    }
}

#[cfg(unix)]
#[test]
fn words_that_are_no_text_do_not_panic() {
    use std::os::unix::ffi::OsStringExt;
    for words in [vec![vec![0xff]], vec![b"--master".to_vec(), vec![0xfe]], vec![b"--v=\xff".to_vec()]] {
        let words = words.into_iter().map(OsString::from_vec).collect();
        assert!(parse(words, &environment()).is_err());
    }
}

proptest::proptest! {
    #[test]
    fn no_command_line_panics(words in proptest::collection::vec("-{0,2}[a-z]{0,3}(master|v|run-router|peer-router-ips|excluded-cidrs|health-addr)?=?\\PC{0,8}", 0..5)) {
        let _ = parse(words.into_iter().map(OsString::from).collect(), &environment());
    }
}

#[test]
fn the_cni_plugin_is_installed_and_uninstalled_by_name() {
    use crate::cni::install::Install;
    let install = |line: &str| match parse_line(line) {
        Ok(Command::CniInstall(install)) => install,
        other => panic!("{line:?} gave {other:?}"),
    };
    let (conf, bin) = (PathBuf::from("/etc/cni/net.d"), PathBuf::from("/opt/cni/bin"));
    let defaults =
        Install { conf_dir: Some(conf.clone()), bin_dir: bin.clone(), settings: Default::default() };
    assert_eq!(install("cni install"), defaults);
    let chosen = install(
        "cni install --conf-dir= --bin-dir=/b --cni-socket=/run/x.sock --timeout=9s --when-unavailable=allow",
    );
    assert_eq!((chosen.conf_dir, chosen.bin_dir), (None, PathBuf::from("/b")));
    let settings = serde_json::json!({"socket": "/run/x.sock", "timeout": "9s", "whenUnavailable": "allow"});
    assert_eq!(serde_json::Value::from(chosen.settings), settings);
    match parse_line("cni uninstall --conf-dir /c") {
        Ok(Command::CniUninstall { conf_dir, bin_dir }) => {
            assert_eq!((conf_dir, bin_dir), (PathBuf::from("/c"), bin));
        }
        other => panic!("{other:?}"),
    }
    for (line, part) in [
        ("cni remove", "cni uninstall"),
        ("cni install --timeout=5", "100ms"),
        ("cni install --when-unavailable=maybe", "deny"),
        ("cni install --bin-dir=relative", "absolute"),
        ("cni install --cni-socket=", "needs the daemon's socket"),
        ("cni install --master=x", "--master"),
        ("cni uninstall --timeout=5s", "--timeout"),
    ] {
        let (_, text) = refused(line);
        assert!(text.contains(part), "{line}: {text}");
    }
    match parse_line("cni install --help") {
        Ok(Command::Print(text)) => {
            for part in ["--conf-dir", "--bin-dir", "--cni-socket", "--when-unavailable"] {
                assert!(text.contains(part), "{text}");
            }
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_cni_socket_and_where_the_plugin_is_kept() {
    let cni = run("").cni;
    assert_eq!((cni.socket, cni.conf_dir), (Some(PathBuf::from("/run/ferroute/cni.sock")), None));
    let cni = run("--cni-socket=/x/y.sock --cni-conf-dir=/etc/cni/net.d").cni;
    assert_eq!(
        (cni.socket, cni.conf_dir),
        (Some(PathBuf::from("/x/y.sock")), Some(PathBuf::from("/etc/cni/net.d")))
    );
    assert_eq!(run("--cni-socket=").cni.socket, None);
    for (line, part) in [
        ("--cni-socket=relative", "absolute"),
        ("--cni-socket=/run/ferroute/ferroute.sock", "the same"),
        ("--cni-conf-dir=net.d", "absolute"),
        ("--cni-socket= --cni-conf-dir=/etc/cni/net.d", "needs --cni-socket"),
    ] {
        let (_, text) = refused(line);
        assert!(text.contains(part), "{line}: {text}");
    }
    let dir_of = |line: &str| match parse_line(line) {
        Ok(Command::CleanUp { cni_conf_dir, .. }) => cni_conf_dir,
        other => panic!("{other:?}"),
    };
    assert_eq!(dir_of("--cleanup-config"), PathBuf::from("/etc/cni/net.d"));
    assert_eq!(dir_of("--cleanup-config --cni-conf-dir=/c"), PathBuf::from("/c"));
}
