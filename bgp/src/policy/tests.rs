use std::net::{Ipv4Addr, Ipv6Addr};

use super::*;
use crate::message::{AfiSafi, AsPath, ExtendedCommunity, LargeCommunity, NextHop, Origin, RouterId};

const OWN: Asn = Asn(65000);

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn id(last: u8) -> RouterId {
    RouterId([10, 255, 0, last].into())
}

fn neighbour(address: &str, asn: u32) -> Neighbour {
    Neighbour { address: ip(address), asn: Asn(asn) }
}

fn route() -> Attributes {
    Attributes {
        as_path: AsPath::sequence([65010, 65050, 65099].map(Asn)),
        next_hop: NextHop::from(ip("192.0.2.10")),
        med: Some(50),
        communities: vec![Community::new(65010, 1), Community::new(65010, 2)],
        large_communities: vec![LargeCommunity::new(Asn(65010), 1, 2)],
        extended_communities: vec![ExtendedCommunity([0, 2, 0xfd, 0xf2, 0, 0, 0, 1])],
        ..Attributes::default()
    }
}

fn subject<'a>(attributes: &'a Attributes, neighbour: &'a Neighbour) -> Subject<'a> {
    Subject {
        prefix: net("10.1.0.0/16"),
        attributes: Cow::Borrowed(attributes),
        source: Source::External,
        tag: 0,
        learned_from: Some(neighbour),
        neighbour,
    }
}

#[test]
fn conditions_hold_when_they_should() {
    let (attributes, peer) = (route(), neighbour("192.0.2.10", 65010));
    let subject = subject(&attributes, &peer);
    let prefixes =
        |text: &str| Arc::new([PrefixRange::orlonger(net(text))].into_iter().collect::<PrefixSet>());
    let by_address =
        |text: &str| Arc::new(NeighbourSet { addresses: [net(text)].into_iter().collect(), asns: vec![] });
    let by_asn = |asn| Arc::new(NeighbourSet { addresses: PrefixSet::default(), asns: vec![Asn(asn)] });
    let cases = [
        (Condition::Prefix(prefixes("10.0.0.0/8")), true),
        (Condition::Prefix(prefixes("11.0.0.0/8")), false),
        (Condition::Prefix(Arc::default()), false),
        (Condition::Neighbour(by_address("192.0.2.10/32")), true),
        (Condition::Neighbour(by_address("192.0.2.11/32")), false),
        (Condition::Neighbour(by_asn(65010)), true),
        (Condition::Neighbour(Arc::default()), false),
        (Condition::LearnedFrom(by_asn(65010)), true),
        (Condition::LearnedFrom(by_asn(65011)), false),
        (Condition::Community(vec![Pattern::Exact(Community::new(65010, 2))]), true),
        (Condition::Community(vec![Pattern::Exact(Community::new(65010, 3))]), false),
        (Condition::Community(vec![Pattern::Administrator(65010)]), true),
        (Condition::Community(vec![Pattern::Any]), true),
        (Condition::Community(vec![]), false),
        (Condition::LargeCommunity(vec![Pattern::Administrator(Asn(65010))]), true),
        (Condition::LargeCommunity(vec![Pattern::Exact(LargeCommunity::new(Asn(65010), 1, 3))]), false),
        (Condition::ExtendedCommunity(vec![Pattern::Administrator([0, 2])]), true),
        (Condition::ExtendedCommunity(vec![Pattern::Administrator([0, 3])]), false),
        (Condition::AsPathContains(vec![Asn(1), Asn(65050)]), true),
        (Condition::AsPathContains(vec![Asn(1)]), false),
        (Condition::AsPathNeighbour(vec![Asn(65010)]), true),
        (Condition::AsPathNeighbour(vec![Asn(65050)]), false),
        (Condition::AsPathOrigin(vec![Asn(65099)]), true),
        (Condition::AsPathOrigin(vec![Asn(65010)]), false),
        (Condition::AsPathLength(3..=3), true),
        (Condition::AsPathLength(4..=255), false),
        (Condition::NextHop(prefixes("192.0.2.0/24")), true),
        (Condition::NextHop(prefixes("192.0.3.0/24")), false),
        (Condition::Family(AfiSafi::Ipv4Unicast), true),
        (Condition::Family(AfiSafi::Ipv6Unicast), false),
        (Condition::Source(vec![Source::External, Source::Local]), true),
        (Condition::Source(vec![Source::Internal]), false),
        (Condition::Origin(Origin::Igp), true),
        (Condition::Origin(Origin::Egp), false),
        (Condition::Tag(vec![0]), false),
    ];
    for (condition, expected) in cases {
        assert_eq!(condition.holds(&subject), expected, "{condition:?}");
        assert_eq!(
            Condition::Not(Box::new(condition.clone())).holds(&subject),
            !expected,
            "not {condition:?}"
        );
    }
    let own = Subject { source: Source::Local, tag: 7, learned_from: None, ..subject };
    assert!(Condition::Tag(vec![6, 7]).holds(&own));
    assert!(!Condition::Tag(vec![6]).holds(&own));
    assert!(!Condition::LearnedFrom(by_asn(65010)).holds(&own));
}

