//! What must hold for any answer of the kernel, and answers that are worth changing. Shared by the fuzz
//! target, `examples/hammer.rs` and `tests/mutations.rs`.

use ferroute_ipvs::*;
use ferroute_netlink::Batch;

/// nlmsghdr; what follows it is a message's payload.
const HEADER: usize = 16;

/// A generator of its own, so that a seed gives the same run everywhere (xorshift64*, Vigna 2016).
pub struct Numbers(pub u64);

impl Numbers {
    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.any() % limit as u64).unwrap_or(0)
    }
}

fn payload(write: impl FnOnce(&mut Batch)) -> Vec<u8> {
    let mut batch = Batch::new();
    write(&mut batch);
    batch.bytes().get(HEADER..).unwrap_or_default().to_vec()
}

/// Sound answers of all kinds: what we write reads like what the kernel answers, with counters beside.
pub fn seeds() -> Vec<Vec<u8>> {
    let v4 = VirtualServerKey::Address { protocol: Protocol::Udp, address: [10, 96, 0, 1].into(), port: 53 };
    let v6 = VirtualServerKey::Address {
        protocol: Protocol::Sctp,
        address: [0xfd00, 0, 0, 0, 0, 0, 0, 9].into(),
        port: 443,
    };
    let mark = VirtualServerKey::Mark { family: Family::V6, mark: 0x4000_0001 };
    let options = |family| Options {
        scheduler: Scheduler::MH,
        flags: Flags::PERSISTENT | Flags::MH_PORT,
        timeout: 10_800,
        netmask: Netmask::host(family),
    };
    let tunnel = Destination {
        forwarding: Forwarding::Tunnel(Tunnel { kind: TunnelKind::Gue, port: 6080, flags: 1 }),
        upper_threshold: 100,
        lower_threshold: 50,
        ..Destination::masquerade([0xfd00, 0, 0, 0, 0, 0, 0, 7].into(), 0, 7)
    };
    let plain = Destination::masquerade([10, 1, 2, 3].into(), 8080, 1);
    let mut seeds: Vec<Vec<u8>> = [
        Change::CreateServer { key: v4, options: options(Family::V4) },
        Change::CreateServer { key: v6, options: options(Family::V6) },
        Change::CreateServer { key: mark, options: options(Family::V6) },
        Change::CreateDestination { server: v4, destination: plain },
        Change::CreateDestination { server: mark, destination: tunnel },
    ]
    .iter()
    .map(|change| payload(|batch| wire::change(batch, 0x1c, change)))
    .collect();
    let timeouts = Timeouts::default();
    seeds.push(payload(|batch| wire::set_timeouts(batch, 0x1c, &timeouts)));
    seeds.push(payload(|batch| {
        batch.message(0x1c, 0, |body| {
            body.raw(&[15, 1, 0, 0]);
            body.u32(1, 0x1_0201);
            body.u32(2, 4096);
        });
    }));
    // Counters, in 32 and 64 bits (IPVS_SVC_ATTR_STATS and STATS64).
    for nest in [1, 2] {
        seeds.push(payload(|batch| {
            batch.message(0x1c, 0, |body| {
                body.raw(&[1, 1, 0, 0]);
                body.nest(nest, |body| {
                    for (kind, wide) in [(10, false), (12, true)] {
                        body.nest(kind, |body| {
                            for field in 1..=10 {
                                if wide || field == 4 || field == 5 {
                                    body.u64(field, u64::from(field) << 33);
                                } else {
                                    body.u32(field, u32::from(field));
                                }
                            }
                        });
                    }
                });
            });
        }));
    }
    seeds
}

/// One of `corpus`, changed in one to four places.
pub fn mutate(corpus: &[Vec<u8>], numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = corpus[numbers.below(corpus.len())].clone();
    for _ in 0..=numbers.below(4) {
        let at = numbers.below(bytes.len() + 1);
        match numbers.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << numbers.below(8),
            1 if at < bytes.len() => bytes[at] = [0, 1, 2, 4, 10, 127, 128, 255][numbers.below(8)],
            2 => bytes.truncate(at),
            3 => {
                let other = &corpus[numbers.below(corpus.len())];
                let from = numbers.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend(&other[from..]);
            }
            // Attributes begin at multiples of four: a length and a kind.
            4 if bytes.len() >= 8 => {
                let at = numbers.below(bytes.len() / 4) * 4;
                let value = u16::try_from(numbers.below(40)).unwrap_or(0).to_le_bytes();
                let at = at + 2 * numbers.below(2);
                bytes[at..at + 2].copy_from_slice(&value);
            }
            5 => {
                let end = at + numbers.below(bytes.len() - at + 1);
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            _ => bytes.insert(at, numbers.any().to_le_bytes()[0]),
        }
        // Longer ones only cost time.
        bytes.truncate(4096);
    }
    bytes
}

/// Reads an answer in every way and checks what must hold. Says how many ways made sense.
///
/// # Errors
/// What does not hold.
pub fn judge(bytes: &[u8]) -> Result<usize, String> {
    let mut sense = 0;
    if let Ok(answer) = wire::decode_server(bytes) {
        sense += 1;
        let _ = answer.statistics();
        // What was read can be written, and reads as itself from then on.
        let again = |key, options| {
            let written = payload(|batch| wire::change(batch, 0x1c, &Change::CreateServer { key, options }));
            let read =
                wire::decode_server(&written).map_err(|error| format!("{key:?} {options:?}: {error}"))?;
            Ok::<_, String>((read.key, read.options))
        };
        let once = again(answer.key, answer.options)?;
        if once.0 != answer.key || again(once.0, once.1)? != once {
            return Err(format!("{:?} {:?} became {once:?}", answer.key, answer.options));
        }
    }
    for family in [Family::V4, Family::V6] {
        if let Ok(answer) = wire::decode_destination(family, bytes) {
            sense += 1;
            let _ = answer.statistics();
            let server = VirtualServerKey::Mark { family, mark: 1 };
            let change = Change::CreateDestination { server, destination: answer.destination };
            let written = payload(|batch| wire::change(batch, 0x1c, &change));
            let read =
                wire::decode_destination(family, &written).map_err(|error| format!("{change:?}: {error}"))?;
            if read.destination.key() != answer.destination.key() {
                return Err(format!("{:?} became {:?}", answer.destination, read.destination));
            }
        }
    }
    sense += usize::from(wire::decode_timeouts(bytes).is_ok());
    sense += usize::from(wire::decode_info(bytes).is_ok());
    Ok(sense)
}
