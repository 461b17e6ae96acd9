//! From the first byte to the transmission phase: fixed newstyle negotiation.
//!
//! Runs on a thread of its own, which blocks, but never past the deadline. It reads no byte beyond the
//! handshake: what follows is the connection's. Nothing a client says is believed before it is checked; what
//! it asks too much of is answered with an error, what breaks the protocol ends it.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use tracing::field::Empty;
use tracing::{Span, debug, error_span, info, warn};

use crate::proto::{
    BASE_ALLOCATION, ClientFlags, ExportNameReply, Greeting, HandshakeFlags, Info, InfoCode, InfoRequest,
    MAX_PAYLOAD, MetaContextReply, MetaContextRequest, OptionCode, OptionHeader, OptionReply, ReplyFormat,
    ServerEntry, TransmissionFlags, encode_option_reply,
};

use super::ServerError;
use super::export_runtime::ExportRuntime;
use super::handshake_set::Handshaking;
use super::negotiated_params::{Context, NegotiatedParams, transmission_flags};
use super::options::{MAX_CONTEXTS, MAX_OPTION, MAX_SKIPPED_OPTION};
use super::socket::Socket;
use super::state::ServerState;
use super::transport::Transport;

/// Preferred size of requests when the device says nothing larger.
const PREFERRED_BLOCK: u32 = 4096;
/// Larger units of a device are not worth announcing: clients would do read-modify-write for them.
const MAX_PREFERRED_BLOCK: u32 = 64 << 10;

impl ServerState {
    /// Takes a connected client through the handshake, on a thread of its own.
    pub(crate) fn serve(self: &Arc<Self>, fd: OwnedFd) -> Result<(), ServerError> {
        let socket = Arc::new(Socket::new(fd));
        let handshaking = self.handshakes.begin(&socket).ok_or(ServerError::Stopped)?;
        // Without connections it waits without a timeout.
        self.acceptor().waker().wake();
        let state = Arc::clone(self);
        thread::Builder::new()
            .name("nbd-handshake".into())
            .spawn(move || {
                let deadline = Instant::now() + state.options.handshake_limit;
                let _span = connection_span(&socket).entered();
                // A client that fails sees the end of its connection.
                if let Err(error) = run(&state, Transport::plain(socket), &handshaking, deadline) {
                    log_end(&error);
                }
            })
            .map_err(|cause| ServerError::System { what: "start a thread", cause })?;
        Ok(())
    }
}

/// The span of a connection. Which client of which export it is, is recorded at the end of the handshake.
fn connection_span(socket: &Socket) -> Span {
    let span = error_span!("connection", peer = Empty, export = Empty, client = Empty);
    if !span.is_disabled() {
        span.record("peer", socket.peer());
    }
    span
}

/// Logs why a handshake led to no connection. Clients that leave during it, as those do that list exports,
/// are no reason to warn.
fn log_end(error: &io::Error) {
    match error.kind() {
        io::ErrorKind::ConnectionAborted | io::ErrorKind::UnexpectedEof => {
            debug!(%error, "left in the handshake")
        }
        _ => warn!(%error, "handshake failed"),
    }
}

/// Takes a client through the handshake and hands it to its export.
///
/// # Errors
/// The client went away, was too slow, gave up, or broke the protocol. There is nothing to answer: the socket
/// closes.
fn run(
    server: &Arc<ServerState>,
    transport: Transport,
    handshaking: &Handshaking,
    deadline: Instant,
) -> io::Result<()> {
    let mut handshake = Handshake {
        server,
        transport,
        deadline,
        no_zeroes: false,
        format: ReplyFormat::Simple,
        selected: None,
        out: Vec::new(),
    };
    let offered = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    handshake.out.extend_from_slice(&Greeting { flags: offered }.encode());
    handshake.send()?;
    let flags = ClientFlags::decode(handshake.read_array()?);
    if flags.has_beyond(ClientFlags::ALL) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    handshake.no_zeroes = flags.contains(ClientFlags::NO_ZEROES);
    loop {
        let header = OptionHeader::decode(&handshake.read_array()?).map_err(invalid)?;
        if let Some((runtime, mut params)) = handshake.option(header)? {
            params.contexts = handshake.contexts_for(&runtime);
            let permit = handshaking
                .become_client(&server.connection_limit, deadline)
                .ok_or(io::ErrorKind::TimedOut)?;
            // A client counts from the moment that it is answered so.
            let pending = runtime.reserve().ok_or(io::ErrorKind::NotConnected)?;
            handshake.send()?;
            let tls = handshake.transport.is_tls();
            Span::current().record("export", &*runtime.export.name);
            info!(tls, writable = params.writable, "connected");
            runtime.serve(pending, handshake.transport, params, permit);
            return Ok(());
        }
        handshake.send()?;
    }
}

