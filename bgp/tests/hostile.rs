//! What the hostile messages of the corpus lead to.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use corpus::*;
use ferroute_bgp::message::*;

mod corpus;
#[path = "../fuzz/harness.rs"]
#[allow(dead_code, reason = "the driver uses more of it")]
mod harness;

#[test]
fn each_leads_to_what_the_standards_say() {
    let mut wrong = Vec::new();
    for Case { name, codec, frame, expected } in cases() {
        let result = Message::decode(&frame, &codec);
        let numbers = |result: Result<Decoded, SessionReset>| match result {
            Ok(decoded) => {
                let (announced, withdrawn) = match &decoded.message {
                    Message::Update(update) => {
                        (update.announced.iter().map(|a| a.nlri.len()).sum(), update.withdrawn.len())
                    }
                    _ => (0, 0),
                };
                let blamed: Vec<u8> = decoded.flaws.iter().map(|flaw| flaw.attribute.unwrap_or(0)).collect();
                Ok((announced, withdrawn, decoded.action(), blamed))
            }
            Err(reset) => Err(reset.notification.error.numbers()),
        };
        let expected = match expected {
            Clean(announced, withdrawn) => Ok((announced, withdrawn, None, vec![])),
            Discard(announced, blamed) => {
                let withdrawn = if frame[20] == 0 { 0 } else { 1 };
                Ok((announced, withdrawn, Some(Action::AttributeDiscard), blamed.to_vec()))
            }
            Withdraw(withdrawn, blamed) => Ok((0, withdrawn, Some(Action::TreatAsWithdraw), blamed.to_vec())),
            Reset(code, subcode) => Err((code, subcode)),
        };
        let got = numbers(result.clone());
        if got != expected {
            wrong.push(format!("{name}:\n  expected {expected:?}\n  got {got:?} of {result:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Every case, cut at every length and read on every kind of session: whatever comes of it, it is sound.
#[test]
fn cut_and_misplaced_they_do_no_harm() {
    let codecs = harness::codecs();
    for Case { name, frame, .. } in cases() {
        for length in (19..=frame.len()).step_by(1 + frame.len() / if frame.len() > 500 { 6 } else { 40 }) {
            let mut cut = frame[..length].to_vec();
            cut[16..18].copy_from_slice(&(length as u16).to_be_bytes());
            for codec in &codecs {
                if let Err(finding) = harness::judge(&cut, codec) {
                    panic!("{name}, cut at {length}: {finding}");
                }
            }
        }
    }
}

/// What a four-octet speaker makes of the two pieces (the example of GoBGP issue 3308).
#[test]
fn paths_are_put_together() {
    let path = attribute(0x40, 2, &[2, 5, 0xfd, 0xe8, 0x0f, 0xa0, 0x5b, 0xa0, 0x5b, 0xa0, 0x9c, 0x41]);
    let as4 = attribute(0xc0, 17, &[2, 3, 0, 6, 0x1a, 0x80, 0, 4, 0x93, 0xe0, 0, 0, 0x9c, 0x41]);
    let aggregator = attribute(0xc0, 7, &[0x5b, 0xa0, 10, 0, 0, 1]);
    let as4_aggregator = attribute(0xc0, 18, &[0, 6, 0x1a, 0x80, 10, 0, 0, 1]);
    let frame = update_of(
        &[],
        &[as4.clone(), as4_aggregator.clone(), origin(), path.clone(), next_hop(), aggregator].concat(),
        &ROUTE,
    );
    let read = |frame: &[u8]| match Message::decode(frame, &two_octets()).unwrap().message {
        Message::Update(update) => (*update.announced[0].attributes).clone(),
        other => panic!("{other:?}"),
    };
    let merged = read(&frame);
    assert_eq!(merged.as_path.to_string(), "65000 4000 400000 300000 40001");
    assert_eq!(merged.aggregator.unwrap().asn, Asn(400_000));

    // An aggregate that a two-octet speaker formed since: the old pieces are not true any more.
    let aggregator = attribute(0xc0, 7, &[0xfd, 0xe8, 10, 0, 0, 1]);
    let frame =
        update_of(&[], &[origin(), path, next_hop(), aggregator, as4, as4_aggregator].concat(), &ROUTE);
    let kept = read(&frame);
    assert_eq!(kept.as_path.to_string(), "65000 4000 23456 23456 40001");
    assert_eq!(kept.aggregator.unwrap().asn, Asn(65000));
}

/// Text from a peer is safe to log, and hard resets are told from others.
#[test]
fn notifications_are_read() {
    let read = |body: &[u8]| match Message::decode(&message(3, body), &external()).unwrap().message {
        Message::Notification(notification) => notification,
        other => panic!("{other:?}"),
    };
    let long = read(&[&[6, 2, 255][..], &[b'x'; 255]].concat());
    assert_eq!(long.shutdown_text().unwrap().len(), 255);
    assert_eq!(read(&[6, 4, 200, b'x']).shutdown_text().unwrap(), "x");
    assert_eq!(read(&[255, 255]).to_string(), "error code 255 subcode 255 (255/255)");
    for body in [&[6, 9][..], &[6, 9, 6]] {
        assert!(read(body).is_hard_reset());
        assert_eq!(read(body).inner(), None);
    }
}

/// The data of a NOTIFICATION is what was sent and nothing behind it (CVE-2018-5378).
#[test]
fn answers_hold_nothing_of_the_neighbourhood() {
    let broken = attribute(0x80, 14, &[0, 2, 1, 16, 0x20, 1, 0xd]);
    let frame = update_of(&[], &[broken.clone(), origin(), as_path()].concat(), &[]);
    let reset = Message::decode(&frame, &external()).unwrap_err();
    assert_eq!(reset.notification.data, broken);
    assert_eq!(
        reset.to_string(),
        "MP_REACH_NLRI: is cut off; session reset with UPDATE error: optional attribute error (3/9)"
    );
}

/// An attribute that is not understood goes on as it came, with the Partial bit; one that must stay here
/// does not.
#[test]
fn unknown_attributes_are_passed_on() {
    let frame = with(&[attribute(0xc0, 40, &[0; 37]), attribute(0x80, 201, &[1])].concat());
    let message = Message::decode(&frame, &external()).unwrap().message;
    let mut bytes = Vec::new();
    message.encode(&external(), &mut bytes).unwrap();
    assert_eq!(bytes, with(&attribute(0xe0, 40, &[0; 37])));
}
