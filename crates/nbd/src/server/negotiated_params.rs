//! What a client and the server agreed on, and which requests are legal under it.

use std::sync::Arc;

use blockmirror_block::ErrorKind;

use crate::proto::{Command, CommandFlags, Errno, MAX_PAYLOAD, ReplyFormat, Request, TransmissionFlags};

use super::export::{Export, MetaContext};
use super::options::MAX_CONTEXTS;

/// A length, and an id of each context.
const LONGEST_FILTER: u64 = 8 + 4 * MAX_CONTEXTS as u64;

/// A meta context that a client can select.
#[derive(Clone)]
pub(crate) enum Context {
    Allocation,
    Depth,
    Custom(Arc<dyn MetaContext>),
}

/// What holds for one connection from the end of its handshake.
pub(crate) struct NegotiatedParams {
    pub(crate) format: ReplyFormat,
    pub(crate) size: u64,
    pub(crate) writable: bool,
    pub(crate) contexts: Vec<(u32, Context)>,
}

/// Why a request fails, for the client.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) errno: Errno,
    pub(crate) message: String,
    /// The device has cancelled it.
    cancelled: bool,
}

impl Failure {
    pub(crate) fn new(errno: Errno, message: impl Into<String>) -> Self {
        Self { errno, message: message.into(), cancelled: false }
    }

    /// The same on a connection that is `ending`, if so: there a call that was cancelled says that the server
    /// goes down, and the client may connect again. Anywhere else it is an error of the device.
    pub(crate) fn on_connection(mut self, ending: bool) -> Self {
        if ending && self.cancelled {
            self.errno = Errno::SHUTDOWN;
        }
        self
    }
}

impl From<blockmirror_block::Error> for Failure {
    fn from(error: blockmirror_block::Error) -> Self {
        let errno = match error.kind() {
            // ENOSPC says that nothing is done later. Where the device is a client of another server, and its
            // connection was lost, this is not known.
            ErrorKind::NoSpace if !error.was_refused() => Errno::IO,
            kind => Errno::from_kind(kind),
        };
        Self { errno, message: error.to_string(), cancelled: error.kind() == ErrorKind::Cancelled }
    }
}

/// What an export can do, as the server announces it. With `one_client` there is no second connection for
/// which more could be used.
pub(crate) fn transmission_flags(
    export: &Export,
    format: ReplyFormat,
    one_client: bool,
) -> TransmissionFlags {
    use TransmissionFlags as F;
    let mut flags = F::HAS_FLAGS | F::SEND_FLUSH | F::SEND_FUA | F::SEND_CACHE;
    if !one_client {
        flags = flags | F::CAN_MULTI_CONN;
    }
    if export.writable {
        flags = flags | F::SEND_TRIM | F::SEND_WRITE_ZEROES | F::SEND_FAST_ZERO;
    } else {
        flags = flags | F::READ_ONLY;
    }
    if format >= ReplyFormat::Structured {
        flags = flags | F::SEND_DF;
    }
    if format == ReplyFormat::Extended {
        flags = flags | F::BLOCK_STAT_PAYLOAD;
    }
    flags
}

impl NegotiatedParams {
    /// Bytes that follow the header of `request`.
    pub(crate) fn payload_len(&self, request: &Request) -> u64 {
        let declared =
            self.format == ReplyFormat::Extended && request.flags.contains(CommandFlags::PAYLOAD_LEN);
        if request.command == Command::Write || declared { request.length } else { 0 }
    }

