//! Policy-routing rules that send a source network to a table: list, add, delete.
//!
//! Wire format: `struct fib_rule_hdr` and FRA_* of linux/fib_rules.h.

use std::fmt;
use std::net::IpAddr;

use ferroute_netlink::{Batch, DecodeError, attributes, flags};
use ipnet::IpNet;

use super::{Error, Family, Network};

const RTM_NEWRULE: u16 = 32;
pub(super) const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;

const FRA_SRC: u16 = 2;
const FRA_PRIORITY: u16 = 6;
const FRA_SUPPRESS_IFGROUP: u16 = 13;
const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
const FRA_TABLE: u16 = 15;
const FRA_PROTOCOL: u16 = 21;
/// FR_ACT_TO_TBL.
const TO_TABLE: u8 = 1;

/// Length of `struct fib_rule_hdr`.
const HEADER: usize = 12;

/// A rule `from SOURCE lookup TABLE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rule {
    /// Source network of the packets.
    pub source: IpNet,
    /// Table they are looked up in.
    pub table: u32,
    /// Order; lower comes first.
    pub priority: u32,
    /// Who made it (RTPROT_*); kernels before 4.17 do not tell, and say 0.
    pub protocol: u8,
}

impl Rule {
    /// Reads an RTM_NEWRULE payload; `None` for rules of any other form (more conditions, other
    /// actions, all sources).
    ///
    /// # Errors
    /// When it is cut off or an attribute has a wrong length.
    pub fn decode(payload: &[u8]) -> Result<Option<Self>, DecodeError> {
        let (header, rest) = super::split_header::<HEADER>(payload)?;
        let [family, to_length, from_length, service, table, _, _, action, bits @ ..] = *header;
        let mut source: Option<IpAddr> = None;
        let (mut table, mut priority, mut protocol) = (u32::from(table), 0, 0);
        let is_plain_header = to_length == 0 && service == 0 && action == TO_TABLE && bits == [0; 4];
        for attribute in attributes(rest) {
            let attribute = attribute?;
            match attribute.kind {
                FRA_SRC => source = Some(attribute.address()?),
                FRA_PRIORITY => priority = attribute.u32()?,
                FRA_TABLE => table = attribute.u32()?,
                FRA_PROTOCOL => protocol = attribute.u8()?,
                // -1 means nothing is suppressed, and is always told.
                FRA_SUPPRESS_PREFIXLEN | FRA_SUPPRESS_IFGROUP if attribute.u32()? == u32::MAX => {}
                _ => return Ok(None),
            }
        }
        let Some(source) = source.filter(|source| Family::of(*source).number() == family) else {
            return Ok(None);
        };
        let Ok(source) = IpNet::new(source, from_length) else { return Ok(None) };
        Ok(is_plain_header.then_some(Rule { source: source.trunc(), table, priority, protocol }))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "from {} lookup {} priority {}", self.source, self.table, self.priority)
    }
}

/// One write to the list of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RuleChange {
    /// Add; fails when the same rule is there.
    Add(Rule),
    /// Delete exactly this one.
    Delete(Rule),
}

impl RuleChange {
    /// The rule that is added or deleted.
    pub fn rule(&self) -> &Rule {
        match self {
            RuleChange::Add(rule) | RuleChange::Delete(rule) => rule,
        }
    }
}

