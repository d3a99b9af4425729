//! The rules: what every packet meets, how it finds the chain of its pod, and what a policy allows.
//!
//! ```text
//! FORWARD -> KUBE-ROUTER-FORWARD   established? accept. not ours? return. always allowed? accept.
//!    unknown pod? refuse. source isolated? -> KUBE-NWPLCY-EGRESS; destination isolated? -> KUBE-NWPLCY-INGRESS
//!       -> KUBE-POD-FW-x (one per set of policies that select the same pods)
//!             -> KUBE-NWPLCY-y of each policy: a rule that matches goes to KUBE-NWPLCY-DEFAULT, which marks
//!          marked? return (allowed). else log and reject.
//!    accept.
//! ```

use std::collections::BTreeMap;
use std::net::IpAddr;

use ferroute_iptables::{
    AddressType, Builtin, ChainName, Direction as End, Family, Jump, Match, Per, PortRange, Position,
    RejectWith, Rule, Ruleset, SetName, State, Target, icmp_accepts,
};
use ipnet::IpNet;

use crate::definition::ip_protocol;
use crate::name;
use crate::{Direction, Key, PortMatch, Protocol};

/// "Some rule allows it": kube-router's bit; set and tested with its own mask.
const ALLOWED: u32 = 0x1_0000;
/// NFLOG group of refused packets, kube-router's.
const LOG_GROUP: u16 = 100;
/// Groups that one dispatch chain names before the low bits of the address part them.
const GROUPS_PER_CHAIN: usize = 8;
/// Most bits of the address that part pods: 256 chains.
const MOST_BITS: u32 = 8;

/// What happens to an address of a pod network that no known pod has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownPods {
    /// Closed until known.
    #[default]
    Deny,
    /// Open until known.
    Allow,
}

/// Service traffic that a later hook judges again, with the endpoint's address: IPVS translates between
/// INPUT and OUTPUT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exempt {
    /// What our own proxy serves, by its sets of each family.
    Sets(BTreeMap<Family, ServiceSets>),
    /// Ranges, for Services that somebody else serves: destination networks, and node ports on local
    /// addresses.
    Ranges {
        /// Cluster, external and load-balancer ranges, each with the words of its comment.
        networks: Vec<(IpNet, String)>,
        /// Node ports, if any.
        node_ports: Option<PortRange>,
    },
}

/// Sets of the service proxy, which must exist before the rules that look at them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceSets {
    /// `hash:ip,port`: every address, protocol and port a Service is served on.
    pub frontends: SetName,
    /// `hash:ip` or `hash:net`: addresses whose other ports the proxy's firewall guards. Traffic to them is
    /// judged here and then left to that firewall instead of being accepted.
    pub addresses: Vec<SetName>,
}

/// How rules are written, the same for all pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Families enforced.
    pub families: Vec<Family>,
    /// Addresses without a known pod.
    pub unknown_pods: UnknownPods,
    /// Traffic judged later.
    pub exempt: Exempt,
}

fn is_in(base: &str, family: Family, end: End) -> Match {
    Match::set(name::set(base, family), &[end])
}

fn established() -> Match {
    Match::State(vec![State::Related, State::Established])
}

/// Chains that do not depend on policies, and the jumps to them.
pub(crate) fn fixed(options: &Options, family: Family) -> Ruleset {
    let chains = BTreeMap::from([
        (name::input(), input(options, family)),
        (name::forward(), forward(options, family)),
        (name::output(), output(options, family)),
        // Neighbour discovery crosses the bridge.
        (name::common(), icmp_accepts(family)),
        (
            name::allow(),
            vec![
                Rule::new(Target::Mark { value: ALLOWED, mask: ALLOWED })
                    .comment("rule to mark traffic matching a network policy"),
            ],
        ),
    ]);
    let jumps = [
        (Builtin::Input, name::input()),
        (Builtin::Forward, name::forward()),
        (Builtin::Output, name::output()),
    ]
    .into_iter()
    .map(|(from, to)| Jump {
        from,
        rule: Rule::jump(to).comment("kube-router netpol"),
        position: Position::First,
    })
    .collect();
    Ruleset { chains, jumps }
}

