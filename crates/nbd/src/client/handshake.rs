//! The handshake: from a connected socket to an export with agreed sizes and contexts.
//!
//! Called by the pool for every connection. Everything the server says is bounded: the time by the deadline
//! that the stream carries, the answers to one option in number and length.

use std::io::{self, Read, Write};

use super::error::ClientError;
use crate::proto::{
    ClientFlags, ExportNameReply, Greeting, HandshakeFlags, Info, InfoCode, InfoRequest, MAX_PAYLOAD,
    MAX_STRING, MetaContextReply, MetaContextRequest, OptionCode, OptionReply, OptionReplyHeader,
    ReplyFormat, TransmissionFlags, encode_option,
};

/// QEMU's meta context for the layer of the backing chain that bytes lie in.
pub(crate) const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";

/// Longest payload of one answer: an id or a code, and a string.
const MAX_ANSWER: u32 = MAX_STRING as u32 + 16;

/// Most answers to one option.
const MAX_ANSWERS: u32 = 256;

/// What the client asks for in the handshake.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HandshakeRequest<'a> {
    pub(crate) export: &'a str,
    /// The context that says what bytes are.
    pub(crate) context: &'a str,
    pub(crate) allocation_depth: bool,
}

/// The ids of `base:allocation`, or of the context in its stead, and of `qemu:allocation-depth`.
type Contexts = (Option<u32>, Option<u32>);

/// An export as the two sides have negotiated it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NegotiatedExport {
    pub(crate) size: u64,
    pub(crate) flags: TransmissionFlags,
    /// Requests are multiples of this, a power of two of at most [`MAX_BLOCK`], and so is `size`.
    pub(crate) min_block: u32,
    /// A payload is at most this, a multiple of `min_block`.
    pub(crate) max_payload: u32,
    pub(crate) format: ReplyFormat,
    /// The ids of the contexts that block status answers for.
    pub(crate) base: Option<u32>,
    pub(crate) depth: Option<u32>,
}

/// The largest minimum block size that is accepted: the protocol's.
pub(crate) const MAX_BLOCK: u32 = 64 << 10;

/// A handshake over one stream. Errors of the stream are passed on in [`ClientError::Lost`].
pub(crate) struct Handshake<'a, S> {
    stream: &'a mut S,
}

impl<'a, S: Read + Write> Handshake<'a, S> {
    pub(crate) fn new(stream: &'a mut S) -> Self {
        Self { stream }
    }