#[test]
fn actions_change_what_they_say() {
    let peer = neighbour("192.0.2.10", 65010);
    let list = |values: &[u16]| -> Vec<Community> {
        values.iter().map(|&value| Community::new(65010, value)).collect()
    };
    let after = |action: Action| {
        let attributes = route();
        let mut subject = subject(&attributes, &peer);
        let mut next_hop = None;
        action.apply(&mut subject, OWN, &mut next_hop);
        let changed = matches!(subject.attributes, Cow::Owned(_));
        assert_eq!(changed, *subject.attributes != attributes, "{action:?} copies without need");
        (subject.attributes.into_owned(), next_hop)
    };
    assert_eq!(after(Action::LocalPreference(7)).0.local_preference, Some(7));
    assert_eq!(after(Action::Med(None)).0.med, None);
    assert_eq!(after(Action::Med(Some(50))).0.med, Some(50));
    assert_eq!(after(Action::Communities(Edit::Set(list(&[9])))).0.communities, list(&[9]));
    assert_eq!(after(Action::Communities(Edit::Add(list(&[2, 9])))).0.communities, list(&[1, 2, 9]));
    let first = Pattern::Exact(Community::new(65010, 1));
    assert_eq!(after(Action::Communities(Edit::Remove(vec![first]))).0.communities, list(&[2]));
    assert_eq!(
        after(Action::Communities(Edit::Remove(vec![Pattern::Administrator(65010)]))).0.communities,
        []
    );
    assert_eq!(
        after(Action::Communities(Edit::Remove(vec![Pattern::Administrator(1)]))).0.communities,
        list(&[1, 2])
    );
    assert_eq!(after(Action::LargeCommunities(Edit::Remove(vec![Pattern::Any]))).0.large_communities, []);
    assert_eq!(after(Action::ExtendedCommunities(Edit::Set(vec![]))).0.extended_communities, []);
    let path = |action| after(action).0.as_path.to_string();
    assert_eq!(path(Action::Prepend { asn: None, times: 2 }), "65000 65000 65010 65050 65099");
    assert_eq!(path(Action::Prepend { asn: Some(Asn(7)), times: 1 }), "7 65010 65050 65099");
    assert_eq!(path(Action::Prepend { asn: None, times: 0 }), "65010 65050 65099");
    let choice = NextHopChoice::Address(ip("192.0.2.99"));
    assert_eq!(after(Action::NextHop(choice)), (route(), Some(choice)));

    // Towards an internal peer the own AS would be taken for a loop.
    let (attributes, inside) = (route(), neighbour("192.0.2.30", 65000));
    let mut subject = subject(&attributes, &inside);
    Action::Prepend { asn: None, times: 2 }.apply(&mut subject, OWN, &mut None);
    Action::Prepend { asn: Some(OWN), times: 2 }.apply(&mut subject, OWN, &mut None);
    assert_eq!(*subject.attributes, attributes);
}

fn statement(
    conditions: Vec<Condition>,
    actions: Vec<Action>,
    disposition: Option<Disposition>,
) -> Statement {
    Statement { name: "test".into(), conditions, actions, disposition }
}