struct Handshake<'a> {
    server: &'a Arc<ServerState>,
    transport: Transport,
    deadline: Instant,
    no_zeroes: bool,
    format: ReplyFormat,
    /// The export that meta contexts were selected for, and which.
    selected: Option<(Arc<ExportRuntime>, Selected)>,
    out: Vec<u8>,
}

/// Contexts with their ids.
type Selected = Vec<(u32, Context)>;
/// What `GO` and `EXPORT_NAME` end the handshake with.
type Ready = Option<(Arc<ExportRuntime>, NegotiatedParams)>;

impl Handshake<'_> {
    fn option(&mut self, header: OptionHeader) -> io::Result<Ready> {
        let OptionHeader { option, length } = header;
        if length > MAX_OPTION {
            if length > MAX_SKIPPED_OPTION || option == OptionCode::ExportName {
                return Err(io::ErrorKind::InvalidData.into());
            }
            self.skip(length)?;
            self.refuse(option, OptionReply::ErrTooBig, "the option's payload is too long");
            return Ok(None);
        }
        let mut payload = vec![0; length as usize];
        self.read(&mut payload)?;
        if !self.transport.is_tls()
            && self.server.requires_tls()
            && !matches!(option, OptionCode::StartTls | OptionCode::Abort)
        {
            if option == OptionCode::ExportName {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            self.refuse(option, OptionReply::ErrTlsReqd, "TLS is required: STARTTLS comes first");
            return Ok(None);
        }
        let has_payload = matches!(
            option,
            OptionCode::ExportName
                | OptionCode::Info
                | OptionCode::Go
                | OptionCode::ListMetaContext
                | OptionCode::SetMetaContext
                | OptionCode::Abort
                | OptionCode::Other(_)
        );
        if !has_payload && !payload.is_empty() {
            self.refuse(option, OptionReply::ErrInvalid, "the option has no payload");
            return Ok(None);
        }
        match option {
            OptionCode::ExportName => return self.export_name(&payload).map(Some),
            OptionCode::Abort => {
                self.reply(option, OptionReply::Ack, &[]);
                // The client may have gone without waiting for it.
                let _ = self.send();
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            OptionCode::List => self.list(),
            OptionCode::StartTls => self.start_tls()?,
            OptionCode::Info | OptionCode::Go => return Ok(self.info(option, &payload)),
            OptionCode::StructuredReply => self.upgrade(option, ReplyFormat::Structured),
            OptionCode::ExtendedHeaders => self.upgrade(option, ReplyFormat::Extended),
            OptionCode::ListMetaContext | OptionCode::SetMetaContext => self.meta_context(option, &payload),
            OptionCode::Other(_) => {
                self.refuse(option, OptionReply::ErrUnsup, "the option is not known");
            }
        }
        Ok(None)
    }

    fn export_name(&mut self, payload: &[u8]) -> io::Result<(Arc<ExportRuntime>, NegotiatedParams)> {
        let name = std::str::from_utf8(payload).map_err(invalid)?;
        // This option has no way to say no; nor a way to speak of extended headers.
        let runtime = self.server.find(name).filter(|_| self.format < ReplyFormat::Extended);
        let runtime = runtime.ok_or(io::ErrorKind::NotFound)?;
        let params = self.params(&runtime);
        let flags = self.flags(&runtime);
        self.out.extend_from_slice(&ExportNameReply { size: params.size, flags }.encode());
        if !self.no_zeroes {
            self.out.extend_from_slice(&[0; ExportNameReply::ZEROES]);
        }
        Ok((runtime, params))
    }

    fn params(&self, runtime: &Arc<ExportRuntime>) -> NegotiatedParams {
        NegotiatedParams {
            format: self.format,
            size: runtime.export.device.len(),
            writable: runtime.export.writable,
            contexts: Vec::new(),
        }
    }

    fn flags(&self, runtime: &ExportRuntime) -> TransmissionFlags {
        transmission_flags(&runtime.export, self.format, self.server.options.max_connections == 1)
    }

    /// What was selected, if it was for this very export.
    fn contexts_for(&mut self, runtime: &Arc<ExportRuntime>) -> Selected {
        match self.selected.take() {
            Some((chosen, contexts)) if Arc::ptr_eq(&chosen, runtime) => contexts,
            _ => Vec::new(),
        }
    }

    fn list(&mut self) {
        for runtime in self.server.exports() {
            let entry =
                ServerEntry { name: &runtime.export.name, description: &runtime.export.description }.encode();
            self.reply(OptionCode::List, OptionReply::Server, &entry);
        }
        self.reply(OptionCode::List, OptionReply::Ack, &[]);
    }

    fn upgrade(&mut self, option: OptionCode, format: ReplyFormat) {
        if self.format == ReplyFormat::Extended && format == ReplyFormat::Structured {
            self.refuse(option, OptionReply::ErrExtHeaderReqd, "extended headers are in use already");
        } else if self.format >= format {
            self.refuse(option, OptionReply::ErrInvalid, "in use already");
        } else {
            self.format = format;
            self.reply(option, OptionReply::Ack, &[]);
        }
    }

    fn info(&mut self, option: OptionCode, payload: &[u8]) -> Ready {
        let request = match InfoRequest::decode(payload) {
            Ok(request) => request,
            Err(e) => {
                self.refuse(option, OptionReply::ErrInvalid, &e.to_string());
                return None;
            }
        };
        let runtime = self.find(option, request.export)?;
        let params = self.params(&runtime);
        let export = &runtime.export;
        if request.infos.contains(&InfoCode::Name) {
            self.reply(option, OptionReply::Info, &Info::Name(export.name.clone()).encode());
        }
        if !export.description.is_empty() {
            self.reply(option, OptionReply::Info, &Info::Description(export.description.clone()).encode());
        }
        let preferred = export.device.geometry().request_alignment.next_power_of_two();
        let sizes = Info::BlockSize {
            minimum: 1,
            preferred: preferred.clamp(PREFERRED_BLOCK, MAX_PREFERRED_BLOCK),
            maximum: MAX_PAYLOAD,
        };
        self.reply(option, OptionReply::Info, &sizes.encode());
        let flags = self.flags(&runtime);
        self.reply(option, OptionReply::Info, &Info::Export { size: params.size, flags }.encode());
        self.reply(option, OptionReply::Ack, &[]);
        (option == OptionCode::Go).then_some((runtime, params))
    }

    fn meta_context(&mut self, option: OptionCode, payload: &[u8]) {
        let request = match MetaContextRequest::decode(payload) {
            Ok(request) => request,
            Err(e) => return self.refuse(option, OptionReply::ErrInvalid, &e.to_string()),
        };
        if self.format == ReplyFormat::Simple {
            return self.refuse(option, OptionReply::ErrInvalid, "structured replies come first");
        }
        let Some(runtime) = self.find(option, request.export) else { return };
        let listing = option == OptionCode::ListMetaContext;
        if !listing {
            self.selected = None;
        }
        let mut chosen = Vec::new();
        for (id, (name, context)) in (0..).zip(runtime.contexts()) {
            let wanted = (listing && request.queries.is_empty())
                || request.queries.iter().any(|query| matches_query(query, name, listing));
            if wanted && chosen.len() < MAX_CONTEXTS {
                // Ids say nothing in a list.
                let id = if listing { 0 } else { id };
                self.reply(option, OptionReply::MetaContext, &MetaContextReply { id, name }.encode());
                chosen.push((id, context));
            }
        }
        if !listing {
            self.selected = Some((Arc::clone(&runtime), chosen));
        }
        self.reply(option, OptionReply::Ack, &[]);
    }

    fn find(&mut self, option: OptionCode, name: &str) -> Option<Arc<ExportRuntime>> {
        if self.server.is_stopping() {
            self.refuse(option, OptionReply::ErrShutdown, "the server is stopping");
            return None;
        }
        let found = self.server.find(name);
        if found.is_none() {
            self.refuse(option, OptionReply::ErrUnknown, &format!("export '{name}' is not there"));
        }
        found
    }

    #[cfg(feature = "tls")]
    fn start_tls(&mut self) -> io::Result<()> {
        use super::tls::TlsSession;

        let option = OptionCode::StartTls;
        if self.transport.is_tls() {
            self.refuse(option, OptionReply::ErrInvalid, "TLS is in use already");
            return Ok(());
        }
        let Some(config) = self.server.options.tls.config() else {
            self.refuse(option, OptionReply::ErrPolicy, "this server has no TLS");
            return Ok(());
        };
        self.reply(option, OptionReply::Ack, &[]);
        self.send()?;
        let session = TlsSession::new(config).map_err(io::Error::other)?;
        let socket = Arc::clone(&self.transport.socket);
        while session.is_handshaking() {
            match session.turn(&socket) {
                Ok(true) => socket.wait(true, self.deadline)?,
                Ok(false) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => socket.wait(false, self.deadline)?,
                Err(e) => return Err(e),
            }
        }
        self.transport = Transport::plain(socket).with_tls(session);
        // What was said in the clear may have been said by an attacker.
        self.format = ReplyFormat::Simple;
        self.selected = None;
        Ok(())
    }

    #[cfg(not(feature = "tls"))]
    fn start_tls(&mut self) -> io::Result<()> {
        self.refuse(OptionCode::StartTls, OptionReply::ErrUnsup, "this server has no TLS");
        Ok(())
    }

    fn reply(&mut self, option: OptionCode, kind: OptionReply, payload: &[u8]) {
        encode_option_reply(&mut self.out, option, kind, payload);
    }

    fn refuse(&mut self, option: OptionCode, kind: OptionReply, why: &str) {
        // Names in it may be as long as a string can be.
        let why = why.get(..crate::proto::MAX_STRING).unwrap_or(why);
        encode_option_reply(&mut self.out, option, kind, why.as_bytes());
    }

    fn send(&mut self) -> io::Result<()> {
        let mut sent = 0;
        while sent < self.out.len() {
            match self.transport.send(&[IoSlice::new(&self.out[sent..])]) {
                Ok(n) => sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.transport.socket.wait(true, self.deadline)?;
                }
                Err(e) => return Err(e),
            }
        }
        self.out.clear();
        loop {
            match self.transport.flush() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.transport.socket.wait(true, self.deadline)?;
                }
                other => return other,
            }
        }
    }

    fn read(&self, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match self.transport.recv(buf) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => buf = &mut buf[n..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.transport.socket.wait(false, self.deadline)?;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn read_array<const N: usize>(&self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn skip(&self, length: u32) -> io::Result<()> {
        let mut left = length as usize;
        let mut sink = [0; 4096];
        while left > 0 {
            let n = left.min(sink.len());
            self.read(&mut sink[..n])?;
            left -= n;
        }
        Ok(())
    }
}

/// Whether `query` selects the context `name`. A namespace alone, or `qemu:dirty-bitmap:`, stands for all in
/// it, but only in a list.
fn matches_query(query: &str, name: &str, listing: bool) -> bool {
    if query == name {
        return true;
    }
    let prefix = match query {
        "qemu:" | "qemu:dirty-bitmap:" => query,
        "base:" => BASE_ALLOCATION,
        other => match other.strip_suffix(':') {
            Some(namespace) if !namespace.contains(':') => other,
            _ => return false,
        },
    };
    listing && name.starts_with(prefix)
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_select_as_the_document_says() {
        let (base, depth, bitmap) = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0");
        for (query, listed) in [
            ("base:", vec![base]),
            ("base:allocation", vec![base]),
            ("qemu:", vec![depth, bitmap]),
            ("qemu:dirty-bitmap:", vec![bitmap]),
            ("qemu:dirty-bitmap:b0", vec![bitmap]),
            ("qemu:dirty-bitmap:b", vec![]),
            ("qemu:allocation", vec![]),
            ("", vec![]),
            (":", vec![]),
        ] {
            let found: Vec<_> =
                [base, depth, bitmap].into_iter().filter(|name| matches_query(query, name, true)).collect();
            assert_eq!(found, listed, "{query}");
            // Selecting takes whole names only.
            for name in [base, depth, bitmap] {
                assert_eq!(matches_query(query, name, false), query == name);
            }
        }
    }
}
