use proptest::prelude::*;

use super::*;
use crate::message::{AsPath, Origin};

fn id(last: u8) -> RouterId {
    RouterId([10, 255, 0, last].into())
}

fn attributes(path: &[u32]) -> Attributes {
    Attributes { as_path: AsPath::sequence(path.iter().copied().map(Asn)), ..Attributes::default() }
}

/// An external path of peer number `peer`.
fn path(attributes: &Attributes, peer: u8) -> Candidate<'_> {
    Candidate {
        attributes,
        source: Source::External,
        igp_metric: 0,
        since: 0,
        router_id: id(peer),
        peer_address: IpAddr::from([192, 0, 2, peer]),
        path_id: 0,
    }
}

fn run(candidates: &[Candidate<'_>], options: &Options) -> (Option<usize>, Vec<Reason>) {
    let mut reasons = Vec::new();
    (select(candidates, options, &mut reasons), reasons)
}

/// One case for each step: the second path is worse by this step alone, and better by all later ones.
#[test]
fn every_step_decides() {
    let base = attributes(&[65010, 65099]);
    let with = |change: &dyn Fn(&mut Attributes)| {
        let mut attributes = base.clone();
        change(&mut attributes);
        attributes
    };
    let preferred = with(&|attributes| attributes.local_preference = Some(101));
    let longer = attributes(&[65010, 65098, 65099]);
    let incomplete = with(&|attributes| attributes.origin = Origin::Incomplete);
    let dear = with(&|attributes| attributes.med = Some(1));
    let reflected = with(&|attributes| {
        attributes.originator_id = Some(id(9));
        attributes.cluster_list = vec![id(1), id(2)];
    });
    let direct = with(&|attributes| attributes.originator_id = Some(id(9)));
    let (worse, better) = (path(&base, 9), path(&base, 1));
    let cases = [
        (Step::Local, Candidate { source: Source::Local, ..worse }, path(&preferred, 1)),
        (Step::LocalPreference, path(&preferred, 9), better),
        (Step::AsPathLength, worse, path(&longer, 1)),
        (Step::Origin, worse, path(&incomplete, 1)),
        (Step::Med, worse, path(&dear, 1)),
        (Step::External, worse, Candidate { source: Source::Internal, ..better }),
        (Step::IgpMetric, worse, Candidate { igp_metric: 5, ..better }),
        (Step::Age, worse, Candidate { since: 5, ..better }),
        (Step::RouterId, better, worse),
        (Step::ClusterListLength, path(&direct, 9), path(&reflected, 1)),
        (Step::PeerAddress, better, Candidate { router_id: id(1), ..worse }),
        (Step::PathId, better, Candidate { path_id: 1, ..better }),
    ];
    for (step, winner, loser) in cases {
        for maximum_paths in [1, 2] {
            let options = Options { prefer_oldest: true, maximum_paths, ..Options::default() };
            // Paths that only their names tell apart may share the traffic.
            let behind = if maximum_paths > 1 && step > Step::IgpMetric {
                Reason::Multipath(step)
            } else {
                Reason::Lost(step)
            };
            assert_eq!(run(&[winner, loser], &options), (Some(0), vec![Reason::Best, behind]), "{step}");
            assert_eq!(run(&[loser, winner], &options), (Some(1), vec![behind, Reason::Best]), "{step}");
        }
    }
    assert_eq!(run(&[], &Options::default()), (None, vec![]));
    assert_eq!(run(&[worse], &Options::default()), (Some(0), vec![Reason::Best]));
}

#[test]
fn defaults_count() {
    let (plain, hundred) = (attributes(&[1]), Attributes { local_preference: Some(100), ..attributes(&[1]) });
    assert_eq!(
        run(&[path(&plain, 1), path(&hundred, 2)], &Options::default()).1[1],
        Reason::Lost(Step::RouterId)
    );
    let zero = Attributes { med: Some(0), ..attributes(&[1]) };
    assert_eq!(run(&[path(&plain, 2), path(&zero, 1)], &Options::default()).0, Some(1));
    let worst = Options { missing_med_as_worst: true, ..Options::default() };
    let high = Attributes { med: Some(4_000_000_000), ..attributes(&[1]) };
    assert_eq!(
        run(&[path(&plain, 1), path(&high, 2)], &worst),
        (Some(1), vec![Reason::Lost(Step::Med), Reason::Best])
    );
    // Age is off by default, and never counts between internal paths.
    let old = |peer, since, source| Candidate { since, source, ..path(&plain, peer) };
    let external = [old(1, 5, Source::External), old(2, 0, Source::External)];
    assert_eq!(run(&external, &Options::default()).0, Some(0));
    let oldest = Options { prefer_oldest: true, ..Options::default() };
    assert_eq!(run(&external, &oldest).0, Some(1));
    let internal = [old(1, 5, Source::Internal), old(2, 0, Source::Internal)];
    assert_eq!(run(&internal, &oldest).0, Some(0));
}

/// The circle of three that comparing pairs runs into: whatever the order, the outcome is the same.
#[test]
fn med_counts_within_a_neighbour_as() {
    let a = Attributes { med: Some(10), ..attributes(&[65010, 1]) };
    let b = Attributes { med: Some(5), ..attributes(&[65010, 1]) };
    let c = attributes(&[65020, 1]);
    // Alone, b beats a by MED, c beats b by router id, a beats c by router id.
    let all = [path(&a, 1), path(&b, 3), path(&c, 2)];
    let best = |order: [usize; 3]| {
        let ordered = order.map(|index| all[index]);
        order[run(&ordered, &Options::default()).0.unwrap()]
    };
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        assert_eq!(best(order), 2);
    }
    let always = Options { always_compare_med: true, ..Options::default() };
    let (best, reasons) = run(&all, &always);
    assert_eq!((best, reasons[0], reasons[1]), (Some(2), Reason::Lost(Step::Med), Reason::Lost(Step::Med)));
}

