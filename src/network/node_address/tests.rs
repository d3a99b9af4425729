use super::*;
use proptest::prelude::*;

const UP: u32 = 1;

fn link(index: u32, name: &str) -> Link {
    let kind = name.starts_with("dummy").then(|| "dummy".to_owned());
    let flags = if name == "lo" { UP | 1 << 3 } else { UP };
    Link { index, name: name.to_owned(), kind, flags, mtu: 1500, master: None }
}

fn on(link: u32, address: &str) -> LinkAddress {
    LinkAddress { link, address: address.parse().unwrap(), scope: 0, flags: 0x80 }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The machine of lb-and-bgp.md 0.4: kubelet on ens1, primary network on ens2, second one on ens3.
struct Machine {
    links: Vec<Link>,
    addresses: Vec<LinkAddress>,
    vips: HashSet<IpAddr>,
    node: Node,
}

impl Machine {
    fn new() -> Self {
        let mut links = vec![
            link(1, "lo"),
            link(2, "ens1"),
            link(3, "ens2"),
            link(4, "ens3"),
            link(5, "kube-bridge"),
            link(6, "docker0"),
            link(7, "dummy0"),
            link(8, "eth9"),
            link(9, "kube-dummy-if"),
        ];
        links[7].master = Some(5);
        let mut addresses = vec![
            on(1, "127.0.0.1/8"),
            on(1, "10.255.0.1/32"),
            on(2, "192.168.1.2/24"),
            on(2, "fd01::2/64"),
            on(2, "fe80::2/64"),
            on(3, "172.31.2.2/24"),
            on(3, "172.31.2.100/32"),
            on(3, "fd02::9/64"),
            on(3, "fd02::2/64"),
            on(4, "172.31.3.2/24"),
            on(4, "fd03::2/64"),
            on(5, "10.244.0.1/24"),
            on(6, "172.17.0.1/16"),
            on(7, "10.254.0.1/32"),
            on(8, "10.9.9.9/24"),
        ];
        addresses[1].scope = 0;
        // A keepalived address, and a temporary one.
        addresses[6].flags |= NO_PREFIX_ROUTE | TEMPORARY_OR_SECONDARY;
        addresses[7].flags |= TEMPORARY_OR_SECONDARY;
        let node = Node {
            name: "a".into(),
            internal_ips: vec![ip("192.168.1.2"), ip("fd01::2")],
            external_ips: vec![ip("203.0.113.2")],
            ..Node::default()
        };
        Self { links, addresses, vips: HashSet::new(), node }
    }

    fn host(&self) -> Host<'_> {
        Host { links: &self.links, addresses: &self.addresses, vips: &self.vips }
    }

    fn choose(&self, method: &str, family: Family) -> Result<Chosen, NoAddress> {
        let reach = |target: &str, family| match (target, family) {
            ("192.168.1.254", Family::V4) => Ok(ip("192.168.1.2")),
            ("localhost", Family::V4) => Ok(ip("127.0.0.1")),
            _ => Err(io::Error::other("no route to host")),
        };
        choose(&method.parse().unwrap(), family, Some(&self.node), &self.host(), reach)
    }
}

#[test]
fn each_method_finds_its_address() {
    let machine = Machine::new();
    for (method, v4, v6) in [
        ("kubernetes-internal-ip", Some("192.168.1.2"), Some("fd01::2")),
        ("first-found", Some("172.31.3.2"), Some("fd03::2")),
        ("skip-interface=^ens3$", Some("172.31.2.2"), Some("fd02::2")),
        ("skip-interface=ens[23],foo", Some("192.168.1.2"), Some("fd01::2")),
        ("skip-interface=ens", None, None),
        ("interface=nope,ens2", Some("172.31.2.2"), Some("fd02::2")),
        // Named, the pod bridge is taken, and a host address on a dummy link too.
        ("interface=kube-bridge", Some("10.244.0.1"), None),
        ("interface=^dummy0$", Some("10.254.0.1"), None),
        ("interface=^lo$", Some("10.255.0.1"), None),
        ("interface=^kube-dummy-if$", None, None),
        ("cidr=10.96.0.0/12,172.31.2.0/24", Some("172.31.2.2"), None),
        ("cidr=fd02::/16,172.31.3.0/24", Some("172.31.3.2"), Some("fd02::2")),
        ("can-reach=192.168.1.254", Some("192.168.1.2"), None),
        ("can-reach=localhost", None, None),
    ] {
        for (family, wanted) in [(Family::V4, v4), (Family::V6, v6)] {
            let found = machine.choose(method, family).ok().map(|chosen| chosen.address);
            assert_eq!(found, wanted.map(ip), "{method} {family:?}");
        }
    }
    let chosen = machine.choose("cidr=172.31.2.0/24", Family::V4).unwrap();
    assert_eq!((chosen.network, chosen.link), (Some("172.31.2.2/24".parse().unwrap()), Some(3)));
}

#[test]
fn vips_and_addresses_that_do_not_stay_are_passed_over() {
    let mut machine = Machine::new();
    machine.vips.insert(ip("172.31.3.2"));
    assert_eq!(machine.choose("first-found", Family::V4).unwrap().address, ip("172.31.2.2"));
    machine.addresses.iter_mut().filter(|found| found.link == 4).for_each(|found| found.flags |= DEPRECATED);
    assert_eq!(machine.choose("first-found", Family::V6).unwrap().address, ip("fd02::2"));
    machine.links[2].flags = 0;
    assert_eq!(machine.choose("first-found", Family::V6).unwrap().address, ip("fd01::2"));
    machine.addresses.iter_mut().for_each(|found| found.flags |= 0x40);
    let error = machine.choose("first-found", Family::V6).unwrap_err();
    assert!(error.to_string().contains("interface="), "{error}");
}