    /// Whether `request` can be handed to the device.
    pub(crate) fn check(&self, request: &Request) -> Result<(), Failure> {
        use CommandFlags as F;
        let allowed = match request.command {
            Command::Read if self.format >= ReplyFormat::Structured => F::FUA | F::DF,
            Command::Write if self.format == ReplyFormat::Extended => F::FUA | F::PAYLOAD_LEN,
            Command::WriteZeroes => F::FUA | F::NO_HOLE | F::FAST_ZERO,
            Command::BlockStatus if self.format == ReplyFormat::Extended => {
                F::FUA | F::REQ_ONE | F::PAYLOAD_LEN
            }
            Command::BlockStatus => F::FUA | F::REQ_ONE,
            Command::Other(n) => return Err(Failure::new(Errno::INVAL, format!("unknown command {n}"))),
            _ => F::FUA,
        };
        if request.flags.has_beyond(allowed) {
            let beyond = request.flags.without(allowed);
            return Err(Failure::new(Errno::INVAL, format!("flags {beyond:?} do not go with this command")));
        }
        if request.writes() && !self.writable {
            return Err(Failure::new(Errno::PERM, "the export is read-only"));
        }
        match request.command {
            Command::Flush => return Ok(()),
            Command::BlockStatus if self.contexts.is_empty() => {
                return Err(Failure::new(Errno::INVAL, "no meta context was selected"));
            }
            // The length is that of the filter, which says the length of the range.
            Command::BlockStatus if request.flags.contains(F::PAYLOAD_LEN) => {
                if request.length > LONGEST_FILTER {
                    return Err(Failure::new(Errno::INVAL, "a filter names more contexts than there can be"));
                }
                return Ok(());
            }
            Command::BlockStatus if request.length == 0 => {
                return Err(Failure::new(Errno::INVAL, "status of nothing"));
            }
            Command::Read | Command::Cache if request.length > u64::from(MAX_PAYLOAD) => {
                let errno = if self.format == ReplyFormat::Extended { Errno::OVERFLOW } else { Errno::INVAL };
                return Err(Failure::new(errno, "longer than 32 MiB"));
            }
            _ => {}
        }
        self.check_bounds(request.command, request.offset, request.length)
    }

    pub(crate) fn check_bounds(&self, command: Command, offset: u64, length: u64) -> Result<(), Failure> {
        if offset.checked_add(length).is_some_and(|end| end <= self.size) {
            return Ok(());
        }
        let errno = match command {
            Command::Write | Command::WriteZeroes => Errno::NOSPC,
            _ => Errno::INVAL,
        };
        Err(Failure::new(errno, format!("{length} bytes at {offset} reach past the end at {}", self.size)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(
        params: &NegotiatedParams,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
    ) -> Option<Errno> {
        params.check(&Request { flags, command, cookie: 0, offset, length }).err().map(|f| f.errno)
    }

    #[test]
    fn requests_past_the_end_fail_as_the_document_says() {
        let params =
            NegotiatedParams { format: ReplyFormat::Extended, size: 1000, writable: true, contexts: vec![] };
        for (command, errno) in [
            (Command::Read, Errno::INVAL),
            (Command::Write, Errno::NOSPC),
            (Command::WriteZeroes, Errno::NOSPC),
            (Command::Trim, Errno::INVAL),
            (Command::Cache, Errno::INVAL),
        ] {
            let none = CommandFlags::NONE;
            assert_eq!(check(&params, command, none, 999, 2), Some(errno));
            assert_eq!(check(&params, command, none, u64::MAX, 2), Some(errno));
            assert_eq!(check(&params, command, none, 999, 1), None);
            assert_eq!(check(&params, command, none, 1000, 0), None);
        }
        assert_eq!(check(&params, Command::Flush, CommandFlags::FUA, u64::MAX, u64::MAX), None);
    }

    #[test]
    fn flags_go_only_with_their_commands() {
        let simple =
            NegotiatedParams { format: ReplyFormat::Simple, size: 1000, writable: false, contexts: vec![] };
        assert_eq!(check(&simple, Command::Read, CommandFlags::DF, 0, 1), Some(Errno::INVAL));
        assert_eq!(check(&simple, Command::Write, CommandFlags::NONE, 0, 1), Some(Errno::PERM));
        assert_eq!(check(&simple, Command::Other(99), CommandFlags::NONE, 0, 1), Some(Errno::INVAL));
        assert_eq!(check(&simple, Command::BlockStatus, CommandFlags::NONE, 0, 1), Some(Errno::INVAL));
        let structured = NegotiatedParams { format: ReplyFormat::Structured, ..simple };
        assert_eq!(check(&structured, Command::Read, CommandFlags::DF, 0, 1), None);
        assert_eq!(check(&structured, Command::Read, CommandFlags::PAYLOAD_LEN, 0, 1), Some(Errno::INVAL));
        assert_eq!(
            check(&structured, Command::Read, CommandFlags::from_bits(0x80), 0, 1),
            Some(Errno::INVAL)
        );
    }
}
