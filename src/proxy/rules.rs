//! The chains of the Service room. Their number and length do not depend on the Services: what
//! changes lives in the sets they name.

use std::collections::BTreeMap;

use ferroute_iptables::{
    AddressType, Builtin, ChainName, Direction, Family, Ipvs, IpvsDirection, IpvsMethod, Jump, Match,
    Position, Protocol, RejectWith, Rule, Ruleset, State, TableName, Target, TcpFlags, icmp_accepts,
};

use super::facts::Facts;
use super::sets::{Role, SetId};
use super::settings::Settings;
use crate::chains::Rules;

/// Guards VIPs in `filter`, marks local clients in `mangle`.
pub const SERVICES: &str = "KUBE-ROUTER-SERVICES";
/// Source-NAT of clients that reach themselves, in `nat`; kube-router's name.
pub const HAIRPIN: &str = "KUBE-ROUTER-HAIRPIN";
/// Source-NAT of Service traffic, in `nat`.
pub const MASQUERADE: &str = "KUBE-ROUTER-MASQUERADE";

/// Every chain of ours: whole names, since other rooms have chains with the same prefix.
pub const CHAINS: [&str; 3] = [SERVICES, HAIRPIN, MASQUERADE];

/// What the chains must be.
pub fn desired(settings: &Settings, facts: &Facts, families: &[Family]) -> Rules {
    families
        .iter()
        .flat_map(|family| {
            [
                ((*family, TableName::Filter), filter(settings, *family)),
                ((*family, TableName::Mangle), mangle(*family)),
                ((*family, TableName::Nat), nat(settings, facts, *family)),
            ]
        })
        .collect()
}

const SOURCE: &[Direction] = &[Direction::Source];
const TARGET: &[Direction] = &[Direction::Destination];
const TARGET_PORT: &[Direction] = &[Direction::Destination, Direction::Destination];

fn chain(name: &str) -> ChainName {
    // Three fixed names of at most 22 bytes; the kernel takes 28.
    #[allow(clippy::expect_used)]
    ChainName::new(name).expect("fixed chain names are short enough")
}

fn set(role: Role, family: Family, flags: &[Direction]) -> Match {
    Match::set(SetId { role, family }.name(), flags)
}

/// What reaches a VIP: ICMP, the ports of Services, and nothing else.
fn filter(settings: &Settings, family: Family) -> Ruleset {
    let is = |role, flags| set(role, family, flags);
    let mut rules = vec![
        Rule::new(Target::Drop)
            .when(is(Role::Guarded, TARGET_PORT))
            .unless(is(Role::Admitted, &[Direction::Destination, Direction::Destination, Direction::Source]))
            .comment("drop sources that loadBalancerSourceRanges does not admit"),
        Rule::new(Target::Drop)
            .when(is(Role::DropRemote, TARGET_PORT))
            .unless(is(Role::LocalPods, SOURCE))
            // Flows to an endpoint that was here finish.
            .when(Match::State(vec![State::New]))
            .comment("drop remote clients where the Local policy leaves no endpoint here"),
    ];
    let mut jumps: Vec<Jump> = [Role::Vips, Role::ServiceRanges]
        .into_iter()
        .map(|role| {
            let rule = Rule::jump(chain(SERVICES))
                .when(is(role, TARGET))
                .comment("handle traffic to IPVS service IPs in custom chain");
            Jump { from: Builtin::Input, position: Position::Top, rule }
        })
        .collect();
    if settings.firewall {
        let mut all = icmp_accepts(family);
        all.append(&mut rules);
        let tcp = || Match::Protocol(Protocol::TCP);
        let reset = || Rule::new(Target::Reject(RejectWith::TcpReset)).when(tcp());
        let opens = Match::TcpFlags { mask: TcpFlags(TcpFlags::SYN.0 | TcpFlags::ACK.0), set: TcpFlags::SYN };
        let refusals = [
            reset().when(opens),
            Rule::new(Target::Reject(RejectWith::PortUnreachable)).when(Match::Protocol(Protocol::UDP)),
            refuse_association(family),
        ];
        all.extend(refusals.map(|refusal| {
            refusal
                .when(is(Role::Unserved, TARGET_PORT))
                .comment("reject connections to services without endpoints")
        }));
        all.push(
            Rule::new(Target::Accept)
                .when(is(Role::VipPorts, TARGET_PORT))
                .comment("allow input traffic to ipvs services"),
        );
        for reject in [reset(), Rule::new(Target::Reject(RejectWith::PortUnreachable))] {
            all.push(
                reject
                    .unless(is(Role::LocalAddresses, TARGET))
                    .comment("reject all unexpected traffic to service IPs"),
            );
        }
        rules = all;
    } else {
        // Without the firewall nothing is accepted or rejected, but what a Service forbids stays
        // forbidden; unbound addresses of a range need no jump then.
        jumps.truncate(1);
    }
    Ruleset { chains: BTreeMap::from([(chain(SERVICES), rules)]), jumps }
}