/// From pods of this node to this node. Nothing else is looked at.
fn input(options: &Options, family: Family) -> Vec<Rule> {
    let mut rules = vec![
        Rule::new(Target::Return)
            .unless(is_in(name::POD_NETS, family, End::Source))
            .comment("not from a local pod"),
        // The bridge's own address is in the pod network too.
        Rule::new(Target::Return)
            .when(Match::AddressType(End::Source, AddressType::Local))
            .comment("from this node itself"),
    ];
    match &options.exempt {
        Exempt::Sets(sets) => rules.extend(sets.get(&family).map(|sets| {
            Rule::new(Target::Return)
                .when(Match::set(sets.frontends, &[End::Destination, End::Destination]))
                .comment("services are judged by their endpoint")
        })),
        Exempt::Ranges { networks, node_ports } => {
            for (net, what) in networks.iter().filter(|(net, _)| Family::of(net.addr()) == family) {
                rules.push(
                    Rule::new(Target::Return)
                        .when(Match::Destination(*net))
                        .comment(&format!("allow traffic to {what}")),
                );
            }
            for protocol in node_ports.iter().flat_map(|_| Protocol::ALL) {
                let ports = node_ports.iter().copied().collect();
                rules.push(
                    Rule::new(Target::Return)
                        .when(Match::Protocol(ip_protocol(protocol)))
                        .when(Match::AddressType(End::Destination, AddressType::Local))
                        .when(Match::Ports(End::Destination, ports))
                        .comment(&format!("allow LOCAL {protocol} traffic to node ports")),
                );
            }
        }
    }
    rules.push(Rule::new(Target::Accept).when(established()).comment("rule for stateful firewall for pod"));
    rules.push(Rule::jump(name::common()).comment("common netpol rules"));
    rules.extend(unknown(options, family, End::Source));
    rules.push(judged(family, Direction::Egress));
    if let Exempt::Sets(sets) = &options.exempt {
        for set in sets.get(&family).iter().flat_map(|sets| &sets.addresses) {
            rules.push(
                Rule::new(Target::Return)
                    .when(Match::set(*set, &[End::Destination]))
                    .comment("the service firewall guards other ports"),
            );
        }
    }
    rules.push(accept());
    rules
}

fn forward(options: &Options, family: Family) -> Vec<Rule> {
    let mut rules = pods_only(family);
    rules.push(Rule::jump(name::common()).comment("common netpol rules"));
    rules.extend(both_ends(options, family));
    rules
}

fn output(options: &Options, family: Family) -> Vec<Rule> {
    let mut rules = pods_only(family);
    // Only here: a forwarded packet with an address of this node is forged.
    rules.push(
        Rule::new(Target::Accept)
            .when(Match::AddressType(End::Source, AddressType::Local))
            .comment("rule to permit the traffic from the local node to its pods"),
    );
    rules.push(Rule::jump(name::common()).comment("common netpol rules"));
    rules.push(
        Rule::new(Target::Accept)
            .when(Match::set(name::set(name::SELF, family), &[End::Source, End::Destination]))
            .comment("a pod to itself through its own service"),
    );
    rules.extend(both_ends(options, family));
    rules
}

/// Replies and all that belongs to allowed connections, first; what no pod of this node sends or gets is
/// left to others.
fn pods_only(family: Family) -> Vec<Rule> {
    let established = |end| {
        Rule::new(Target::Accept)
            .when(is_in(name::POD_NETS, family, end))
            .when(established())
            .comment("rule for stateful firewall for pod")
    };
    vec![
        established(End::Destination),
        established(End::Source),
        Rule::new(Target::Return)
            .unless(is_in(name::POD_NETS, family, End::Source))
            .unless(is_in(name::POD_NETS, family, End::Destination))
            .comment("not about local pods"),
    ]
}

