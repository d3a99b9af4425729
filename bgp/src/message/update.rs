//! UPDATE (RFC 4271 section 4.3, multiprotocol by RFC 4760).

use std::sync::Arc;

use super::{
    Action, AfiSafi, Attributes, Codec, Flaw, NextHop, Nlri, NotificationError, SessionReset, UpdateError,
    attribute, nlri,
};

/// Changes of routes. Withdrawals apply before announcements: a prefix in both is announced (RFC 4271
/// section 4.3).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Update {
    /// Routes that are gone, of any family.
    pub withdrawn: Vec<Nlri>,
    /// New or changed routes. A received UPDATE has at most two groups: the classic field and
    /// MP_REACH_NLRI, which differ in the next hop only.
    pub announced: Vec<Announcement>,
    /// The initial routes of this family are complete (RFC 4724 section 2).
    pub end_of_rib: Option<AfiSafi>,
}

/// Routes that share their attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// The attributes.
    pub attributes: Arc<Attributes>,
    /// The prefixes, at least one, all of one family.
    pub nlri: Vec<Nlri>,
}

/// Reads the body of an UPDATE and does what RFC 7606 says of the errors in it.
pub(super) fn decode(body: &[u8], codec: &Codec, flaws: &mut Vec<Flaw>) -> Result<Update, SessionReset> {
    let (withdrawn, attributes, classic) = fields(body).ok_or_else(|| {
        reset(UpdateError::MalformedAttributeList, "the lengths within the UPDATE do not fit the message")
    })?;
    let mut update = Update::default();
    if body == [0; 4] {
        update.end_of_rib = Some(AfiSafi::Ipv4Unicast);
        return Ok(update);
    }
    let mut parsed = attribute::decode(attributes, codec, flaws)?;
    parsed.complete(!classic.is_empty(), codec, flaws);

    if let Some((family, routes)) = parsed.unreach {
        if routes.is_empty() && withdrawn.is_empty() && classic.is_empty() && parsed.count == 1 {
            update.end_of_rib = Some(family);
        } else {
            read(family, routes, codec, flaws, Some(attribute::MP_UNREACH), &mut update.withdrawn)?;
        }
    }
    read(AfiSafi::Ipv4Unicast, withdrawn, codec, flaws, None, &mut update.withdrawn)?;

    let mut attributes = std::mem::take(&mut parsed.attributes);
    if let Some((family, next_hop, routes)) = parsed.reach {
        let mut nlri = Vec::new();
        read(family, routes, codec, flaws, Some(attribute::MP_REACH), &mut nlri)?;
        if !nlri.is_empty() {
            // Copied only where the classic field needs them as well, which is rare.
            let own = if classic.is_empty() { std::mem::take(&mut attributes) } else { attributes.clone() };
            let attributes = Arc::new(Attributes { next_hop, ..own });
            update.announced.push(Announcement { attributes, nlri });
        }
    }
    let mut nlri = Vec::new();
    read(AfiSafi::Ipv4Unicast, classic, codec, flaws, None, &mut nlri)?;
    if !nlri.is_empty() {
        attributes.next_hop = parsed.next_hop.map_or_else(NextHop::default, NextHop::V4);
        update.announced.push(Announcement { attributes: Arc::new(attributes), nlri });
    }

    let fatal = flaws.iter().find(|flaw| flaw.action == Action::TreatAsWithdraw);
    if let Some(flaw) = fatal {
        if classic.is_empty() && !parsed.reaches {
            // RFC 7606 section 5.2: nobody can tell whether the routes to withdraw were found.
            let reason = format!("{flaw}, but there are no routes");
            return Err(reset(UpdateError::MalformedAttributeList, reason));
        }
        for Announcement { mut nlri, .. } in update.announced.drain(..) {
            // Exactly: doubling would take more memory than a hostile message should get.
            update.withdrawn.reserve_exact(nlri.len());
            update.withdrawn.append(&mut nlri);
        }
    }
    Ok(update)
}

/// Withdrawn routes, attributes and announced routes (RFC 4271 section 4.3).
fn fields(body: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (length, rest) = body.split_first_chunk()?;
    let (withdrawn, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
    let (length, rest) = rest.split_first_chunk()?;
    let (attributes, classic) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
    Some((withdrawn, attributes, classic))
}

/// Reads the prefixes of one field, if their family is in use.
fn read(
    family: AfiSafi,
    routes: &[u8],
    codec: &Codec,
    flaws: &mut Vec<Flaw>,
    attribute: Option<u8>,
    out: &mut Vec<Nlri>,
) -> Result<(), SessionReset> {
    if routes.is_empty() {
        return Ok(());
    }
    if !codec.families.contains(family) {
        let reason = format!("{family} is not in use on this session");
        Flaw::note(flaws, attribute, Action::AttributeDiscard, reason);
        return Ok(());
    }
    let form = nlri::Form {
        add_path: codec.add_path_receive.contains(family),
        ipv6: family == AfiSafi::Ipv6Unicast,
    };
    nlri::decode(routes, form, out).map_err(|broken| {
        // RFC 7606 section 5.3, with the subcode of RFC 4760 section 7 for the attributes.
        let error = attribute.map_or(UpdateError::InvalidNetwork, |_| UpdateError::OptionalAttribute);
        reset(error, format!("{family} routes: {broken}"))
    })
}

fn reset(error: UpdateError, reason: impl Into<std::borrow::Cow<'static, str>>) -> SessionReset {
    SessionReset::new(NotificationError::Update(error), [], reason)
}
