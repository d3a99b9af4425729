//! Objects of somebody else in a node's kernel, which must stay as they are.

use anyhow::{Context, Result, bail};

use crate::{KernelSnapshot, Netns, kernel};

/// What every line about the stranger's objects holds one of.
const MARKS: &[&str] =
    &["stranger", "STRANGER", "203.0.113.7", "198.51.100.", "192.0.2.", "2001:db8:77:", "-f 4242"];

/// A stranger's link, addresses, routes (main and local table), virtual servers (by address and by
/// mark), sets, chains and rules, in both families.
#[derive(Debug)]
pub struct Stranger {
    netns: Netns,
    planted: KernelSnapshot,
}

impl Stranger {
    /// Plants them.
    ///
    /// # Errors
    /// When one cannot be planted.
    pub fn plant(netns: &Netns) -> Result<Self> {
        let kernel = kernel::require()?;
        netns.exec_with_input("ip", &["-batch", "-"], LINKS).context("plant links and routes")?;
        netns.exec_with_input("ipvsadm", &["-R"], SERVERS).context("plant virtual servers")?;
        netns.exec_with_input("ipset", &["restore"], SETS).context("plant sets")?;
        for (command, set) in [(kernel.iptables, "stranger-v4"), (kernel.ip6tables(), "stranger-v6")] {
            let rules = RULES.replace("SET", set);
            let restore = format!("{command}-restore");
            netns.exec_with_input(&restore, &["--noflush"], &rules).context("plant chains and rules")?;
        }
        let planted = Self::look(netns)?;
        for (section, lines) in &planted.sections {
            let elsewhere =
                section.ends_with("tables") || section.ends_with("tables-nft") || *section == "rule";
            if lines.is_empty() && !elsewhere {
                bail!("planted nothing among {section}");
            }
        }
        // In nft or legacy tables, as this kernel has it: two chains and four rules in each family.
        let rules: usize =
            planted.sections.iter().filter(|(name, _)| name.contains("tables")).map(|(_, l)| l.len()).sum();
        if rules != 12 {
            bail!("planted {rules} lines of chains and rules instead of 12:\n{planted}");
        }
        Ok(Self { netns: netns.clone(), planted })
    }

    fn look(netns: &Netns) -> Result<KernelSnapshot> {
        Ok(KernelSnapshot::take(netns)?.only(|line| {
            // ferroute lists every address of the host in a set of its own, the stranger's too.
            !line.contains("kube-router-") && MARKS.iter().any(|mark| line.contains(mark))
        }))
    }

    /// Compares what there is now with what was planted; the difference, empty when untouched.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn difference(&self) -> Result<Vec<String>> {
        Ok(self.planted.difference(&Self::look(&self.netns)?))
    }

    /// Asserts that all stand untouched.
    ///
    /// # Panics
    /// With the difference, or when the kernel cannot be asked.
    pub fn assert_untouched(&self, when: &str) {
        match self.difference() {
            Ok(lines) if lines.is_empty() => {}
            Ok(lines) => panic!("{when}: a stranger's objects were touched:\n{}", lines.join("\n")),
            Err(error) => panic!("{when}: look at a stranger's objects: {error:#}"),
        }
    }
}

const LINKS: &str = "\
link add stranger0 type dummy
link set stranger0 up
addr add 203.0.113.77/32 dev stranger0
addr add 2001:db8:77::77/128 dev stranger0 nodad
route add 198.51.100.0/24 dev stranger0
route add 2001:db8:77:1::/64 dev stranger0
route add local 192.0.2.0/24 dev stranger0 table local
route add local 2001:db8:77:2::/64 dev stranger0 table local
";

const SERVERS: &str = "\
-A -t 203.0.113.77:4444 -s wlc -p 77
-a -t 203.0.113.77:4444 -r 203.0.113.78:4444 -m -w 7
-A -u [2001:db8:77::77]:4444 -s sh
-a -u [2001:db8:77::77]:4444 -r [2001:db8:77::78]:4444 -m -w 3
-A -f 4242 -s rr
-a -f 4242 -r 203.0.113.79:0 -g -w 1
";

const SETS: &str = "\
create stranger-v4 hash:net family inet
add stranger-v4 203.0.113.0/28
create stranger-v6 hash:net family inet6
add stranger-v6 2001:db8:77:3::/64
";

const RULES: &str = "\
*filter
:STRANGER - [0:0]
-A INPUT -m comment --comment \"a stranger's jump\" -j STRANGER
-A STRANGER -m set --match-set SET src -m comment --comment \"a stranger's rule\" -j RETURN
COMMIT
*nat
:STRANGER - [0:0]
-A POSTROUTING -j STRANGER
-A STRANGER -m set --match-set SET dst -j RETURN
COMMIT
";
