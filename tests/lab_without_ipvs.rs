//! What a kernel without IPVS makes ferroute say. A binary of its own: it takes IPVS out of the lab's
//! kernel, which no other test would survive.
//!
//! Run it through `scripts/lab`; on a kernel that is not the lab's own it only reads.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;

use ferroute_kit::Netns;

#[test]
fn a_kernel_without_ipvs_is_named_with_the_cure_and_left_as_it_is() {
    let lab = std::env::var("FERROUTE_LAB").unwrap_or_default();
    // Only a kernel that was booted for this test is taken apart.
    if lab.starts_with("uml") || lab == "qemu" {
        // Twice: the matches and schedulers go first, then what they needed.
        for _ in 0..2 {
            let modules = std::fs::read_to_string("/proc/modules").unwrap();
            for module in modules.lines().filter_map(|line| line.split(' ').next()) {
                if module.starts_with("ip_vs") || module == "xt_ipvs" {
                    // Those still in use go the second time.
                    let _ = Command::new("rmmod").arg(module).output();
                }
            }
        }
    }
    let netns = Netns::new("bare").unwrap();
    assert!(
        netns.sysctl("net/ipv4/vs/conntrack").is_err(),
        "this kernel has IPVS, and not as a module of the lab ({lab:?}): run it with --kernel uml"
    );
    let look = || netns.sh("ip -o link show").unwrap() + &netns.sh("ip route show table local").unwrap();
    let before = look();
    let folder = std::env::temp_dir().join(format!("ferroute-{}-none", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferroute"));
    command
        .arg(format!("--manifests={}", folder.display()))
        .args(["--hostname-override=n1", "--admin-socket=/run/ferroute-none/a.sock"])
        // No modprobe: the module is missing, not only unloaded.
        .env("PATH", "/nonexistent");
    let output = netns.run(|| command.output()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("{}", said.lines().last().unwrap_or_default());
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in ["IPVS", "modprobe ip_vs", "CONFIG_IP_VS"] {
        assert!(said.lines().last().unwrap_or_default().contains(word), "{word}: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    assert_eq!(look(), before, "nothing was made");
    std::fs::remove_dir_all(folder).unwrap();
}
