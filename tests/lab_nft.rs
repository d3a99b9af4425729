//! Hosts whose iptables is of the nft form, and hosts with rules in both forms.
//!
//! Needs a kernel that serves iptables-nft, which that of Debian's user-mode-linux does not:
//! `scripts/test --kernel uml-built lab_nft`. On such a kernel all other labs use that form too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::net::SocketAddr;

use ferroute_kit::assert::eventually;
use ferroute_kit::{Cluster, KernelSnapshot, Netns, Pod, PodSpec, Protocol, serial};
use lab::*;
use serde_json::{Value, json};

const FLAGS: [&str; 2] = ["--run-firewall=true", "--run-router=false"];
const PROGRAMS: [&str; 2] = ["iptables", "ip6tables"];

/// A node with the pods `a`, `b` and `c`, of which only `b` may reach `a`, itself or as the Service `web`.
struct Shop {
    lab: Lab,
    pods: Vec<Pod>,
}

impl Shop {
    fn build() -> Self {
        for program in PROGRAMS {
            let netns = Netns::new("forms").unwrap();
            for form in ["nft", "legacy"] {
                let works = netns.exec(
                    &format!("{program}-{form}"),
                    &["-A", "INPUT", "-m", "addrtype", "--dst-type", "LOCAL", "-j", "ACCEPT"],
                );
                assert!(
                    works.is_ok(),
                    "this kernel does not serve {program}-{form}: run scripts/test --kernel uml-built lab_nft"
                );
            }
        }
        let lab = Lab::without_daemons(Cluster::builder().nodes(1));
        put_namespace(&lab, "shop", json!({}));
        let pods: Vec<Pod> = ["a", "b", "c"]
            .into_iter()
            .map(|name| {
                let spec = PodSpec::new(name).namespace("shop").ports(POD_PORTS);
                let pod = lab.node(1).start_pod(spec).unwrap();
                lab.server.insert_unchecked("pods", pod_object(&pod, json!({"app": name}))).unwrap();
                pod
            })
            .collect();
        let only_b = json!({
            "podSelector": {"matchLabels": {"app": "a"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}],
        });
        put_policy(&lab, "shop", "only-b", only_b);
        lab.put_service(&service("web", 10, json!({"type": "NodePort", "ports": node_ports(30010)})));
        lab.put_slices("web", &[Endpoint::of(&pods[0])]);
        Self { lab, pods }
    }

    fn node(&self) -> &Netns {
        &self.lab.node(1).netns
    }

    /// Services serve and the policy is in force, in both families and by all protocols.
    fn expect_served_and_judged(&self) {
        self.lab.wait_served(10, 1);
        let [a, b, c] = [0, 1, 2].map(|at| &self.pods[at]);
        let frontends = vips(10).map(|vip| SocketAddr::new(vip, 80));
        let endpoints = a.ips.iter().map(|ip| SocketAddr::new(*ip, 8080));
        for to in frontends.into_iter().chain(endpoints) {
            for protocol in Protocol::ALL {
                expect(b.netns(), protocol, to, true);
                expect(c.netns(), protocol, to, false);
            }
        }
        // Nobody serves this port of the address, and its node may reach its pods.
        for vip in vips(10) {
            assert_refused(b.netns(), Protocol::Tcp, SocketAddr::new(vip, 81), "a port of no Service");
            expect(self.node(), Protocol::Tcp, SocketAddr::new(vip, 80), true);
        }
    }

    /// Rules of ours in one form, by both families.
    fn rules(&self, form: &str) -> usize {
        let ours = |program: &str| {
            let rules = self.node().exec(&format!("{program}-{form}-save"), &[]).unwrap();
            rules.lines().filter(|line| line.starts_with("-A") && line.contains("KUBE-ROUTER-")).count()
        };
        PROGRAMS.into_iter().map(ours).sum()
    }

    /// The form that `ferroute status` tells.
    fn told(&self) -> Value {
        let socket = format!("--admin-socket={}", self.lab.admin_socket(self.lab.node(1)));
        let text = self.node().exec(PROGRAM, &["status", "--output=json", &socket]).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["policies"]["iptables"].clone()
    }

    fn log(&self) -> String {
        self.lab.daemons[0].log().join("\n")
    }
}

