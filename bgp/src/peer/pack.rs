//! Routes to UPDATE messages.

use super::Batch;
use super::status::Board;
use crate::message::{AfiSafi, Codec, EncodeError, Families, Message, Nlri, RefreshKind, RouteRefresh};

/// Routes that cannot be told to a peer. They are withdrawn instead, so that it does not keep what
/// it was told before.
#[derive(Debug)]
pub(super) struct Unsendable {
    pub error: EncodeError,
    pub prefixes: usize,
}

/// Appends a batch as messages: withdrawals first, then announcements, between the marks that
/// belong to them.
pub(super) fn pack(batch: &Batch, codec: &Codec, board: &Board, out: &mut Vec<u8>) -> Vec<Unsendable> {
    let mut unsendable = Vec::new();
    mark(batch.refresh_begins, RefreshKind::Begin, codec, board, out);
    withdraw(&batch.withdrawn, codec, board, out, &mut unsendable);
    for announcement in &batch.announced {
        match codec.announce(&announcement.attributes, announcement.nlri.iter().copied(), out) {
            Ok(messages) => board.sent.count_updates(messages),
            Err(error) => {
                unsendable.push(Unsendable { error, prefixes: announcement.nlri.len() });
                withdraw(&announcement.nlri, codec, board, out, &mut unsendable);
            }
        }
    }
    for family in batch.end_of_rib.and(codec.families).iter() {
        codec.end_of_rib(family, out);
        board.sent.count_updates(1);
    }
    mark(batch.refresh_ends, RefreshKind::End, codec, board, out);
    unsendable
}

fn withdraw(
    nlri: &[Nlri],
    codec: &Codec,
    board: &Board,
    out: &mut Vec<u8>,
    unsendable: &mut Vec<Unsendable>,
) {
    // Prefixes of one family go into one message.
    for family in AfiSafi::SUPPORTED {
        let prefixes = || nlri.iter().copied().filter(|nlri| nlri.family() == family);
        if prefixes().next().is_none() {
            continue;
        }
        match codec.withdraw(prefixes(), out) {
            Ok(messages) => board.sent.count_updates(messages),
            // Of a family that is not exchanged: the peer has none of these.
            Err(error) => unsendable.push(Unsendable { error, prefixes: prefixes().count() }),
        }
    }
}

/// Where an answer to a refresh begins or ends, if the peer knows such marks (RFC 7313).
fn mark(families: Families, kind: RefreshKind, codec: &Codec, board: &Board, out: &mut Vec<u8>) {
    if !codec.enhanced_refresh {
        return;
    }
    for family in families.and(codec.families).iter() {
        let message = Message::RouteRefresh(RouteRefresh { family, kind });
        if message.encode(codec, out).is_ok() {
            board.sent.count(&message);
        }
    }
}
