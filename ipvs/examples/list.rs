//! Lists the virtual servers of this network namespace with their destinations and connections.
//! Needs root and a kernel with IPVS.

use ferroute_ipvs::{Error, Handle};

fn main() -> Result<(), Error> {
    let mut ipvs = Handle::open()?;
    let (major, minor, patch) = ipvs.version()?.version;
    println!("IPVS {major}.{minor}.{patch}");
    let table = ipvs.dump()?;
    let mut keys: Vec<_> = table.iter().collect();
    keys.sort_unstable_by_key(|(key, _)| **key);
    for (key, server) in keys {
        println!("{key} {} {:?} persistence {} s", server.scheduler, server.flags, server.timeout);
        for (destination, stats) in ipvs.dump_destinations(*key)? {
            println!(
                "  {} {:?} weight {} active {} inactive {}",
                destination.key(),
                destination.forwarding,
                destination.weight,
                stats.active_connections,
                stats.inactive_connections
            );
        }
    }
    Ok(())
}