    /// Receives the greeting and answers it.
    pub(crate) fn greet(&mut self) -> Result<HandshakeFlags, ClientError> {
        let flags = Greeting::decode(&self.bytes()?)?.flags;
        let mut answer = ClientFlags::NONE;
        if flags.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            answer = answer | ClientFlags::FIXED_NEWSTYLE;
        }
        if flags.contains(HandshakeFlags::NO_ZEROES) {
            answer = answer | ClientFlags::NO_ZEROES;
        }
        self.send(&answer.encode())?;
        Ok(flags)
    }

    /// Asks for TLS; the TLS handshake follows.
    #[cfg(feature = "tls")]
    pub(crate) fn start_tls(&mut self, flags: HandshakeFlags) -> Result<(), ClientError> {
        if !flags.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            return Err(ClientError::Unsuitable("is too old for TLS".into()));
        }
        self.ask(OptionCode::StartTls, &[])?;
        self.acknowledged(OptionCode::StartTls)
    }

    /// Negotiates the options and enters the transmission phase.
    pub(crate) fn choose(
        &mut self,
        flags: HandshakeFlags,
        wanted: HandshakeRequest<'_>,
    ) -> Result<NegotiatedExport, ClientError> {
        if !flags.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            return self.export_name(flags, wanted);
        }
        self.options(flags, wanted).inspect_err(|error| {
            // The protocol asks for an abort; whether the server receives it does not matter.
            if matches!(error, ClientError::Refused { .. }) {
                let _ = self.ask(OptionCode::Abort, &[]);
            }
        })
    }

    fn options(
        &mut self,
        flags: HandshakeFlags,
        wanted: HandshakeRequest<'_>,
    ) -> Result<NegotiatedExport, ClientError> {
        let format = self.format()?;
        let (base, depth) = match format {
            ReplyFormat::Simple => (None, None),
            _ => self.contexts_of_export(wanted)?,
        };
        match self.about(OptionCode::Go, wanted.export)? {
            Some(export) => export.checked(format, base, depth),
            None => Ok(NegotiatedExport { format, ..self.export_name(flags, wanted)? }),
        }
    }

    fn format(&mut self) -> Result<ReplyFormat, ClientError> {
        for (option, format) in [
            (OptionCode::ExtendedHeaders, ReplyFormat::Extended),
            (OptionCode::StructuredReply, ReplyFormat::Structured),
        ] {
            self.ask(option, &[])?;
            match self.acknowledged(option) {
                Ok(()) => return Ok(format),
                Err(ClientError::Refused { reply, .. }) if reply != OptionReply::ErrTlsReqd => {}
                Err(error) => return Err(error),
            }
        }
        Ok(ReplyFormat::Simple)
    }

    /// Selects the contexts; the ids of those that the server has. One that has just started may not have the
    /// export yet, and have it when it is asked for next: without its contexts, which can be selected only
    /// before, it would be another export than it was.
    fn contexts_of_export(&mut self, wanted: HandshakeRequest<'_>) -> Result<Contexts, ClientError> {
        if let Some(contexts) = self.contexts(wanted)? {
            return Ok(contexts);
        }
        match self.about(OptionCode::Info, wanted.export)? {
            Some(_) => Ok(self.contexts(wanted)?.unwrap_or_default()),
            None => Ok(Contexts::default()),
        }
    }

    /// Selects the contexts; `None` if there is no such export.
    fn contexts(&mut self, wanted: HandshakeRequest<'_>) -> Result<Option<Contexts>, ClientError> {
        let mut queries = vec![wanted.context];
        if wanted.allocation_depth {
            queries.push(ALLOCATION_DEPTH);
        }
        let option = OptionCode::SetMetaContext;
        self.ask(option, &MetaContextRequest { export: wanted.export, queries }.encode())?;
        let (mut base, mut depth) = (None, None);
        for _ in 0..MAX_ANSWERS {
            let (kind, payload) = self.answer(option)?;
            match kind {
                OptionReply::Ack => {
                    if base.is_some() && base == depth {
                        return Err(ClientError::Violation("two contexts have one id".into()));
                    }
                    return Ok(Some((base, depth)));
                }
                OptionReply::MetaContext => {
                    let context = MetaContextReply::decode(&payload)?;
                    let slot = match context.name {
                        name if name == wanted.context => &mut base,
                        ALLOCATION_DEPTH if wanted.allocation_depth => &mut depth,
                        _ => continue,
                    };
                    if slot.replace(context.id).is_some() {
                        return Err(ClientError::Violation("a context was selected twice".into()));
                    }
                }
                OptionReply::ErrUnknown => return Ok(None),
                // The server has no contexts.
                kind if kind.is_error() => return Ok(Some(Contexts::default())),
                kind => return Err(unexpected(option, kind)),
            }
        }
        Err(ClientError::Violation("too many contexts".into()))
    }

    /// `GO` or `INFO`; `None` if the server does not support it.
    fn about(&mut self, option: OptionCode, export: &str) -> Result<Option<Export>, ClientError> {
        self.ask(option, &InfoRequest { export, infos: vec![InfoCode::BlockSize] }.encode())?;
        let mut found = Export::default();
        for _ in 0..MAX_ANSWERS {
            let (kind, payload) = self.answer(option)?;
            match kind {
                OptionReply::Ack => return Ok(Some(found)),
                OptionReply::Info => match Info::decode(&payload)? {
                    Info::Export { size, flags } => found.size = Some((size, flags)),
                    Info::BlockSize { minimum, maximum, .. } => found.blocks = Some((minimum, maximum)),
                    _ => {}
                },
                OptionReply::ErrUnsup => return Ok(None),
                kind if kind.is_error() => return Err(refused(option, kind, &payload)),
                kind => return Err(unexpected(option, kind)),
            }
        }
        Err(ClientError::Violation("too many facts about the export".into()))
    }

    /// `EXPORT_NAME`, for servers without `GO`. A server that refuses closes the connection.
    fn export_name(
        &mut self,
        flags: HandshakeFlags,
        wanted: HandshakeRequest<'_>,
    ) -> Result<NegotiatedExport, ClientError> {
        self.ask(OptionCode::ExportName, wanted.export.as_bytes())?;
        let reply = match self.bytes() {
            Err(ClientError::Lost(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(ClientError::Refused {
                    option: OptionCode::ExportName,
                    reply: OptionReply::ErrUnknown,
                    message: "it closed the connection".into(),
                });
            }
            other => ExportNameReply::decode(&other?),
        };
        if !flags.contains(HandshakeFlags::NO_ZEROES) {
            self.bytes::<{ ExportNameReply::ZEROES }>()?;
        }
        Export { size: Some((reply.size, reply.flags)), blocks: None }.checked(
            ReplyFormat::Simple,
            None,
            None,
        )
    }

    fn acknowledged(&mut self, option: OptionCode) -> Result<(), ClientError> {
        let (kind, payload) = self.answer(option)?;
        match kind {
            OptionReply::Ack if payload.is_empty() => Ok(()),
            kind if kind.is_error() => Err(refused(option, kind, &payload)),
            kind => Err(unexpected(option, kind)),
        }
    }

    fn ask(&mut self, option: OptionCode, payload: &[u8]) -> Result<(), ClientError> {
        let mut out = Vec::with_capacity(16 + payload.len());
        encode_option(&mut out, option, payload);
        self.send(&out)
    }

    fn answer(&mut self, option: OptionCode) -> Result<(OptionReply, Vec<u8>), ClientError> {
        let header = OptionReplyHeader::decode(&self.bytes()?)?;
        if header.option != option {
            return Err(ClientError::Violation(format!("{:?} answers {option:?}", header.option)));
        }
        if header.length > MAX_ANSWER {
            return Err(ClientError::Violation(format!("an answer of {} bytes", header.length)));
        }
        let mut payload = vec![0; header.length as usize];
        self.fill(&mut payload)?;
        Ok((header.kind, payload))
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], ClientError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), ClientError> {
        self.stream.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ClientError::lost(super::link::closed()),
            _ => ClientError::lost(error),
        })
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        self.stream.write_all(bytes).and_then(|()| self.stream.flush()).map_err(ClientError::lost)
    }
}