#[test]
fn limits_shared_traffic_to_the_next_best() {
    let base = attributes(&[65010]);
    let all = [path(&base, 4), path(&base, 2), path(&base, 3), path(&base, 1)];
    let options = |maximum_paths| Options { maximum_paths, ..Options::default() };
    let share = |maximum| -> Vec<bool> {
        let reasons = run(&all, &options(maximum)).1;
        reasons.iter().map(|reason| !matches!(reason, Reason::Lost(_))).collect()
    };
    assert_eq!(share(0), [false, false, false, true]);
    assert_eq!(share(1), [false, false, false, true]);
    assert_eq!(share(2), [false, true, false, true]);
    assert_eq!(share(3), [false, true, true, true]);
    assert_eq!(share(9), [true; 4]);
    assert_eq!(rank(&all, &options(1), 3), [3, 1, 2]);
    assert_eq!(rank(&all, &options(1), 9), [3, 1, 2, 0]);
}

fn any_attributes() -> impl Strategy<Value = Attributes> {
    let path = prop::collection::vec(1_u32..3, 0..3);
    (
        path,
        prop::option::of(99_u32..102),
        prop::option::of(0_u32..3),
        any::<bool>(),
        0..3_usize,
        any::<bool>(),
    )
        .prop_map(|(path, local_preference, med, incomplete, clusters, originated)| Attributes {
            local_preference,
            med,
            origin: if incomplete { Origin::Incomplete } else { Origin::Igp },
            originator_id: originated.then_some(id(7)),
            cluster_list: vec![id(100); clusters],
            ..attributes(&path)
        })
}

prop_compose! {
    fn field()(list in prop::collection::vec((any_attributes(), 0..3_u8, 0..2_u32, 1..4_u8, 0..2_u32), 1..7))
        -> Vec<(Attributes, u8, u32, u8, u32)> {
        list
    }
}

fn candidates(list: &[(Attributes, u8, u32, u8, u32)]) -> Vec<Candidate<'_>> {
    list.iter()
        .enumerate()
        .map(|(index, (attributes, source, igp_metric, peer, since))| Candidate {
            source: [Source::Local, Source::Internal, Source::External][usize::from(*source)],
            igp_metric: *igp_metric,
            since: *since,
            path_id: index as u32,
            ..path(attributes, *peer)
        })
        .collect()
}

proptest! {
    /// With MED compared everywhere the steps are a plain order: an independent sort agrees.
    #[test]
    fn agrees_with_a_sort_where_there_is_an_order(list in field()) {
        let candidates = candidates(&list);
        let options = Options { always_compare_med: true, maximum_paths: 3, ..Options::default() };
        let key = |index: &usize| {
            let path = &candidates[*index];
            let attributes = path.attributes;
            (
                (path.source != Source::Local, std::cmp::Reverse(attributes.local_preference.unwrap_or(100))),
                (attributes.as_path.hops(), attributes.origin, attributes.med.unwrap_or(0)),
                (path.source == Source::Internal, path.igp_metric),
                (attributes.originator_id.unwrap_or(path.router_id), attributes.cluster_list.len(), path.peer_address),
                path.path_id,
            )
        };
        let mut sorted: Vec<usize> = (0..candidates.len()).collect();
        sorted.sort_by_key(key);
        let (best, reasons) = run(&candidates, &options);
        prop_assert_eq!(best, Some(sorted[0]));
        prop_assert_eq!(rank(&candidates, &options, usize::MAX), sorted.clone());
        let equal = |index: &usize| {
            let (a, b, c, ..) = key(index);
            let (x, y, z, ..) = key(&sorted[0]);
            (a, b, c) == (x, y, z)
        };
        let share: Vec<usize> = sorted.iter().copied().filter(equal).take(3).collect();
        let mut actual: Vec<usize> =
            (0..reasons.len()).filter(|&index| !matches!(reasons[index], Reason::Lost(_))).collect();
        actual.sort_by_key(key);
        prop_assert_eq!(actual, share);
    }

    /// The order of arrival does not matter, and removing a path that lost changes nothing but by MED.
    #[test]
    fn the_order_does_not_matter(list in field(), turn in 0..7_usize, oldest in any::<bool>()) {
        let all = candidates(&list);
        let mut turned = all.clone();
        turned.rotate_left(turn % all.len());
        turned.reverse();
        let options = Options { maximum_paths: 2, prefer_oldest: oldest, ..Options::default() };
        let (best, reasons) = run(&all, &options);
        let (other, turned_reasons) = run(&turned, &options);
        prop_assert_eq!(best.map(|index| all[index].path_id), other.map(|index| turned[index].path_id));
        for (path, reason) in turned.iter().zip(turned_reasons) {
            prop_assert_eq!(reason, reasons[path.path_id as usize]);
        }
    }
}
