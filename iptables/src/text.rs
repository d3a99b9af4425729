//! Words of restore syntax, and a form of a rule in which equal rules have equal text.

use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::Protocol;

/// Appends a word, quoted if restore would take it apart. Inside quotes only `"` and `\` need a backslash.
pub(crate) fn push_word(out: &mut String, word: &str) {
    let bare = |c: char| c.is_ascii_alphanumeric() || "_-./:,+@%=[]~!".contains(c);
    if !word.is_empty() && word.chars().all(bare) {
        out.push_str(word);
        return;
    }
    out.push('"');
    for c in word.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            // A line is a command: these cannot be written at all.
            '\n' | '\r' | '\0' => out.push(' '),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Splits a line of restore syntax into words, quotes and backslashes resolved.
pub(crate) fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' if quoted => word.get_or_insert_default().extend(chars.next()),
            c if c.is_whitespace() && !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// A rule's words (without `-A CHAIN`) in one normal form: the same whether we rendered it or any version
/// of iptables-save printed it.
pub(crate) fn canonical(line: &str) -> String {
    let words = words(line);
    let mut header: Vec<(&'static str, String)> = Vec::new();
    let mut groups: Vec<Group> = Vec::new();
    let mut target: Option<Group> = None;
    let mut negated = false;
    let mut protocol: Option<String> = None;
    let mut at = 0;
    while let Some(word) = words.get(at) {
        at += 1;
        let mut value = || {
            let value = words.get(at).cloned().unwrap_or_default();
            at += 1;
            value
        };
        match word.as_str() {
            "!" => {
                negated = true;
                continue;
            }
            "-s" | "--source" | "--src" => address(&mut header, if negated { "!s" } else { "s" }, &value()),
            "-d" | "--destination" | "--dst" => {
                address(&mut header, if negated { "!d" } else { "d" }, &value())
            }
            "-i" | "--in-interface" => header.push((if negated { "!i" } else { "i" }, value())),
            "-o" | "--out-interface" => header.push((if negated { "!o" } else { "o" }, value())),
            "-p" | "--protocol" => {
                let number = protocol_number(&value());
                if number != "0" {
                    protocol = Some(number.clone());
                    header.push((if negated { "!p" } else { "p" }, number));
                }
            }
            "-f" => header.push((if negated { "!f" } else { "f" }, String::new())),
            "-m" | "--match" => groups.push(Group::new("m", value())),
            "-j" | "--jump" => target = Some(Group::new("j", value())),
            "-g" | "--goto" => target = Some(Group::new("g", value())),
            option => {
                let mut values = Vec::new();
                let free = matches!(option, "--comment" | "--log-prefix" | "--nflog-prefix");
                while let Some(next) = words.get(at) {
                    const SHORT: [&str; 10] = ["!", "-m", "-j", "-g", "-s", "-d", "-i", "-o", "-p", "-f"];
                    let option = next.starts_with("--") || SHORT.contains(&next.as_str());
                    // Free text is one word, whatever it looks like.
                    let ends = if free { !values.is_empty() } else { option };
                    if ends {
                        break;
                    }
                    values.push(next.clone());
                    at += 1;
                }
                let group = match &mut target {
                    Some(target) => Some(target),
                    None => {
                        if groups.is_empty() {
                            groups.push(Group::new("m", protocol.clone().unwrap_or_default()));
                        }
                        groups.last_mut()
                    }
                };
                if let Some(group) = group {
                    group.options.push((option.to_owned(), negated, values));
                }
            }
        }
        negated = false;
    }
    header.sort();
    let mut out = String::with_capacity(line.len());
    for (key, value) in header {
        out.push_str(key);
        out.push(' ');
        push_word(&mut out, &value);
        out.push(' ');
    }
    for group in groups.into_iter().chain(target) {
        group.print(&mut out);
    }
    out.truncate(out.trim_end().len());
    out
}

/// An extension with its options.
struct Group {
    key: &'static str,
    name: String,
    options: Vec<(String, bool, Vec<String>)>,
}

impl Group {
    fn new(key: &'static str, name: String) -> Self {
        let name = match (key, name.as_str()) {
            ("m", "tcp" | "udp" | "sctp" | "udplite" | "icmp" | "icmp6" | "ipv6-icmp") => {
                protocol_number(&name)
            }
            _ => name,
        };
        Self { key, name, options: Vec::new() }
    }

    fn print(mut self, out: &mut String) {
        let mut options: Vec<(String, bool, String)> = Vec::new();
        for (option, negated, values) in std::mem::take(&mut self.options) {
            options.extend(self.option(option, negated, values));
        }
        // `--ipvs` says only what any other positive option of the match says too.
        if self.name == "ipvs" && options.len() > 1 {
            options.retain(|(option, negated, _)| *negated || option != "--ipvs");
        }
        options.sort();
        if self.key == "m" && options.is_empty() {
            // `-m tcp` without options tests nothing beyond `-p tcp`.
            return;
        }
        out.push_str(self.key);
        out.push(' ');
        push_word(out, &self.name);
        for (option, negated, value) in options {
            out.push_str(if negated { " !" } else { " " });
            out.push_str(&option);
            out.push(' ');
            out.push_str(&value);
        }
        out.push(' ');
    }

    /// One option in its normal form; `None` where it says what holds anyway.
    fn option(&self, option: String, negated: bool, values: Vec<String>) -> Option<(String, bool, String)> {
        let first = values.first().map(String::as_str).unwrap_or_default();
        let mut option = option;
        let value = match option.as_str() {
            "--mark" | "--set-xmark" => mark(first),
            "--set-mark" => {
                option = "--set-xmark".to_owned();
                mark(first)
            }
            "--ctstate" | "--src-type" | "--dst-type" => list(first),
            "--tcp-flags" => values.iter().map(|flags| list(flags)).collect::<Vec<_>>().join(" "),
            "--icmp-type" | "--icmpv6-type" => icmp(&self.name, first),
            "--limit" => rate(first),
            "--limit-burst" if first == "5" => return None,
            "--nflog-group" if first == "0" => return None,
            "--log-level" if matches!(first, "4" | "warn" | "warning") => return None,
            "--vproto" => protocol_number(first),
            "--vaddr" => host(first),
            "--sport" | "--source-port" | "--dport" | "--destination-port" => {
                option = option.replace("source-", "s").replace("destination-", "d");
                match first.split_once(':') {
                    Some((low, high)) if low == high => low.to_owned(),
                    Some(("", high)) => format!("0:{high}"),
                    Some((low, "")) => format!("{low}:65535"),
                    _ => first.to_owned(),
                }
            }
            _ => {
                let mut text = String::new();
                for value in &values {
                    if !text.is_empty() {
                        text.push(' ');
                    }
                    push_word(&mut text, value);
                }
                text
            }
        };
        Some((option, negated, value))
    }
}

fn address(header: &mut Vec<(&'static str, String)>, key: &'static str, text: &str) {
    let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    match net {
        // Any address is no condition.
        Ok(net) if net.prefix_len() == 0 && !key.starts_with('!') => {}
        Ok(net) => header.push((key, net.trunc().to_string())),
        Err(_) => header.push((key, text.to_owned())),
    }
}

/// An address with the mask of a single host left out.
fn host(text: &str) -> String {
    match text.parse::<IpNet>() {
        Ok(net) if net.prefix_len() == net.max_prefix_len() => net.addr().to_string(),
        Ok(net) => net.to_string(),
        Err(_) => text.parse::<IpAddr>().map_or_else(|_| text.to_owned(), |ip| ip.to_string()),
    }
}

fn protocol_number(text: &str) -> String {
    let known = (0..=255).map(Protocol).find(|protocol| protocol.name() == Some(text));
    let number = match text {
        "all" => Some(0),
        "icmp6" | "icmpv6" => Some(58),
        "gre" => Some(47),
        "ipip" => Some(4),
        "ipencap" => Some(4),
        _ => known.map(|protocol| protocol.0),
    };
    number.map_or_else(|| text.to_owned(), |number| number.to_string())
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn mark(text: &str) -> String {
    let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
    match (number(value), number(mask)) {
        (Some(value), Some(mask)) => format!("{value:#x}/{mask:#x}"),
        _ => text.to_owned(),
    }
}

fn list(text: &str) -> String {
    let text = match text {
        "ALL" => "FIN,SYN,RST,PSH,ACK,URG",
        text => text,
    };
    let mut items: Vec<&str> = text.split(',').collect();
    items.sort_unstable();
    items.join(",")
}

fn icmp(module: &str, text: &str) -> String {
    let v6 = module == "58";
    match (v6, text) {
        (false, "echo-reply" | "pong") | (_, "0") => "0",
        (false, "destination-unreachable") => "3",
        (false, "redirect") => "5",
        (false, "echo-request" | "ping") => "8",
        (false, "time-exceeded" | "ttl-exceeded") => "11",
        (false, "parameter-problem") => "12",
        (true, "destination-unreachable") => "1",
        (true, "packet-too-big") => "2",
        (true, "time-exceeded" | "ttl-exceeded") => "3",
        (true, "parameter-problem") => "4",
        (true, "echo-request" | "ping") => "128",
        (true, "echo-reply" | "pong") => "129",
        (true, "router-solicitation") => "133",
        (true, "router-advertisement") => "134",
        (true, "neighbour-solicitation" | "neighbor-solicitation") => "135",
        (true, "neighbour-advertisement" | "neighbor-advertisement") => "136",
        (_, text) => text,
    }
    .to_owned()
}

fn rate(text: &str) -> String {
    match text.split_once('/') {
        Some((rate, unit)) => format!("{rate}/{}", unit.chars().next().unwrap_or('s')),
        None => format!("{text}/s"),
    }
}

/// Comma-separated, as iptables wants lists.
pub(crate) fn join<T: std::fmt::Display>(items: &[T]) -> String {
    let mut text = String::new();
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            text.push(',');
        }
        // Writing to a String cannot fail.
        let _ = write!(text, "{item}");
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn same(a: &str, b: &str) {
        assert_eq!(canonical(a), canonical(b), "\n {a}\n {b}");
    }

    #[test]
    fn what_save_prints_equals_what_was_given() {
        same("-p tcp --dport 80 -j ACCEPT", "-p tcp -m tcp --dport 80 -j ACCEPT");
        same("-p tcp -j ACCEPT", "-p tcp -m tcp -j ACCEPT");
        same(
            "-m addrtype --dst-type LOCAL -p udp -j RETURN",
            "-p udp -m addrtype --dst-type LOCAL -j RETURN",
        );
        same("-d 10.1.1.1 -s 10.0.0.0/8", "-s 10.0.0.0/8 -d 10.1.1.1/32");
        same("-s 0.0.0.0/0 -j ACCEPT", "-j ACCEPT");
        same("-d FD00:0::1/128", "-d fd00::1");
        same("-j MARK --set-mark 5", "-j MARK --set-xmark 0x5/0xffffffff");
        same("-m mark ! --mark 5", "-m mark ! --mark 0x5");
        same("-m conntrack --ctstate ESTABLISHED,RELATED", "-m conntrack --ctstate RELATED,ESTABLISHED");
        same("-p 132 -j DROP", "-p sctp -j DROP");
        same("-m comment --comment \"it's\"", "-m comment --comment \"it\\'s\"");
        same("-m comment --comment \"--x\" -j DROP", "-m comment --comment --x -j DROP");
        same("-m limit --limit 10/minute --limit-burst 5", "-m limit --limit 10/min");
        same("-p icmp --icmp-type echo-request", "-p icmp -m icmp --icmp-type 8");
        same("-m ipvs --ipvs --vproto tcp --vaddr 10.0.0.1/32", "-m ipvs --vaddr 10.0.0.1 --vproto 6");
        same("-p tcp --tcp-flags RST,SYN SYN", "-p tcp -m tcp --tcp-flags SYN,RST SYN");
    }

    #[test]
    fn what_differs_stays_different() {
        for (a, b) in [
            ("-s 10.0.0.1 -j DROP", "! -s 10.0.0.1 -j DROP"),
            ("-m set --match-set a src", "-m set ! --match-set a src"),
            ("-m set --match-set a src,dst", "-m set --match-set a dst,src"),
            ("-p tcp -j DROP", "-p udp -j DROP"),
            ("-j X", "-g X"),
            ("-m mark --mark 0x1/0x1", "-m mark --mark 0x1"),
            ("-m comment --comment \"a b\"", "-m comment --comment \"a  b\""),
            ("-m ipvs ! --ipvs", "-m ipvs --ipvs"),
            ("-j LOG", "-j LOG --log-prefix x"),
        ] {
            assert_ne!(canonical(a), canonical(b), "{a} | {b}");
        }
    }

    proptest! {
        #[test]
        fn quoting_loses_nothing(list in prop::collection::vec("[^\n\r\0]{0,12}", 1..5)) {
            let mut line = String::new();
            for word in &list {
                if !line.is_empty() {
                    line.push(' ');
                }
                push_word(&mut line, word);
            }
            prop_assert_eq!(words(&line), list);
        }

        #[test]
        fn any_line_has_a_form(line in ".{0,80}") {
            let _ = canonical(&line);
        }
    }
}