fn both_ends(options: &Options, family: Family) -> Vec<Rule> {
    let mut rules = unknown(options, family, End::Source);
    rules.extend(unknown(options, family, End::Destination));
    rules.push(judged(family, Direction::Egress));
    rules.push(judged(family, Direction::Ingress));
    rules.push(accept());
    rules
}

/// A pod that is about to be known sends again: its packets are dropped. A client of one that is gone is
/// told at once.
fn unknown(options: &Options, family: Family, end: End) -> Vec<Rule> {
    if options.unknown_pods == UnknownPods::Allow {
        return Vec::new();
    }
    let (target, comment) = match end {
        End::Source => (Target::Drop, "drop traffic from a pod not known yet"),
        End::Destination => (Target::Reject(RejectWith::PortUnreachable), "reject traffic to an unknown pod"),
    };
    vec![
        Rule::new(target)
            .when(is_in(name::POD_NETS, family, end))
            .unless(is_in(name::LOCAL_PODS, family, end))
            .comment(comment),
    ]
}

fn judged(family: Family, direction: Direction) -> Rule {
    let end = match direction {
        Direction::Ingress => End::Destination,
        Direction::Egress => End::Source,
    };
    Rule::jump(name::dispatch(direction, ""))
        .when(is_in(name::isolated(direction), family, end))
        .comment(&format!("pods that policies isolate for {direction}"))
}

fn accept() -> Rule {
    Rule::new(Target::Accept).comment("rule to explicitly ACCEPT traffic that comply to network policies")
}

/// Pods that the same policies select.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub chain: ChainName,
    pub set: SetName,
    /// Addresses of its pods.
    pub addresses: Vec<IpAddr>,
}

/// The chains through which packets of one direction find the chain of their pod's group. A new connection
/// meets at most one chain of groups, however many there are: when they are many, the low bits of the pod's
/// address part them, which a pod keeps for life, so that a pod that changes groups is always in one.
pub(crate) fn dispatch(direction: Direction, groups: &[Group]) -> BTreeMap<ChainName, Vec<Rule>> {
    let mut chains = BTreeMap::new();
    let wanted = groups.len().div_ceil(GROUPS_PER_CHAIN).max(1);
    let depth = wanted.next_power_of_two().trailing_zeros().min(MOST_BITS);
    part(direction, groups, String::new(), depth, &mut chains);
    chains
}

/// One node of the tree: `bits` are those already known, lowest first.
fn part(
    direction: Direction,
    groups: &[Group],
    bits: String,
    depth: u32,
    chains: &mut BTreeMap<ChainName, Vec<Rule>>,
) {
    let known = bits.len();
    let mut rules = Vec::new();
    if known as u32 == depth {
        let end = end(direction);
        for group in groups {
            let here =
                |ip: &IpAddr| bits.bytes().enumerate().all(|(at, bit)| low_bit(*ip, at) == (bit == b'1'));
            if group.addresses.iter().any(here) {
                rules.push(Rule::new(Target::Goto(group.chain)).when(Match::set(group.set, &[end])));
            }
        }
        rules.push(
            Rule::new(Target::Reject(RejectWith::PortUnreachable))
                .comment("isolated, its policies are not known yet"),
        );
    } else {
        for bit in ["1", "0"] {
            let next = format!("{bits}{bit}");
            let mut rule = Rule::new(Target::Goto(name::dispatch(direction, &next)));
            if bit == "1" {
                rule = rule.when(bit_match(direction, groups, known));
            }
            rules.push(rule);
            part(direction, groups, next, depth, chains);
        }
    }
    chains.insert(name::dispatch(direction, &bits), rules);
}

fn end(direction: Direction) -> End {
    match direction {
        Direction::Ingress => End::Destination,
        Direction::Egress => End::Source,
    }
}