#[test]
fn statements_run_in_order_and_see_what_came_before() {
    let marked = Community::new(65000, 1);
    let policy = Policy {
        statements: vec![
            statement(vec![], vec![Action::Communities(Edit::Add(vec![marked]))], None),
            statement(
                vec![Condition::Tag(vec![1])],
                vec![Action::LocalPreference(1)],
                Some(Disposition::Reject),
            ),
            statement(
                vec![Condition::Community(vec![Pattern::Exact(marked)])],
                vec![Action::LocalPreference(2)],
                Some(Disposition::Accept),
            ),
            statement(vec![], vec![Action::LocalPreference(3)], Some(Disposition::Reject)),
        ],
        otherwise: Disposition::Reject,
    };
    let (attributes, peer) = (route(), neighbour("192.0.2.10", 65010));
    let mut subject = subject(&attributes, &peer);
    let verdict = policy.evaluate(&mut subject, OWN);
    assert_eq!(verdict, Verdict { disposition: Disposition::Accept, statement: Some(2), next_hop: None });
    assert_eq!(subject.attributes.local_preference, Some(2));
    let verdict = Policy::reject_all().evaluate(&mut subject, OWN);
    assert_eq!((verdict.disposition, verdict.statement), (Disposition::Reject, None));

    // Draining neighbours: lowered, and still accepted by what follows.
    let drain = Policy { statements: vec![Statement::graceful_shutdown()], otherwise: Disposition::Accept };
    let leaving = Attributes { communities: vec![Community::GRACEFUL_SHUTDOWN], ..route() };
    let mut subject = self::subject(&leaving, &peer);
    assert_eq!(drain.evaluate(&mut subject, OWN).disposition, Disposition::Accept);
    assert_eq!(subject.attributes.local_preference, Some(0));
}

#[test]
fn signatures_tell_prefixes_apart_where_the_policy_does() {
    let inside = |text: &str| Condition::Prefix(Arc::new([net(text)].into_iter().collect()));
    let of = |conditions: Vec<Condition>| Policy {
        statements: vec![statement(conditions, vec![], Some(Disposition::Accept))],
        otherwise: Disposition::Reject,
    };
    let policy = of(vec![
        inside("10.0.0.0/8"),
        Condition::Not(Box::new(inside("10.1.0.0/16"))),
        Condition::Tag(vec![1]),
    ]);
    let signature = |prefix| policy.signature(net(prefix));
    assert_eq!(signature("11.0.0.0/8"), signature("12.0.0.0/8"));
    assert_ne!(signature("10.0.0.0/8"), signature("12.0.0.0/8"));
    assert_ne!(signature("10.1.0.0/16"), signature("12.0.0.0/8"));
    assert!(of(vec![inside("10.0.0.0/8"); 64]).signature(net("10.0.0.0/8")).is_some());
    assert_eq!(of(vec![inside("10.0.0.0/8"); 65]).signature(net("10.0.0.0/8")), None);
}

fn importer<'a>(neighbour: &'a Neighbour, policy: Option<&'a Policy>) -> Importer<'a> {
    Importer {
        own: OWN,
        router_id: id(1),
        cluster_id: id(99),
        neighbour,
        allow_own_as: 0,
        enforce_first_as: true,
        policy,
    }
}

