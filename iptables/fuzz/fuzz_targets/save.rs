//! Any text as save output: removing what was read of ours gives a document about ours only.
#![no_main]

use ferroute_iptables::{Family, Ours, Ruleset, TableName, parse, plan};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let ours = Ours::new(["K-"]);
    if let Ok(found) = parse(text, TableName::Filter, &ours) {
        let Ok(plan) = plan(&found, &Ruleset::default(), &ours, Family::V4) else {
            panic!("an empty ruleset is always ours");
        };
        for line in plan.document(TableName::Filter).lines() {
            let name = line.strip_prefix(':').or_else(|| line.strip_prefix("-X "));
            assert!(name.is_none_or(|name| name.starts_with("K-")), "{line}");
        }
    }
});