/// Bit `at` of the address, counted from the lowest.
fn low_bit(ip: IpAddr, at: usize) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.to_bits() >> at & 1 == 1,
        IpAddr::V6(ip) => ip.to_bits() >> at & 1 == 1,
    }
}

/// The pod's end has this bit: an address with a mask that is no prefix. All groups are of one family.
fn bit_match(direction: Direction, groups: &[Group], at: usize) -> Match {
    let option = match direction {
        Direction::Ingress => "-d",
        Direction::Egress => "-s",
    };
    let v6 = groups.iter().flat_map(|group| &group.addresses).next().is_some_and(IpAddr::is_ipv6);
    let bit = match v6 {
        false => IpAddr::from(std::net::Ipv4Addr::from_bits(1 << at)),
        true => IpAddr::from(std::net::Ipv6Addr::from_bits(1 << at)),
    };
    Match::Raw(vec![option.to_owned(), format!("{bit}/{bit}")])
}

/// What pods of one group meet in one direction: each policy may allow, else the packet is refused.
pub(crate) fn group<'a>(
    direction: Direction,
    policies: impl Iterator<Item = (&'a Key, ChainName)>,
) -> Vec<Rule> {
    let allowed = || Match::Mark { value: ALLOWED, mask: ALLOWED };
    let mut rules = vec![
        Rule::new(Target::Drop)
            .when(Match::State(vec![State::Invalid]))
            .comment("rule to drop invalid state for pod"),
        Rule::new(Target::Mark { value: 0, mask: ALLOWED }),
    ];
    for (key, chain) in policies {
        rules.push(Rule::jump(chain).comment(&shortened(&format!("{key} {direction} policy"))));
        rules.push(Rule::new(Target::Return).when(allowed()));
    }
    rules.push(
        Rule::new(Target::Nflog { group: LOG_GROUP, prefix: String::new() })
            .when(Match::Limit { rate: 10, per: Per::Minute, burst: 10 })
            .comment(&format!("{direction} log-drop")),
    );
    rules
        .push(Rule::new(Target::Reject(RejectWith::PortUnreachable)).comment(&format!("{direction} reject")));
    rules
}

/// One way for a rule of a policy to match: sets for the peers, or none for anybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Peers {
    Anybody,
    Set(SetName),
}

/// Ports of one rule.
#[derive(Clone, Debug)]
pub(crate) enum Ports<'a> {
    Any,
    Numbers(&'a [crate::PolicyPort]),
}

/// Rules for what a policy's rule allows by peers and port numbers.
pub(crate) fn allow(direction: Direction, peers: &Peers, ports: &Ports<'_>, comment: &str) -> Vec<Rule> {
    let base = || {
        let rule = Rule::new(Target::Goto(name::allow()));
        match peers {
            Peers::Anybody => rule,
            Peers::Set(set) => rule.when(Match::set(*set, &[other_end(direction)])),
        }
    };
    let Ports::Numbers(ports) = ports else { return vec![base().comment(comment)] };
    let mut rules = Vec::new();
    for protocol in Protocol::ALL {
        let of = || ports.iter().filter(|port| port.protocol == protocol);
        let base = || base().when(Match::Protocol(ip_protocol(protocol)));
        if of().any(|port| port.ports == PortMatch::Any) {
            rules.push(base().comment(comment));
            continue;
        }
        let ranges = of().filter_map(|port| match port.ports {
            PortMatch::Range(first, last) => Some(PortRange { first, last }),
            _ => None,
        });
        for chunk in chunks(merged(ranges.collect())) {
            let ports = match chunk.as_slice() {
                [one] => Match::Port(End::Destination, *one),
                _ => Match::Ports(End::Destination, chunk),
            };
            rules.push(base().when(ports).comment(comment));
        }
    }
    rules
}

