//! From octets to messages. Total: any input gives a message or the reason why there is none.

use super::frame::{self, HEADER};
use super::{
    Action, AfiSafi, Codec, Flaw, HeaderError, Message, Notification, NotificationError, Open, RefreshError,
    RefreshKind, RouteRefresh, SessionReset, frame_length, update,
};

/// A message, with the errors in it that the session survives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// What came; what the flaws ask for is done in it.
    pub message: Message,
    /// Errors of an UPDATE, at most [`Flaw::KEPT`] of them; empty for all else.
    pub flaws: Vec<Flaw>,
}

impl Decoded {
    /// The strongest consequence of the flaws; none if the message is clean.
    pub fn action(&self) -> Option<Action> {
        self.flaws.iter().map(|flaw| flaw.action).max()
    }
}

impl Message {
    /// Reads one whole message with its header, as [`super::FrameReader::next_frame`] hands them out.
    ///
    /// # Errors
    ///
    /// What the session does not survive, with the NOTIFICATION to send.
    pub fn decode(frame: &[u8], codec: &Codec) -> Result<Decoded, SessionReset> {
        let length = frame_length(frame, codec)?;
        if length != Some(frame.len()) {
            let error = NotificationError::Header(HeaderError::BadLength);
            return Err(SessionReset::new(error, [], "the message is not as long as its header says"));
        }
        let (header, body) = frame.split_at(HEADER);
        let mut flaws = Vec::new();
        let message = match header[HEADER - 1] {
            frame::OPEN => Self::Open(Open::decode(body)?),
            frame::UPDATE => Self::Update(update::decode(body, codec, &mut flaws)?),
            frame::NOTIFICATION => Self::Notification(notification(body)),
            frame::KEEPALIVE => Self::Keepalive,
            _ => Self::RouteRefresh(route_refresh(body).ok_or_else(|| {
                let reason = format!("a ROUTE-REFRESH cannot have {} octets", frame.len());
                SessionReset::new(NotificationError::RouteRefresh(RefreshError::InvalidLength), frame, reason)
            })?),
        };
        Ok(Decoded { message, flaws })
    }
}

fn notification(body: &[u8]) -> Notification {
    // The header promises two octets at least.
    let (numbers, data) = body.split_first_chunk().unwrap_or((&[0, 0], &[]));
    Notification::with_data(NotificationError::from_numbers(numbers[0], numbers[1]), data)
}

fn route_refresh(body: &[u8]) -> Option<RouteRefresh> {
    let &[high, low, kind, safi] = body else { return None };
    let family = AfiSafi::new(u16::from_be_bytes([high, low]), safi);
    Some(RouteRefresh { family, kind: RefreshKind::from_number(kind) })
}