#[test]
fn import_refuses_loops_whatever_the_policy() {
    let all = Policy::accept_all();
    let (outside, inside) = (neighbour("192.0.2.10", 65010), neighbour("192.0.2.30", 65000));
    let prefix = net("10.0.0.0/8");
    let path =
        |asns: &[u32]| Attributes { as_path: AsPath::sequence(asns.iter().copied().map(Asn)), ..route() };
    let outcome = |importer: Importer<'_>, attributes: &Attributes| {
        import(&importer, prefix, attributes).map(Cow::into_owned)
    };
    let external = importer(&outside, Some(&all));
    let internal = importer(&inside, None);
    assert_eq!(outcome(external, &route()), Ok(route()));
    assert_eq!(outcome(external, &path(&[65010, 65000])), Err(Refusal::OwnAs));
    let once = Importer { allow_own_as: 1, ..external };
    assert!(outcome(once, &path(&[65010, 65000])).is_ok());
    assert_eq!(outcome(once, &path(&[65010, 65000, 65000])), Err(Refusal::OwnAs));
    assert_eq!(outcome(external, &path(&[65011])), Err(Refusal::FirstAs));
    assert_eq!(outcome(external, &path(&[])), Err(Refusal::FirstAs));
    assert!(outcome(Importer { enforce_first_as: false, ..external }, &path(&[65011])).is_ok());
    assert_eq!(outcome(importer(&outside, None), &route()), Err(Refusal::NoPolicy));

    assert!(outcome(internal, &path(&[])).is_ok());
    let back = Attributes { originator_id: Some(id(1)), ..route() };
    assert_eq!(outcome(internal, &back), Err(Refusal::OwnOriginator));
    let circled = Attributes { cluster_list: vec![id(3), id(99)], ..route() };
    assert_eq!(outcome(internal, &circled), Err(Refusal::OwnCluster));
    let none = Policy::reject_all();
    assert_eq!(outcome(Importer { policy: Some(&none), ..internal }, &route()), Err(Refusal::Policy(None)));
    let to_peer = Policy {
        statements: vec![statement(
            vec![],
            vec![Action::NextHop(NextHopChoice::Peer)],
            Some(Disposition::Accept),
        )],
        otherwise: Disposition::Reject,
    };
    let taken = outcome(importer(&inside, Some(&to_peer)), &route()).unwrap();
    assert_eq!(taken.next_hop.address(), inside.address);
}

struct Case {
    neighbour: Neighbour,
    client: bool,
    next_hop_self: bool,
    extended_next_hop: bool,
    policy: Option<Policy>,
    addresses: LocalAddresses,
}

impl Case {
    fn to(asn: u32) -> Self {
        Self {
            neighbour: neighbour("192.0.2.77", asn),
            client: false,
            next_hop_self: false,
            extended_next_hop: false,
            policy: Some(Policy::accept_all()),
            addresses: LocalAddresses {
                v4: Some([192, 0, 2, 1].into()),
                v6: Some("2001:db8::1".parse().unwrap()),
                link_local: Some("fe80::1".parse().unwrap()),
            },
        }
    }

    fn choosing(self, choice: NextHopChoice) -> Self {
        let choose = statement(vec![], vec![Action::NextHop(choice)], Some(Disposition::Accept));
        Self { policy: Some(Policy { statements: vec![choose], otherwise: Disposition::Reject }), ..self }
    }

    /// `from`: nobody, or AS and whether it is a client; its router id is 10.255.0.5.
    fn give(
        &self,
        attributes: &Attributes,
        prefix: &str,
        from: Option<(u32, bool)>,
    ) -> Result<Attributes, Withheld> {
        let sender = from.map(|(asn, _)| neighbour("192.0.2.5", asn));
        let learned_from = sender.as_ref().zip(from).map(|(neighbour, (_, client))| LearnedFrom {
            neighbour,
            router_id: id(5),
            client,
            is_receiver: false,
        });
        let exporter = Exporter {
            own: OWN,
            cluster_id: id(99),
            neighbour: &self.neighbour,
            router_id: id(77),
            client: self.client,
            addresses: self.addresses,
            extended_next_hop: self.extended_next_hop,
            next_hop_self: self.next_hop_self,
            policy: self.policy.as_ref(),
        };
        let route = Outgoing { prefix: net(prefix), attributes, tag: 0, learned_from };
        export(&exporter, &route).map(Cow::into_owned)
    }
}

const V4: &str = "10.0.0.0/8";
const V6: &str = "2001:db8:1::/48";
const EXTERNAL: Option<(u32, bool)> = Some((65010, false));
const INTERNAL: Option<(u32, bool)> = Some((65000, false));
const CLIENT: Option<(u32, bool)> = Some((65000, true));