#[test]
fn the_node_objects_address_need_not_be_on_the_machine() {
    let mut machine = Machine::new();
    machine.node.internal_ips.clear();
    let chosen = machine.choose("kubernetes-internal-ip", Family::V4).unwrap();
    assert_eq!(chosen, Chosen { address: ip("203.0.113.2"), network: None, link: None });
    assert!(machine.choose("kubernetes-internal-ip", Family::V6).unwrap_err().reason.contains("--node-ip"));
    let error = choose(&Method::default(), Family::V4, None, &machine.host(), reach).unwrap_err();
    assert!(error.reason.contains("--hostname-override"));
}

#[test]
fn a_choice_does_not_move_to_another_link_by_itself() {
    let mut machine = Machine::new();
    let methods = Methods { overlay: "first-found".parse().unwrap(), ..Methods::default() };
    let mut known = NodeAddresses::default();
    let nowhere = |_: &str, _| Err(io::Error::other("unused"));
    assert!(known.update(&methods, Some(&machine.node), &machine.host(), nowhere));
    assert!(!known.update(&methods, Some(&machine.node), &machine.host(), nowhere));
    assert_eq!(known.get(Purpose::Overlay, Family::V4).unwrap().address, ip("172.31.3.2"));
    assert_eq!(known.get(Purpose::NextHop, Family::V4).unwrap().address, ip("192.168.1.2"));
    assert_eq!(known.problems().count(), 0);

    // A better one appears: the old one stays.
    machine.links.push(link(20, "ens4"));
    machine.addresses.push(on(20, "172.31.4.2/24"));
    assert!(!known.update(&methods, Some(&machine.node), &machine.host(), nowhere));
    // It goes: the last one stays, and that is told.
    let old = machine.addresses.iter().position(|found| found.address.addr() == ip("172.31.3.2")).unwrap();
    machine.addresses.remove(old);
    assert!(!known.update(&methods, Some(&machine.node), &machine.host(), nowhere));
    assert_eq!(known.get(Purpose::Overlay, Family::V4).unwrap().address, ip("172.31.3.2"));
    let problems: Vec<String> = known.problems().collect();
    assert!(problems.len() == 1 && problems[0].contains("172.31.4.2"), "{problems:?}");
    // Its link is renumbered: the new one is taken.
    machine.links.retain(|link| link.index != 20);
    machine.addresses.push(on(4, "172.31.3.77/24"));
    assert!(known.update(&methods, Some(&machine.node), &machine.host(), nowhere));
    assert_eq!(known.get(Purpose::Overlay, Family::V4).unwrap().address, ip("172.31.3.77"));

    // The Node object is followed; when it loses its address the last one stays.
    machine.node.internal_ips = vec![ip("192.168.1.3")];
    assert!(known.update(&methods, Some(&machine.node), &machine.host(), nowhere));
    assert_eq!(known.get(Purpose::Source, Family::V4).unwrap().address, ip("192.168.1.3"));
    assert_eq!(known.get(Purpose::Source, Family::V6).unwrap().address, ip("fd01::2"));
}

#[test]
fn methods_are_read_as_they_are_written() {
    for text in [
        "kubernetes-internal-ip",
        "first-found",
        "can-reach=example.org",
        "interface=eth.*,^ens1$",
        "skip-interface=ens",
        "cidr=10.0.0.0/8,fd00::/8",
    ] {
        assert_eq!(text.parse::<Method>().unwrap().to_string(), text);
    }
    for text in ["", "eth0", "first-found=1", "can-reach", "can-reach=", "interface=(", "cidr=10.0.0.0/33"] {
        let error = text.parse::<Method>().unwrap_err().to_string();
        assert!(error.contains("kubernetes-internal-ip"), "{error}");
    }
}

#[test]
fn patterns_pass_over_what_others_made() {
    for name in
        ["lo", "kube-bridge", "br-0123456789ab", "vxlan.calico", "vxlan-v6.calico", "tun-0123456789a", "wg0"]
    {
        assert!(is_ignored(name), "{name}");
    }
    for name in ["eth0", "br-lan", "bond0", "brens3", "lo0", "tun0", "enp3s0", "netx", "tun-name"] {
        assert!(!is_ignored(name), "{name}");
    }
}

#[test]
fn the_kernel_is_asked_whom_it_would_speak_as() {
    assert_eq!(reach("127.0.0.1", Family::V4).unwrap(), ip("127.0.0.1"));
    assert!(reach("127.0.0.1", Family::V6).is_err());
}

proptest! {
    #[test]
    fn what_is_chosen_is_global_and_of_the_family(
        addresses in prop::collection::vec((1u32..10, any::<IpAddr>(), any::<u8>(), any::<u32>()), 0..20),
        v6: bool,
    ) {
        let mut machine = Machine::new();
        machine.addresses = addresses
            .into_iter()
            .map(|(link, ip, scope, flags)| LinkAddress {
                link,
                address: IpNet::new(ip, 24).unwrap(),
                scope,
                flags,
            })
            .collect();
        let family = if v6 { Family::V6 } else { Family::V4 };
        for method in ["first-found", "skip-interface=ens2", "interface=ens", "cidr=0.0.0.0/0,::/0"] {
            if let Ok(chosen) = machine.choose(method, family) {
                prop_assert!(is_global(chosen.address) && Family::of(chosen.address) == family);
            }
        }
    }
}