impl Network {
    /// Plain rules of both families into one table.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub fn rules_into(&mut self, table: u32) -> Result<Vec<Rule>, Error> {
        let mut rules = Vec::new();
        for family in Family::BOTH {
            let mut header = [0; HEADER];
            header[0] = family.number();
            self.batch.clear();
            self.batch.message(RTM_GETRULE, flags::DUMP, |body| body.raw(&header));
            let found = self.socket.dump(&self.batch, |kind, payload| {
                if kind != RTM_NEWRULE {
                    return Ok(None);
                }
                Ok(Rule::decode(payload)?.filter(|rule| rule.table == table))
            });
            match found {
                Ok(found) => rules.extend(found),
                // A kernel without the family, or without policy routing in it.
                Err(source)
                    if matches!(source.errno(), Some(nix::libc::EAFNOSUPPORT | nix::libc::EOPNOTSUPP)) => {}
                Err(source) => return Err(Error::Transport { action: "list rules", source }),
            }
        }
        Ok(rules)
    }

    /// Applies changes in order; returns the index of each that failed, with the reason. Deleting what
    /// is gone already is no failure.
    ///
    /// # Errors
    /// When the kernel cannot be spoken to.
    pub fn apply_rules(&mut self, changes: &[RuleChange]) -> Result<Vec<(usize, Error)>, Error> {
        if changes.is_empty() {
            return Ok(Vec::new());
        }
        self.batch.clear();
        for change in changes {
            encode(&mut self.batch, change);
        }
        let failures = self
            .socket
            .execute(&self.batch)
            .map_err(|source| Error::Transport { action: "write rules", source })?;
        Ok(failures
            .into_iter()
            .filter_map(|failure| {
                let index = failure.index;
                let change = changes.get(index)?;
                let gone = failure.errno == nix::libc::ENOENT && matches!(change, RuleChange::Delete(_));
                let action = match change {
                    RuleChange::Add(_) => "add rule",
                    RuleChange::Delete(_) => "delete rule",
                };
                (!gone).then(|| (index, Error::refused(action, change.rule().to_string(), failure)))
            })
            .collect())
    }
}

fn encode(batch: &mut Batch, change: &RuleChange) {
    let (kind, mode) = match change {
        RuleChange::Add(_) => (RTM_NEWRULE, flags::CREATE | flags::EXCL),
        RuleChange::Delete(_) => (RTM_DELRULE, 0),
    };
    let rule = change.rule();
    let mut header = [0; HEADER];
    header[0] = Family::of(rule.source.addr()).number();
    header[2] = rule.source.prefix_len();
    header[4] = u8::try_from(rule.table).unwrap_or(0);
    header[7] = TO_TABLE;
    batch.message(kind, mode, |body| {
        body.raw(&header);
        super::write_address(body, FRA_SRC, rule.source.addr());
        body.u32(FRA_PRIORITY, rule.priority);
        body.u32(FRA_TABLE, rule.table);
        if rule.protocol != 0 {
            body.u8(FRA_PROTOCOL, rule.protocol);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_rule_with_more_conditions_is_another_form() {
        let rule = Rule { source: "10.1.0.0/24".parse().unwrap(), table: 77, priority: 9, protocol: 0 };
        let mut batch = Batch::new();
        encode(&mut batch, &RuleChange::Add(rule));
        let mut bytes = batch.bytes()[16..].to_vec();
        assert_eq!(Rule::decode(&bytes), Ok(Some(rule)));
        // FRA_SUPPRESS_PREFIXLEN -1, as every dump has it.
        bytes.extend([8, 0, 14, 0, 255, 255, 255, 255]);
        assert_eq!(Rule::decode(&bytes), Ok(Some(rule)));
        // FRA_FWMARK 1.
        let mut marked = bytes.clone();
        marked.extend([8, 0, 10, 0, 1, 0, 0, 0]);
        assert_eq!(Rule::decode(&marked), Ok(None));
        // FIB_RULE_INVERT.
        bytes[8] = 2;
        assert_eq!(Rule::decode(&bytes), Ok(None));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = Rule::decode(&bytes);
        }

        #[test]
        fn what_is_written_is_read_back(
            ip in any::<IpAddr>(), length in 0u8..=32, table in 1u32..5000, priority in any::<u32>(),
            protocol in any::<u8>(),
        ) {
            let source = IpNet::new(ip, length).unwrap().trunc();
            let rule = Rule { source, table, priority, protocol };
            let mut batch = Batch::new();
            encode(&mut batch, &RuleChange::Add(rule));
            prop_assert_eq!(Rule::decode(&batch.bytes()[16..]).unwrap(), Some(rule));
        }
    }
}
