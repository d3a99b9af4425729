//! A new connection's first packet walked through chains and sets, rule by rule, as the kernel does it.
//!
//! Knows the matches and targets that this crate writes; anything else ends the walk with an error, so that
//! nothing is claimed about rules that are not understood.

use std::net::IpAddr;

use ferroute_iptables::ipset::{Entry, Set, SetType, Sets};
use ferroute_iptables::{
    AddressType, Builtin, ChainName, Condition, Direction as End, Family, Match, PortRange, Rule, Ruleset,
    State, Target,
};
use ipnet::IpNet;

use crate::Flow;
use crate::definition::ip_protocol;

/// A first packet, where it is met, and what the host's routing says of its source.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    /// Addresses, protocol and port.
    pub flow: Flow,
    /// INPUT, FORWARD or OUTPUT.
    pub hook: Builtin,
    /// The source is an address of this host.
    pub local_source: bool,
    /// The destination is an address of this host.
    pub local_destination: bool,
}

/// What happened to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Accepted by a rule of ours.
    Accepted,
    /// Dropped or rejected by a rule of ours.
    Refused,
    /// Left to the rules of others and the policy of the builtin chain.
    LeftToOthers,
}

/// The way of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Its end.
    pub verdict: Verdict,
    /// Rules that matched, in order: chain, place in it from 0.
    pub path: Vec<(ChainName, usize)>,
    /// How many rules it was compared with.
    pub rules_met: usize,
}

/// Why a packet could not be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    /// A rule jumps to a chain that is not there.
    #[error("chain {0} is missing")]
    NoChain(ChainName),
    /// A match or target that this crate does not write.
    #[error("rule {index} of chain {chain} is not understood: {rule}")]
    Unknown {
        /// Its chain.
        chain: ChainName,
        /// Its place, from 0.
        index: usize,
        /// Its words.
        rule: String,
    },
    /// Chains call each other without end.
    #[error("the chains call each other more than {0} deep")]
    Depth(usize),
}

/// Deepest call; our own are seven.
const DEPTH: usize = 16;

/// Walks a packet through the jumps of its hook.
///
/// # Errors
/// A chain is missing or a rule is not understood.
pub fn trace(ruleset: &Ruleset, sets: &Sets, packet: &Packet) -> Result<Trace, TraceError> {
    let mut walk = Walk { ruleset, sets, packet, mark: 0, path: Vec::new(), rules_met: 0 };
    let mut verdict = Verdict::LeftToOthers;
    for jump in ruleset.jumps.iter().filter(|jump| jump.from == packet.hook) {
        let Some(chain) = jump.rule.target.as_ref().and_then(Target::chain) else { continue };
        if let Some(end) = walk.chain(chain, 0)? {
            verdict = end;
            break;
        }
    }
    Ok(Trace { verdict, path: walk.path, rules_met: walk.rules_met })
}

struct Walk<'a> {
    ruleset: &'a Ruleset,
    sets: &'a Sets,
    packet: &'a Packet,
    mark: u32,
    path: Vec<(ChainName, usize)>,
    rules_met: usize,
}

