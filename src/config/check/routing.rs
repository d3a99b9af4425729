//! The flags of BGP.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use ferroute_bgp::message::{Asn, RouterId};
use ferroute_bgp::peer::PORT;

use super::Check;
use crate::config::Mistake;
use crate::duration::GoDuration;
use crate::proxy;
use crate::routes::external::{password, timers};
use crate::routes::settings::{
    Advertise, DEFAULT_ASN, External, ExternalPeer, Restart, RouterIdChoice, Settings, is_reserved,
};

impl Check<'_> {
    /// Flags that were written and change nothing.
    pub(super) fn without_effect(&self, notices: &mut Vec<String>) {
        let written = |names: &[&str]| {
            let names = names.iter().filter(|name| self.given.is_explicit(name));
            names.map(|name| format!("--{name}")).collect::<Vec<_>>().join(" ")
        };
        let admin = written(&["gobgp-admin-address", "gobgp-admin-port"]);
        if !admin.is_empty() {
            notices.push(format!(
                "no effect, because `ferroute bgp` takes the place of GoBGP's server: {admin}"
            ));
        }
    }

    /// The flags are checked like kube-router does, whether the room runs or not, so that a mistake
    /// shows before it is switched on. `None` when something is wrong.
    pub(super) fn routes(&mut self, services: &proxy::Settings) -> Option<Settings> {
        let before = self.mistakes.len();
        self.period("loadbalancer-sync-period");
        if self.switch("advertise-range-specifics") && !self.switch("advertise-ranges") {
            self.meaning(
                "--advertise-range-specifics: without --advertise-ranges single addresses are all that is advertised; \
                 remove it, or add that flag"
                    .to_owned(),
            );
        }
        let settings = Settings {
            node_name: services.node_name.clone(),
            services: services.clone(),
            audit_period: self.period("routes-sync-period"),
            mesh: self.switch("enable-ibgp"),
            cluster_asn: self.cluster_asn(),
            port: self.port("bgp-port"),
            router_id: self.router_id(),
            restart: self.restart(),
            advertise: Advertise {
                cluster_ips: self.switch("advertise-cluster-ip"),
                external_ips: self.switch("advertise-external-ip"),
                load_balancer_ips: self.switch("advertise-loadbalancer-ip"),
                pod_cidrs: self.switch("advertise-pod-cidr"),
                ranges: self.switch("advertise-ranges"),
                specifics: self.switch("advertise-range-specifics"),
            },
            external: self.external(),
            addresses: self.methods(),
        };
        (self.mistakes.len() == before).then_some(settings)
    }

    fn cluster_asn(&mut self) -> Option<Asn> {
        let asn = self.number("cluster-asn").unwrap_or_default();
        if asn != 0 && !(64512..=65535).contains(&asn) && !(4_200_000_000..=4_294_967_294).contains(&asn) {
            self.meaning(format!(
                "--cluster-asn={asn}: must be private: 64512-65535 or 4200000000-4294967294, or 0 for 64512"
            ));
        }
        let asn = u32::try_from(asn).ok().filter(|asn| *asn != 0).map_or(DEFAULT_ASN, Asn);
        self.switch("nodes-full-mesh").then_some(asn)
    }

    fn port(&mut self, name: &str) -> u16 {
        self.within(name, 1, 65535);
        self.number(name).and_then(|port| u16::try_from(port).ok()).unwrap_or(PORT)
    }

    fn router_id(&mut self) -> RouterIdChoice {
        match self.given.text("router-id") {
            "" => RouterIdChoice::NodeAddress,
            "generate" => RouterIdChoice::Generated,
            text => match text.parse::<Ipv4Addr>() {
                Ok(id) if !id.is_unspecified() => RouterIdChoice::Given(RouterId(id)),
                _ => {
                    let text = text.to_owned();
                    self.meaning(format!(
                        "--router-id={text}: write an IPv4 address other than 0.0.0.0, or generate"
                    ));
                    RouterIdChoice::NodeAddress
                }
            },
        }
    }

    fn restart(&mut self) -> Option<Restart> {
        if !self.switch("bgp-graceful-restart") {
            return None;
        }
        let mut times = [Duration::ZERO; 2];
        let flags = [("bgp-graceful-restart-time", 4095), ("bgp-graceful-restart-deferral-time", 18 * 3600)];
        for (time, (name, most)) in times.iter_mut().zip(flags) {
            let most = GoDuration::from_secs(most);
            let Some(value) = self.duration(name) else { continue };
            if value.nanoseconds() <= 0 || value > most {
                self.meaning(format!("--{name}={value}: must be longer than zero and at most {most}"));
            }
            *time = value.unsigned().unwrap_or_default();
        }
        // Less than a second would be none at all.
        let time = u16::try_from(times[0].as_secs()).unwrap_or(4095).max(1);
        Some(Restart { time, deferral: times[1] })
    }

    fn external(&mut self) -> External {
        let mut hold_time = 90;
        if let Some(hold) = self.duration("bgp-holdtime") {
            let seconds = hold.nanoseconds() / 1_000_000_000;
            if !(3..=65536).contains(&seconds) {
                self.meaning(format!("--bgp-holdtime={hold}: must be between 3s and 65536s"));
            }
            // kube-router admits one more than the message can say.
            hold_time = u16::try_from(seconds).unwrap_or(u16::MAX);
        }
        let multihop = self.number("peer-router-multihop-ttl").and_then(|ttl| u8::try_from(ttl).ok());
        let file = self.given.text("peer-router-passwords-file");
        External {
            passwords_file: (!file.is_empty()).then(|| PathBuf::from(file)),
            peers: self.peers(),
            hold_time,
            multihop: multihop.filter(|ttl| *ttl > 1),
            override_next_hop: self.switch("override-nexthop"),
        }
    }

    pub(super) fn within(&mut self, name: &str, first: u64, last: u64) {
        if let Some(value) = self.number(name)
            && !(first..=last).contains(&value)
        {
            self.meaning(format!("--{name}={value}: must be from {first} to {last}"));
        }
    }

    /// The lists of peers; their values belong together by position.
    fn peers(&mut self) -> Vec<ExternalPeer> {
        let mut wrong = Vec::new();
        let ips = self.items("peer-router-ips");
        let addresses: Vec<Option<IpAddr>> = ips.iter().map(|ip| ip.parse().ok()).collect();
        for (ip, _) in ips.iter().zip(&addresses).filter(|(_, address)| address.is_none()) {
            wrong.push(Mistake::usage(format!("--peer-router-ips: {ip:?} is no IP address")));
        }
        let mut asns = Vec::new();
        for asn in self.items("peer-router-asns") {
            let number = asn.parse::<u32>();
            match number {
                Err(_) => wrong.push(Mistake::usage(format!("--peer-router-asns: {asn:?} is no ASN"))),
                Ok(number) if is_reserved(number) => {
                    wrong.push(Mistake::meaning(format!("--peer-router-asns: {number} is reserved")));
                }
                Ok(_) => {}
            }
            asns.push(Asn(number.unwrap_or_default()));
        }
        let mut ports = Vec::new();
        for port in self.items("peer-router-ports") {
            match port.parse::<u32>() {
                Err(_) => wrong.push(Mistake::usage(format!("--peer-router-ports: {port:?} is no port"))),
                Ok(number) if !(1..=65535).contains(&number) => {
                    wrong.push(Mistake::meaning(format!("--peer-router-ports: {number} is no port")));
                }
                Ok(_) => {}
            }
            ports.push(port.parse().unwrap_or(PORT));
        }
        let mut passwords = Vec::new();
        for (index, text) in self.given.list("peer-router-passwords").into_iter().enumerate() {
            // The value is a secret and is never printed.
            passwords.push(password(text).unwrap_or_else(|why| {
                wrong.push(Mistake::meaning(format!("--peer-router-passwords: item {} {why}", index + 1)));
                None
            }));
        }
        if asns.len() != ips.len() {
            wrong.push(Mistake::meaning(format!(
                "--peer-router-asns has {} items and --peer-router-ips {}; give one ASN per address",
                asns.len(),
                ips.len()
            )));
        }
        for (name, count) in [("ports", ports.len()), ("passwords", passwords.len())] {
            if count != 0 && count != ips.len() {
                wrong.push(Mistake::meaning(format!(
                    "--peer-router-{name} has {count} items and --peer-router-ips {}; give none, or one per address",
                    ips.len()
                )));
            }
        }
        if !ips.is_empty() {
            self.within("bfd-desired-min-tx-interval", 1, 4_294_967);
            self.within("bfd-required-min-rx-interval", 1, 4_294_967);
            self.within("bfd-detection-multiplier", 1, 255);
            self.within("bfd-port", 1, 65535);
        }
        let number = |name: &str| self.number(name).unwrap_or_default();
        let mut bfd = None;
        if self.switch("enable-bfd") && wrong.is_empty() {
            let [transmit, receive, multiplier, port] = [
                "bfd-desired-min-tx-interval",
                "bfd-required-min-rx-interval",
                "bfd-detection-multiplier",
                "bfd-port",
            ]
            .map(number);
            match timers(transmit, receive, multiplier, port) {
                Ok(timers) => bfd = Some(timers),
                Err(why) => wrong.push(Mistake::meaning(format!("--enable-bfd: {why}"))),
            }
        }
        self.mistakes.extend(wrong);
        let peers = addresses.into_iter().zip(asns).enumerate();
        peers
            .filter_map(|(index, (address, asn))| {
                Some(ExternalPeer {
                    address: address?,
                    asn,
                    port: ports.get(index).copied().unwrap_or(PORT),
                    password: passwords.get(index).cloned().flatten(),
                    secret: None,
                    source: None,
                    bfd,
                })
            })
            .collect()
    }
}