#[test]
fn crosses_the_border_of_the_as_as_it_should() {
    let transitive = ExtendedCommunity([0, 2, 0, 1, 0, 0, 0, 1]);
    let bandwidth = ExtendedCommunity::link_bandwidth(65000, 1e9);
    let inside = Attributes {
        local_preference: Some(200),
        originator_id: Some(id(8)),
        cluster_list: vec![id(9)],
        extended_communities: vec![bandwidth, transitive],
        ..route()
    };
    let given = Case::to(65020).give(&inside, V4, INTERNAL).unwrap();
    let expected = Attributes {
        as_path: AsPath::sequence([65000, 65010, 65050, 65099].map(Asn)),
        next_hop: NextHop::V4([192, 0, 2, 1].into()),
        med: None,
        extended_communities: vec![transitive],
        ..route()
    };
    assert_eq!(given, expected);
    // Of our own routes MED and bandwidth are meant for the neighbour; local preference never is.
    let given =
        Case::to(65020).give(&Attributes { as_path: AsPath::empty(), ..inside.clone() }, V4, None).unwrap();
    assert_eq!((given.med, given.extended_communities.len(), given.local_preference), (Some(50), 2, None));
    // What the policy sets stays.
    let set = statement(vec![], vec![Action::Med(Some(3))], Some(Disposition::Accept));
    let policy = Some(Policy { statements: vec![set], otherwise: Disposition::Reject });
    assert_eq!(Case { policy, ..Case::to(65020) }.give(&inside, V4, EXTERNAL).unwrap().med, Some(3));

    // Inside the AS all of it travels, and there is always a local preference.
    let given = Case::to(65000).give(&route(), V4, EXTERNAL).unwrap();
    assert_eq!(given, Attributes { local_preference: Some(100), ..route() });
}

#[test]
fn reflects_by_the_rules() {
    let rows = [
        // from, the receiver is a client, outcome
        (INTERNAL, false, Err(Withheld::NotReflected)),
        (INTERNAL, true, Ok(())),
        (CLIENT, false, Ok(())),
        (CLIENT, true, Ok(())),
        (EXTERNAL, false, Ok(())),
        (None, false, Ok(())),
    ];
    for (from, client, expected) in rows {
        let given = Case { client, ..Case::to(65000) }.give(&route(), V4, from);
        assert_eq!(given.as_ref().map(|_| ()).map_err(|withheld| *withheld), expected, "{from:?} {client}");
        let reflected = from.is_some_and(|(asn, _)| asn == 65000);
        if let Ok(given) = given {
            assert_eq!(given.originator_id, reflected.then_some(id(5)));
            assert_eq!(given.cluster_list, if reflected { vec![id(99)] } else { vec![] });
        }
    }
    let twice = Attributes { originator_id: Some(id(8)), cluster_list: vec![id(9)], ..route() };
    let given = Case::to(65000).give(&twice, V4, CLIENT).unwrap();
    assert_eq!((given.originator_id, given.cluster_list), (Some(id(8)), vec![id(99), id(9)]));
    let own = Attributes { originator_id: Some(id(77)), ..route() };
    assert_eq!(Case::to(65000).give(&own, V4, CLIENT), Err(Withheld::Originator));
    // Next hop self leaves reflected routes alone; only a policy may change them.
    let changing = Case { next_hop_self: true, ..Case::to(65000) };
    assert_eq!(changing.give(&route(), V4, CLIENT).unwrap().next_hop, route().next_hop);
    assert_eq!(changing.give(&route(), V4, EXTERNAL).unwrap().next_hop, NextHop::V4([192, 0, 2, 1].into()));
    let forced = Case::to(65000).choosing(NextHopChoice::SelfAddress);
    assert_eq!(forced.give(&route(), V4, CLIENT).unwrap().next_hop, NextHop::V4([192, 0, 2, 1].into()));
}

#[test]
fn obeys_well_known_communities_of_learned_routes() {
    let with = |community| Attributes { communities: vec![community], ..route() };
    let rows = [
        (Community::NO_ADVERTISE, Err(Withheld::NoAdvertise), Err(Withheld::NoAdvertise)),
        (Community::NO_EXPORT, Ok(()), Err(Withheld::NoExport)),
        (Community::NO_EXPORT_SUBCONFED, Ok(()), Err(Withheld::NoExportSubconfed)),
        (Community::BLACKHOLE, Ok(()), Ok(())),
    ];
    for (community, inside, outside) in rows {
        let attributes = with(community);
        assert_eq!(Case::to(65000).give(&attributes, V4, EXTERNAL).map(|_| ()), inside, "{community}");
        assert_eq!(Case::to(65020).give(&attributes, V4, EXTERNAL).map(|_| ()), outside, "{community}");
        assert!(Case::to(65020).give(&attributes, V4, None).is_ok(), "our own routes may ask the neighbour");
    }
    assert_eq!(Case { policy: None, ..Case::to(65020) }.give(&route(), V4, None), Err(Withheld::NoPolicy));
    assert!(Case { policy: None, ..Case::to(65000) }.give(&route(), V4, None).is_ok());
    let closed = Case { policy: Some(Policy::reject_all()), ..Case::to(65000) };
    assert_eq!(closed.give(&route(), V4, None), Err(Withheld::Policy(None)));
}

