//! What a peer is configured to be, and what is wrong with it.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::bfd::{Hops, Timers};
use crate::fsm::{Initiative, Settings};
use crate::message::{AfiSafi, Asn, Families, RouterId};
use crate::rib::PeerOptions;
use crate::session::{PeerAsn, Requirement, Restart, Terms};
use crate::transport::{Password, Reach};

/// The port of BGP (RFC 4271 section 8.2.1).
pub const PORT: u16 = 179;

/// Names a peer: its address, and the link of a link-local one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerKey {
    /// The peer's address.
    pub address: IpAddr,
    /// The interface it is reached through; link-local addresses need one, others have none.
    pub interface: Option<Arc<str>>,
}

impl std::fmt::Display for PeerKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.interface {
            Some(interface) => write!(f, "{}%{interface}", self.address),
            None => self.address.fmt(f),
        }
    }
}

impl From<IpAddr> for PeerKey {
    fn from(address: IpAddr) -> Self {
        Self { address, interface: None }
    }
}

/// BFD with a peer (RFC 5880).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerBfd {
    /// How fast.
    pub timers: Timers,
    /// How far away the peer is.
    pub hops: Hops,
    /// Whether to stay silent until the peer speaks.
    pub passive: bool,
    /// Whether the loss of a BFD session that shares the fate of the peer's control plane counts as its
    /// restart: its routes are then kept for the time that it announced (RFC 5882 section 4.3). A broken
    /// path looks the same and then keeps its routes too, so the usual is not.
    pub graceful: bool,
}

/// A peer as wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig {
    /// Who.
    pub key: PeerKey,
    /// For people.
    pub description: String,
    /// Port to dial.
    pub port: u16,
    /// Address of this node to dial from; the kernel chooses if `None`.
    pub source: Option<IpAddr>,
    /// Which AS it must be.
    pub asn: PeerAsn,
    /// TCP MD5 secret.
    pub password: Option<Password>,
    /// Distance; by default any for internal and one hop for external peers.
    pub reach: Option<Reach>,
    /// Who opens connections.
    pub initiative: Initiative,
    /// How long a dial may take.
    pub dial_timeout: Duration,
    /// Longest pause between attempts.
    pub longest_pause: Duration,
    /// Hold time in seconds: 0 (no keepalives) or 3 and more.
    pub hold_time: u16,
    /// Families to exchange.
    pub families: Families,
    /// Families in which several paths per prefix are sent, if the peer takes them.
    pub add_path_send: Families,
    /// Families in which several paths per prefix are taken.
    pub add_path_receive: Families,
    /// Whether IPv4 routes may have IPv6 next hops (RFC 8950).
    pub extended_next_hop: bool,
    /// Whether the peer is to keep this side's routes while this process restarts. What the
    /// speaker is set to promise.
    pub graceful_restart: bool,
    /// Whether paths with AS_SETs are taken.
    pub accept_as_sets: bool,
    /// Capabilities without which there is no session.
    pub required: Vec<Requirement>,
    /// Policies, limits, reflection: what becomes of the routes. Its address is set from the key.
    pub routes: PeerOptions,
    /// When to try again after the peer exceeded its limit of routes; only on request if `None`.
    pub restart_after_limit: Option<Duration>,
    /// Fast detection of a broken path; the session itself does not wait for it.
    pub bfd: Option<PeerBfd>,
}

impl PeerConfig {
    /// A peer with the usual settings: both families, hold time 90 s, both sides dial. An external one
    /// needs policies before routes pass (RFC 8212).
    pub fn new(address: IpAddr, asn: PeerAsn) -> Self {
        Self {
            key: address.into(),
            description: String::new(),
            port: PORT,
            source: None,
            asn,
            password: None,
            reach: None,
            initiative: Initiative::Both,
            dial_timeout: Duration::from_secs(10),
            longest_pause: Duration::from_secs(30),
            hold_time: 90,
            families: Families::ALL,
            add_path_send: Families::NONE,
            add_path_receive: Families::NONE,
            extended_next_hop: false,
            graceful_restart: true,
            accept_as_sets: false,
            required: Vec::new(),
            routes: PeerOptions::new(address),
            restart_after_limit: None,
            bfd: None,
        }
    }