#[test]
fn services_and_policies_hold_in_the_nft_form() {
    let _serial = serial();
    let mut shop = Shop::build();
    // Rules that iptables does not know of.
    let foreign = "table inet stranger {\nchain input {\ntype filter hook input priority -10\n\
                   tcp dport 4242 drop\n}\n}\n";
    shop.node().exec("nft", &[foreign]).unwrap();
    let ruleset = |shop: &Shop| shop.node().exec("nft", &["list", "table", "inet", "stranger"]).unwrap();
    let (before, strangers) = (KernelSnapshot::take(shop.node()).unwrap(), ruleset(&shop));
    shop.lab.start_daemons(&FLAGS);
    shop.expect_served_and_judged();
    assert!(
        shop.rules("nft") > 20 && shop.rules("legacy") == 0,
        "{} {}",
        shop.rules("nft"),
        shop.rules("legacy")
    );
    assert!(!shop.log().contains("both variants"), "{}", shop.log());
    assert_eq!(shop.told(), json!("nft"));

    // A restart adopts.
    let good = KernelSnapshot::take(shop.node()).unwrap();
    assert!(shop.lab.daemons[0].terminate(SOON).unwrap().success());
    let lines = shop.lab.daemons[0].log().len();
    shop.lab.daemons[0].start().unwrap();
    shop.lab.daemons[0].wait_ready(SOON).unwrap();
    good.assert_same(&KernelSnapshot::take(shop.node()).unwrap(), "after a restart");
    let log = shop.lab.daemons[0].log();
    assert!(!log.iter().skip(lines).any(|line| line.contains("iptables written")), "{log:#?}");

    let missing = |now: &KernelSnapshot, ours: &str| -> Vec<String> {
        good.difference(now)
            .into_iter()
            .filter(|line| line.starts_with("iptables-nft: -") && line.contains(ours))
            .collect()
    };
    // What others break is noticed by the rule set's generation.
    for damage in [
        "iptables -F KUBE-ROUTER-SERVICES",
        "ip6tables -t nat -F POSTROUTING",
        "iptables -D FORWARD 1",
        "ip6tables -I FORWARD -j ACCEPT",
        "nft flush ruleset",
    ] {
        shop.node().sh(damage).unwrap();
        if damage == "nft flush ruleset" {
            shop.node().exec("nft", &[foreign]).unwrap();
        }
        let begin = std::time::Instant::now();
        eventually(damage, SOON, || {
            let missing = missing(&KernelSnapshot::take(shop.node()).unwrap(), "KUBE");
            if missing.is_empty() { Ok(()) } else { Err(missing.join("\n")) }
        });
        println!("{damage}: put right after {} ms", begin.elapsed().as_millis());
        let _ = shop.node().sh("ip6tables -D FORWARD -j ACCEPT");
    }
    let policy_chains = |shop: &Shop| {
        let rules = shop.node().exec("iptables-nft-save", &["-t", "filter"]).unwrap();
        rules.lines().filter(|line| line.starts_with(":KUBE-NWPLCY-")).count()
    };
    let chains = policy_chains(&shop);
    // Nor is it taken for another room's doing, which writes a moment before.
    for turn in 0..6 {
        let policy = format!("turn-{turn}");
        put_policy(
            &shop.lab,
            "shop",
            &policy,
            json!({"podSelector": {"matchLabels": {"app": "b"}}, "ingress": [{}]}),
        );
        let begin = std::time::Instant::now();
        eventually("the policy's chain", SOON, || {
            let now = policy_chains(&shop);
            if now > chains + turn { Ok(()) } else { Err(format!("{now} chains, {chains} before")) }
        });
        shop.node().sh("iptables -F KUBE-ROUTER-SERVICES").unwrap();
        shop.node().sh("ip6tables -t nat -F KUBE-ROUTER-MASQUERADE").unwrap();
        eventually("rules flushed just after a policy came", SOON, || {
            let missing = missing(&KernelSnapshot::take(shop.node()).unwrap(), "KUBE-ROUTER-");
            if missing.is_empty() { Ok(()) } else { Err(missing.join("\n")) }
        });
        println!("flushed beside a policy: put right after {} ms", begin.elapsed().as_millis());
    }
    shop.expect_served_and_judged();

    assert!(shop.lab.daemons[0].terminate(SOON).unwrap().success());
    shop.node().exec(PROGRAM, &["--cleanup-config"]).unwrap();
    before.assert_same(&KernelSnapshot::take(shop.node()).unwrap(), "after clean-up");
    assert_eq!(ruleset(&shop), strangers);
}

/// The kubelet's chain tells the form, whatever others wrote; who wrote in the other one is told.
#[test]
fn the_form_that_the_host_uses_is_chosen_and_a_mix_is_told() {
    let _serial = serial();
    let mut shop = Shop::build();
    for (form, other) in [("legacy", "nft"), ("nft", "legacy")] {
        for program in PROGRAMS {
            let run = |form: &str, words: &[&str]| {
                shop.node().exec(&format!("{program}-{form}"), words).unwrap();
            };
            run(form, &["-t", "mangle", "-N", "KUBE-IPTABLES-HINT"]);
            for port in ["4242", "4243"] {
                run(other, &["-A", "INPUT", "-p", "tcp", "--dport", port, "-j", "DROP"]);
            }
        }
        if shop.lab.daemons.is_empty() {
            shop.lab.start_daemons(&FLAGS);
        } else {
            shop.lab.daemons[0].start().unwrap();
            shop.lab.daemons[0].wait_ready(SOON).unwrap();
        }
        shop.expect_served_and_judged();
        assert!(shop.rules(form) > 20 && shop.rules(other) == 0);
        assert_eq!(shop.told(), json!(form));
        let log = shop.log();
        let told = log.lines().filter(|line| line.contains("both variants") && line.contains(other)).count();
        assert!(told >= 2, "in both families: {log}");

        assert!(shop.lab.daemons[0].terminate(SOON).unwrap().success());
        shop.node().exec(PROGRAM, &["--cleanup-config"]).unwrap();
        assert_eq!([shop.rules(form), shop.rules(other)], [0, 0]);
        for program in PROGRAMS {
            let rules = shop.node().exec(&format!("{program}-{other}"), &["-S", "INPUT"]).unwrap();
            assert!(rules.contains("--dport 4242") && rules.contains("--dport 4243"), "{rules}");
            let chain = ["-t", "mangle", "-X", "KUBE-IPTABLES-HINT"];
            shop.node().exec(&format!("{program}-{form}"), &chain).unwrap();
            shop.node().exec(&format!("{program}-{other}"), &["-F", "INPUT"]).unwrap();
        }
    }
}