#[test]
fn chooses_next_hops() {
    let v4 = |text: &str| NextHop::V4(text.parse::<Ipv4Addr>().unwrap());
    let v6 = |text: &str| NextHop::from(IpAddr::V6(text.parse::<Ipv6Addr>().unwrap()));
    let own_v6 =
        NextHop::V6 { global: "2001:db8::1".parse().unwrap(), link_local: Some("fe80::1".parse().unwrap()) };
    let via = |next_hop| Attributes { next_hop, ..route() };
    let given = |case: &Case, next_hop, prefix, from| {
        case.give(&via(next_hop), prefix, from).map(|given| given.next_hop)
    };
    let (outside, inside) = (Case::to(65020), Case::to(65000));
    let (far, unset) = (v4("198.51.100.1"), NextHop::default());
    // Learned: our address outside, as it was inside. Our own: as originated, or our address.
    assert_eq!(given(&outside, far, V4, EXTERNAL), Ok(v4("192.0.2.1")));
    assert_eq!(given(&inside, far, V4, EXTERNAL), Ok(far));
    assert_eq!(given(&outside, far, V4, None), Ok(far));
    assert_eq!(given(&outside, unset, V4, None), Ok(v4("192.0.2.1")));
    assert_eq!(given(&inside, unset, V4, None), Ok(v4("192.0.2.1")));
    assert_eq!(given(&inside, unset, V6, None), Ok(own_v6));
    assert_eq!(given(&Case { next_hop_self: true, ..Case::to(65020) }, far, V4, None), Ok(v4("192.0.2.1")));
    // A link-local address stays on its link.
    let both =
        NextHop::V6 { global: "2001:db8::9".parse().unwrap(), link_local: Some("fe80::9".parse().unwrap()) };
    assert_eq!(given(&inside, both, V6, EXTERNAL), Ok(v6("2001:db8::9")));
    assert_eq!(given(&inside, v6("fe80::9"), V6, EXTERNAL), Ok(own_v6));
    // The policy's word counts.
    let unchanged = Case::to(65020).choosing(NextHopChoice::Unchanged);
    assert_eq!(given(&unchanged, far, V4, EXTERNAL), Ok(far));
    let named = Case::to(65020).choosing(NextHopChoice::Address(ip("203.0.113.9")));
    assert_eq!(given(&named, far, V4, EXTERNAL), Ok(v4("203.0.113.9")));
    assert_eq!(given(&named, far, V6, EXTERNAL), Err(Withheld::NoNextHop));
    // Families: IPv6 next hops for IPv4 only where agreed.
    let six = LocalAddresses { v4: None, ..outside.addresses };
    let without_v4 = Case { addresses: six, ..Case::to(65020) };
    assert_eq!(given(&without_v4, far, V4, EXTERNAL), Err(Withheld::NoNextHop));
    let agreed = Case { addresses: six, extended_next_hop: true, ..Case::to(65020) };
    assert_eq!(given(&agreed, far, V4, EXTERNAL), Ok(own_v6));
    assert_eq!(given(&inside, v6("2001:db8::9"), V4, EXTERNAL), Err(Withheld::NoNextHop));
    let unnumbered = LocalAddresses { v4: None, v6: None, ..six };
    let unnumbered = Case { addresses: unnumbered, extended_next_hop: true, ..Case::to(65020) };
    assert_eq!(given(&unnumbered, far, V4, EXTERNAL), Ok(v6("fe80::1")));
    // Never the peer itself.
    assert_eq!(given(&inside, v4("192.0.2.77"), V4, EXTERNAL), Err(Withheld::NextHopIsPeer));
}
