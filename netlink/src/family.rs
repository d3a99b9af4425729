//! The generic netlink control family: names to numbers.

use std::io::Cursor;

use neli::FromBytesWithInput;
use neli::consts::genl::{CtrlAttr, CtrlCmd};
use neli::genl::Genlmsghdr;
use nix::errno::Errno;

use crate::{Batch, DecodeError, Error, Socket};

/// `GENL_ID_CTRL`.
const CONTROL: u16 = 0x10;

/// The message type of a generic netlink family, such as "IPVS". The kernel loads the family's module
/// when it can and the caller may.
///
/// # Errors
///
/// [`Error::NoFamily`] when the kernel does not have it; retry after loading the module.
pub fn resolve_family(socket: &mut Socket, name: &str) -> Result<u16, Error> {
    let mut request = Batch::new();
    request.message(CONTROL, 0, |body| {
        // struct genlmsghdr: command, version 2, reserved.
        body.raw(&[u8::from(CtrlCmd::Getfamily), 2, 0, 0]);
        body.string(CtrlAttr::FamilyName.into(), name);
    });
    let answers = socket.dump(&request, |_, payload| {
        let header =
            Genlmsghdr::<CtrlCmd, CtrlAttr>::from_bytes_with_input(&mut Cursor::new(payload), payload.len())
                .map_err(|_| DecodeError::Missing { what: "the control family's header" })?;
        let id = header
            .attrs()
            .get_attr_handle()
            .get_attr_payload_as::<u16>(CtrlAttr::FamilyId)
            .map_err(|_| DecodeError::Missing { what: "CTRL_ATTR_FAMILY_ID" })?;
        Ok(Some(id))
    });
    match answers {
        Ok(ids) => ids.first().copied().ok_or_else(|| Error::NoFamily { name: name.to_owned() }),
        Err(Error::Refused(failure)) if failure.errno == Errno::ENOENT as i32 => {
            Err(Error::NoFamily { name: name.to_owned() })
        }
        Err(error) => Err(error),
    }
}