    /// Whether the peer is certainly, or by default, of another AS.
    fn is_external(&self, own: Asn) -> bool {
        match self.asn {
            PeerAsn::Exactly(asn) => asn != own,
            PeerAsn::External => true,
            PeerAsn::Internal | PeerAsn::Any => false,
        }
    }

    pub(crate) fn reach(&self, own: Asn) -> Reach {
        self.reach.unwrap_or(if self.is_external(own) { Reach::Hops(1) } else { Reach::Any })
    }

    /// What the state machine has to know.
    pub(crate) fn settings(&self, speaker: &Identity) -> Settings {
        Settings {
            terms: Terms {
                asn: speaker.asn,
                router_id: speaker.router_id,
                peer_asn: self.asn,
                hold_time: self.hold_time,
                families: self.families,
                add_path_send: self.add_path_send,
                add_path_receive: self.add_path_receive,
                extended_next_hop: self.extended_next_hop,
                restart: speaker.restart.filter(|_| self.graceful_restart),
                accept_as_sets: self.accept_as_sets,
                required: self.required.clone(),
                host: speaker.host.clone(),
            },
            initiative: self.initiative,
            longest_pause: self.longest_pause,
        }
    }

    /// Whether a session under `other` can go on under these settings: everything that the OPEN or
    /// the connection says is the same.
    pub(crate) fn keeps_session_of(&self, other: &Self) -> bool {
        let same = Self {
            description: other.description.clone(),
            routes: other.routes.clone(),
            restart_after_limit: other.restart_after_limit,
            dial_timeout: other.dial_timeout,
            longest_pause: other.longest_pause,
            bfd: other.bfd,
            ..self.clone()
        };
        same == *other
    }

    /// Everything that is wrong with a peer taken alone.
    pub fn flaws(&self) -> Vec<ConfigFlaw> {
        let mut flaws = Vec::new();
        let address = self.key.address;
        let usable = match address {
            IpAddr::V4(address) => {
                !(address.is_unspecified() || address.is_multicast() || address.is_broadcast())
            }
            IpAddr::V6(address) => !(address.is_unspecified() || address.is_multicast()),
        };
        if !usable {
            flaws.push(ConfigFlaw::Address);
        }
        let link_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
        match (link_local, &self.key.interface) {
            (true, None) => flaws.push(ConfigFlaw::NoInterface),
            (false, Some(_)) => flaws.push(ConfigFlaw::Interface),
            _ => {}
        }
        if self.port == 0 {
            flaws.push(ConfigFlaw::Port);
        }
        if self.source.is_some_and(|source| source.is_ipv6() != address.is_ipv6()) {
            flaws.push(ConfigFlaw::SourceFamily);
        }
        if self.asn == PeerAsn::Exactly(Asn(0)) {
            flaws.push(ConfigFlaw::ZeroAsn);
        }
        if matches!(self.hold_time, 1 | 2) {
            flaws.push(ConfigFlaw::HoldTime(self.hold_time));
        }
        if self.families.is_empty() {
            flaws.push(ConfigFlaw::NoFamily);
        }
        for requirement in &self.required {
            if let Requirement::Family(family) | Requirement::PathsFrom(family) | Requirement::PathsTo(family) =
                requirement
                && !self.families.contains(*family)
            {
                flaws.push(ConfigFlaw::RequiredFamily(*family));
            }
        }
        if self.dial_timeout.is_zero() || self.longest_pause.is_zero() {
            flaws.push(ConfigFlaw::ZeroTime);
        }
        if matches!(self.reach, Some(Reach::Hops(0) | Reach::Security(0 | 255))) {
            flaws.push(ConfigFlaw::Reach);
        }
        flaws
    }
}

/// Who this side is, for all peers.
#[derive(Debug)]
pub(crate) struct Identity {
    pub asn: Asn,
    pub router_id: RouterId,
    pub host: Option<String>,
    pub restart: Option<Restart>,
    /// This process took over from another and does not know all routes yet.
    pub restarting: Arc<AtomicBool>,
}

/// A peer that cannot be. The others are not touched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("peer {key}: {flaw}")]
pub struct ConfigError {
    /// Which.
    pub key: PeerKey,
    /// What is wrong.
    pub flaw: ConfigFlaw,
}