impl Walk<'_> {
    /// `None` when the chain returns.
    fn chain(&mut self, name: ChainName, depth: usize) -> Result<Option<Verdict>, TraceError> {
        if depth > DEPTH {
            return Err(TraceError::Depth(DEPTH));
        }
        let rules = self.ruleset.chains.get(&name).ok_or(TraceError::NoChain(name))?;
        for (index, rule) in rules.iter().enumerate() {
            self.rules_met += 1;
            if !self.matches(rule, name, index)? {
                continue;
            }
            self.path.push((name, index));
            match &rule.target {
                None | Some(Target::Nflog { .. } | Target::Log { .. }) => {}
                Some(Target::Accept) => return Ok(Some(Verdict::Accepted)),
                Some(Target::Drop | Target::Reject(_)) => return Ok(Some(Verdict::Refused)),
                Some(Target::Return) => return Ok(None),
                Some(Target::Mark { value, mask }) => self.mark = self.mark & !mask ^ value,
                Some(Target::Jump(to)) => {
                    if let Some(verdict) = self.chain(*to, depth + 1)? {
                        return Ok(Some(verdict));
                    }
                }
                Some(Target::Goto(to)) => return self.chain(*to, depth + 1),
                Some(_) => return Err(self.unknown(rule, name, index)),
            }
        }
        Ok(None)
    }

    fn unknown(&self, rule: &Rule, chain: ChainName, index: usize) -> TraceError {
        TraceError::Unknown { chain, index, rule: rule.render(Family::of(self.packet.flow.source)) }
    }

    fn matches(&self, rule: &Rule, chain: ChainName, index: usize) -> Result<bool, TraceError> {
        for Condition { negated, test } in &rule.conditions {
            let holds = self.holds(test).ok_or_else(|| self.unknown(rule, chain, index))?;
            if holds == *negated {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// `None` for a match that is not understood.
    fn holds(&self, test: &Match) -> Option<bool> {
        let flow = &self.packet.flow;
        let address = |end: &End| match end {
            End::Source => flow.source,
            End::Destination => flow.destination,
        };
        let in_ranges = |ranges: &[PortRange]| ranges.iter().any(|r| (r.first..=r.last).contains(&flow.port));
        Some(match test {
            Match::Comment(_) => true,
            Match::Source(net) => net.contains(&flow.source),
            Match::Destination(net) => net.contains(&flow.destination),
            Match::Protocol(protocol) => *protocol == ip_protocol(flow.protocol),
            Match::Set { set, flags } => {
                let flags: Vec<IpAddr> = flags.iter().map(address).collect();
                // A set that is not there holds nothing; restore would not have taken the rule.
                self.sets.get(set).is_some_and(|set| set_holds(set, flow, &flags))
            }
            Match::AddressType(End::Source, AddressType::Local) => self.packet.local_source,
            Match::AddressType(End::Destination, AddressType::Local) => self.packet.local_destination,
            Match::Port(End::Destination, range) => in_ranges(std::slice::from_ref(range)),
            Match::Ports(End::Destination, ranges) => in_ranges(ranges),
            Match::State(states) => states.contains(&State::New),
            Match::Mark { value, mask } => self.mark & mask == *value,
            // A flow is of a transport protocol.
            Match::Icmp { .. } => false,
            Match::Limit { .. } => true,
            Match::Raw(words) => match words.as_slice() {
                [option, masked] if option == "-s" => masked_address(masked, flow.source)?,
                [option, masked] if option == "-d" => masked_address(masked, flow.destination)?,
                _ => return None,
            },
            _ => return None,
        })
    }
}

/// `ADDRESS/MASK` where the mask need not be a prefix.
fn masked_address(text: &str, ip: IpAddr) -> Option<bool> {
    let (wanted, mask) = text.split_once('/')?;
    Some(match (wanted.parse().ok()?, mask.parse().ok()?, ip) {
        (IpAddr::V4(wanted), IpAddr::V4(mask), IpAddr::V4(ip)) => {
            ip.to_bits() & mask.to_bits() == wanted.to_bits()
        }
        (IpAddr::V6(wanted), IpAddr::V6(mask), IpAddr::V6(ip)) => {
            ip.to_bits() & mask.to_bits() == wanted.to_bits()
        }
        _ => false,
    })
}

fn set_holds(set: &Set, flow: &Flow, ends: &[IpAddr]) -> bool {
    let Some(first) = ends.first().copied() else { return false };
    match set.kind().set_type {
        SetType::HashIp => set.entries().contains_key(&Entry::Ip(first)),
        SetType::HashIpPort => {
            let entry = Entry::IpPort(first, ip_protocol(flow.protocol), flow.port);
            set.entries().contains_key(&entry)
        }
        SetType::HashNet => {
            // The longest network decides, and may be an exception.
            let most = if first.is_ipv4() { 32 } else { 128 };
            (1..=most)
                .rev()
                .filter_map(|length| IpNet::new(first, length).ok())
                .find_map(|net| set.entries().get(&Entry::Net(net.trunc())))
                .is_some_and(|extra| !extra.nomatch)
        }
        SetType::HashNetNet => ends.get(1).is_some_and(|second| {
            let pair = Entry::NetNet(IpNet::from(first), IpNet::from(*second));
            set.entries().contains_key(&pair)
        }),
        SetType::HashIpPortIp | SetType::HashIpPortNet | SetType::Other => false,
    }
}