/// What the server has announced of the export.
#[derive(Debug, Default)]
struct Export {
    size: Option<(u64, TransmissionFlags)>,
    /// Minimum and maximum.
    blocks: Option<(u32, u32)>,
}

impl Export {
    fn checked(
        self,
        format: ReplyFormat,
        base: Option<u32>,
        depth: Option<u32>,
    ) -> Result<NegotiatedExport, ClientError> {
        let violation = |what: String| Err(ClientError::Violation(what));
        let Some((size, flags)) = self.size else { return violation("an export without a size".into()) };
        if !flags.contains(TransmissionFlags::HAS_FLAGS) {
            return violation("an export without flags".into());
        }
        if size > i64::MAX.cast_unsigned() {
            return violation(format!("an export of {size} bytes"));
        }
        // The protocol's default, which every server accepts.
        let default = if size.is_multiple_of(512) { 512 } else { 1 };
        let (min_block, max) = self.blocks.unwrap_or((default, MAX_PAYLOAD));
        if min_block > MAX_BLOCK {
            return violation(format!("a minimum block size of {min_block} bytes"));
        }
        if !size.is_multiple_of(u64::from(min_block)) {
            return Err(ClientError::Unsuitable(format!(
                "has an export of {size} bytes that is no multiple of its block size, {min_block}"
            )));
        }
        let max_payload = max.min(MAX_PAYLOAD) / min_block * min_block;
        Ok(NegotiatedExport { size, flags, min_block, max_payload, format, base, depth })
    }
}

fn refused(option: OptionCode, reply: OptionReply, payload: &[u8]) -> ClientError {
    // Text of the peer, shown to people.
    let message = String::from_utf8_lossy(payload).chars().filter(|c| !c.is_control()).collect();
    ClientError::Refused { option, reply, message }
}

fn unexpected(option: OptionCode, kind: OptionReply) -> ClientError {
    ClientError::Violation(format!("{kind:?} in answer to {option:?}"))
}