/// What is wrong with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConfigFlaw {
    /// Nobody can have the address.
    #[error("no peer can have this address")]
    Address,
    /// The address is link-local.
    #[error("the address is link-local: name the interface it is reached through")]
    NoInterface,
    /// The address is not link-local.
    #[error("only link-local addresses are named with an interface: leave it out")]
    Interface,
    /// Port 0.
    #[error("port 0 cannot be dialed: BGP uses 179")]
    Port,
    /// IPv4 from IPv6 or the other way round.
    #[error("the source address is not of the peer's family")]
    SourceFamily,
    /// AS 0.
    #[error("AS 0 cannot be used (RFC 7607): give the peer's AS number")]
    ZeroAsn,
    /// 1 or 2 seconds.
    #[error("a hold time of {0} s is not allowed: 0 for none, or at least 3 (RFC 4271)")]
    HoldTime(u16),
    /// Nothing to exchange.
    #[error("no address family is to be exchanged: name IPv4 unicast, IPv6 unicast or both")]
    NoFamily,
    /// Demanded but not exchanged.
    #[error("{0} is required of the peer but is not among its families")]
    RequiredFamily(AfiSafi),
    /// A time of nothing.
    #[error("dial timeout and longest pause must be longer than nothing")]
    ZeroTime,
    /// Hops out of range.
    #[error("a peer is at least 1 and, with TTL security, at most 254 hops away")]
    Reach,
    /// The peer is this speaker.
    #[error("this is an address that this speaker itself listens on: a node cannot be its own peer")]
    Itself,
    /// Two peers with one address.
    #[error("another peer has the same address; the first one is used")]
    Duplicate,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flaws(address: &str, change: impl Fn(&mut PeerConfig)) -> Vec<ConfigFlaw> {
        let mut config = PeerConfig::new(address.parse().unwrap(), PeerAsn::Exactly(Asn(65001)));
        change(&mut config);
        config.flaws()
    }

    #[test]
    fn flaws_are_named() {
        assert_eq!(flaws("192.0.2.1", |_| ()), []);
        assert_eq!(flaws("2001:db8::1", |_| ()), []);
        for address in ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255"] {
            assert_eq!(flaws(address, |_| ()), [ConfigFlaw::Address], "{address}");
        }
        assert_eq!(flaws("fe80::1", |_| ()), [ConfigFlaw::NoInterface]);
        assert_eq!(flaws("fe80::1", |config| config.key.interface = Some("eth0".into())), []);
        assert_eq!(
            flaws("192.0.2.1", |config| config.key.interface = Some("eth0".into())),
            [ConfigFlaw::Interface]
        );
        let all = flaws("192.0.2.1", |config| {
            config.port = 0;
            config.source = Some("2001:db8::2".parse().unwrap());
            config.asn = PeerAsn::Exactly(Asn(0));
            config.hold_time = 1;
            config.families = Families::NONE;
            config.required = vec![Requirement::Family(AfiSafi::Ipv4Unicast)];
            config.dial_timeout = Duration::ZERO;
            config.reach = Some(Reach::Hops(0));
        });
        assert_eq!(
            all,
            [
                ConfigFlaw::Port,
                ConfigFlaw::SourceFamily,
                ConfigFlaw::ZeroAsn,
                ConfigFlaw::HoldTime(1),
                ConfigFlaw::NoFamily,
                ConfigFlaw::RequiredFamily(AfiSafi::Ipv4Unicast),
                ConfigFlaw::ZeroTime,
                ConfigFlaw::Reach,
            ]
        );
    }

    #[test]
    fn external_peers_are_one_hop_away_unless_told() {
        let own = Asn(65000);
        let mut config = PeerConfig::new("192.0.2.1".parse().unwrap(), PeerAsn::Exactly(Asn(65001)));
        assert_eq!(config.reach(own), Reach::Hops(1));
        assert_eq!(config.reach(Asn(65001)), Reach::Any);
        config.reach = Some(Reach::Security(2));
        assert_eq!(config.reach(own), Reach::Security(2));
    }

    #[test]
    fn what_the_peer_cannot_see_does_not_end_the_session() {
        let old = PeerConfig::new("192.0.2.1".parse().unwrap(), PeerAsn::Any);
        let mut new = old.clone();
        new.description = "rack 7".into();
        new.routes.limits.routes = Some(10);
        assert!(new.keeps_session_of(&old));
        new.hold_time = 30;
        assert!(!new.keeps_session_of(&old));
    }
}