/// How a new SCTP association is refused. Its client goes on asking after "port unreachable" (RFC 9260
/// section 10), and only IPv4 has a rule that says "protocol unreachable". In IPv6 the packet is left to
/// this host: its stack, or the lack of one, answers with ABORT or "unrecognized next header". It is not
/// accepted, so the host's own rules still guard a daemon that listens on that port of all addresses.
fn refuse_association(family: Family) -> Rule {
    let target = match family {
        Family::V4 => Target::Reject(RejectWith::ProtocolUnreachable),
        Family::V6 => Target::Return,
    };
    // Associations with an endpoint that drains go on.
    Rule::new(target).when(Match::Protocol(Protocol::SCTP)).when(Match::State(vec![State::New]))
}

/// Clients on this node get the mark of the virtual server that is theirs: pods on the way in,
/// the host's own programs on the way out.
fn mangle(family: Family) -> Ruleset {
    let map = || {
        let marks = SetId { role: Role::Marks, family }.name();
        Rule::new(Target::MapMark { set: marks, flags: TARGET_PORT.to_vec() })
    };
    let rules = vec![
        map().when(set(Role::LocalPods, family, SOURCE)).comment("mark pods of this node"),
        map()
            .when(Match::AddressType(Direction::Source, AddressType::Local))
            .comment("mark this node itself"),
    ];
    let jumps = [Builtin::Prerouting, Builtin::Output]
        .into_iter()
        .map(|from| {
            let rule = Rule::jump(chain(SERVICES))
                .when(set(Role::Marks, family, TARGET_PORT))
                .comment("tell local clients of services from remote ones");
            Jump { from, position: Position::Top, rule }
        })
        .collect();
    Ruleset { chains: BTreeMap::from([(chain(SERVICES), rules)]), jumps }
}

/// Answers must come back through this node: where the endpoint is elsewhere and the client is not
/// a pod of this node, the source becomes the node; where a pod meets itself, too.
fn nat(settings: &Settings, facts: &Facts, family: Family) -> Ruleset {
    let to_node = || match facts.source(family == Family::V6) {
        Some(to) => Rule::new(Target::Snat { to, random_fully: true }),
        None => Rule::new(Target::Masquerade { random_fully: true }),
    };
    let hairpin = to_node()
        .when(set(
            Role::Hairpin,
            family,
            &[Direction::Destination, Direction::Destination, Direction::Source],
        ))
        .comment("let local endpoints reach themselves");
    let mut masquerade = to_node();
    if !settings.masquerade_all {
        masquerade = masquerade.unless(set(Role::LocalPods, family, SOURCE)).unless(set(
            Role::LocalPods,
            family,
            TARGET,
        ));
    }
    let masquerade = masquerade.comment("masquerade service traffic that leaves this node");
    let through = |name: &str, method: Option<IpvsMethod>, comment: &str| {
        let mut rule = Rule::jump(chain(name)).when(Match::Ipvs(Ipvs::Direction(IpvsDirection::Original)));
        if let Some(method) = method {
            rule = rule.when(Match::Ipvs(Ipvs::Method(method)));
        }
        Jump { from: Builtin::Postrouting, position: Position::Top, rule: rule.comment(comment) }
    };
    Ruleset {
        chains: BTreeMap::from([(chain(HAIRPIN), vec![hairpin]), (chain(MASQUERADE), vec![masquerade])]),
        jumps: vec![
            through(HAIRPIN, None, "hairpin of service traffic"),
            through(MASQUERADE, Some(IpvsMethod::Masq), "source of service traffic"),
        ],
    }
}