/// A rule for ports by name: the set holds the destination's address and port.
pub(crate) fn allow_named(direction: Direction, peers: &Peers, named: SetName, comment: &str) -> Rule {
    let mut rule = Rule::new(Target::Goto(name::allow()));
    if let Peers::Set(set) = peers {
        rule = rule.when(Match::set(*set, &[other_end(direction)]));
    }
    rule.when(Match::set(named, &[End::Destination, End::Destination])).comment(comment)
}

/// The end of the packet that is not the isolated pod.
fn other_end(direction: Direction) -> End {
    match direction {
        Direction::Ingress => End::Source,
        Direction::Egress => End::Destination,
    }
}

/// kube-router cuts comments that name objects at 120 bytes.
fn shortened(text: &str) -> String {
    let mut end = text.len().min(120);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

/// Comment of a policy's rule, kube-router's words.
pub(crate) fn rule_comment(key: &Key, direction: Direction, kind: &str) -> String {
    shortened(&format!("{key} {direction} {kind}"))
}

/// Ranges sorted, those that meet joined.
fn merged(mut ranges: Vec<PortRange>) -> Vec<PortRange> {
    ranges.sort();
    let mut out: Vec<PortRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match out.last_mut() {
            Some(last) if u32::from(range.first) <= u32::from(last.last) + 1 => {
                last.last = last.last.max(range.last);
            }
            _ => out.push(range),
        }
    }
    out
}

/// As many as one `multiport` match takes: 15, a range counts as two.
fn chunks(ranges: Vec<PortRange>) -> Vec<Vec<PortRange>> {
    let mut out: Vec<Vec<PortRange>> = Vec::new();
    let mut room = 0;
    for range in ranges {
        let slots = if range.first == range.last { 1 } else { 2 };
        match out.last_mut() {
            Some(last) if room >= slots => last.push(range),
            _ => {
                room = 15;
                out.push(vec![range]);
            }
        }
        room -= slots;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_joined_and_fit_multiport() {
        let one = PortRange::one;
        let range = |first, last| PortRange { first, last };
        assert_eq!(
            merged(vec![one(80), range(1, 79), one(82), range(65535, 65535), range(10, 20)]),
            [range(1, 80), one(82), one(65535)]
        );
        let many: Vec<PortRange> = (0..20).map(|n| one(n * 2)).collect();
        let lists = chunks(many);
        assert_eq!(lists.iter().map(Vec::len).collect::<Vec<_>>(), [15, 5]);
        let ranges: Vec<PortRange> = (0..8).map(|n| range(n * 10, n * 10 + 5)).collect();
        assert_eq!(chunks(ranges).iter().map(Vec::len).collect::<Vec<_>>(), [7, 1]);
    }

    fn groups(count: u8) -> Vec<Group> {
        (0..count)
            .map(|n| {
                let names = name::group(Direction::Ingress, &[Key::new("n", format!("p{n}"))]);
                Group {
                    chain: names.chain,
                    set: name::set(&names.set, Family::V4),
                    addresses: vec![IpAddr::from([10, 1, 0, n])],
                }
            })
            .collect()
    }

    #[test]
    fn few_groups_share_one_chain_and_many_are_parted() {
        let few = dispatch(Direction::Ingress, &groups(8));
        assert_eq!(few.len(), 1);
        let many = dispatch(Direction::Ingress, &groups(250));
        // 32 leaves and the nodes above them.
        assert_eq!(many.len(), 63);
        let longest = many.values().map(Vec::len).max().unwrap();
        assert!(longest <= GROUPS_PER_CHAIN + 1, "{longest}");
        let jumps: usize = many
            .values()
            .flatten()
            .filter(|rule| {
                rule.target
                    .as_ref()
                    .is_some_and(|t| t.chain().is_some_and(|c| c.as_str().starts_with("KUBE-POD-FW-")))
            })
            .count();
        assert_eq!(jumps, 250);
    }
}
