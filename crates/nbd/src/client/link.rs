//! A connection's bytes, plain or inside TLS.
//!
//! One thread reads and one writes at a time; the connection sees to that. With TLS both need the one state
//! that rustls keeps, which is locked only while bytes are turned into others: never while a thread waits for
//! the socket.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Instant;

use blockmirror_block::cancel;
#[cfg(feature = "tls")]
use blockmirror_block::sync::Mutex;

use super::error::ClientError;
use super::socket::ClientSocket;

/// What has arrived beyond what was asked for; also the size of one read of ciphertext.
const SPILL: usize = 16 << 10;

/// How far a request was sent.
#[derive(Debug)]
pub(crate) enum Sent {
    Whole,
    /// The caller is cancelled, and no byte of the request was sent.
    Nothing,
    /// The caller is cancelled. The rest has to follow: the next request comes behind it.
    Part(Unsent),
}

/// The rest of a request.
#[derive(Debug)]
pub(crate) struct Unsent {
    /// Bytes for the socket.
    bytes: Vec<u8>,
    /// What comes after them, not encrypted yet.
    #[cfg(feature = "tls")]
    plain: Vec<u8>,
}

#[derive(Debug)]
pub(crate) struct Link {
    socket: Arc<ClientSocket>,
    #[cfg(feature = "tls")]
    tls: Option<Mutex<rustls::ClientConnection>>,
}

impl Link {
    #[cfg(feature = "tls")]
    pub(crate) fn new(socket: Arc<ClientSocket>, tls: Option<rustls::ClientConnection>) -> Self {
        Self { socket, tls: tls.map(Mutex::new) }
    }

    #[cfg(not(feature = "tls"))]
    pub(crate) fn new(socket: Arc<ClientSocket>) -> Self {
        Self { socket }
    }

    pub(crate) fn socket(&self) -> &Arc<ClientSocket> {
        &self.socket
    }

    /// Sends `head` and `body`, a request, until `deadline` or until the calling thread is cancelled. Callers
    /// are serialized by the connection.
    pub(crate) fn send(&self, head: &[u8], body: &[u8], deadline: Option<Instant>) -> io::Result<Sent> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return write_tls(tls, &self.socket, head, body, deadline);
        }
        let mut slices = [IoSlice::new(head), IoSlice::new(body)];
        let mut left = &mut slices[..];
        match self.socket.write_all(&mut left, deadline) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                let bytes = gathered(left);
                if bytes.len() == head.len() + body.len() {
                    return Ok(Sent::Nothing);
                }
                Ok(Sent::Part(Unsent {
                    bytes,
                    #[cfg(feature = "tls")]
                    plain: Vec::new(),
                }))
            }
            written => written.map(|()| Sent::Whole),
        }
    }

    /// Sends the rest of a request, on a thread that is not cancelled.
    pub(crate) fn send_rest(&self, rest: &Unsent, deadline: Option<Instant>) -> io::Result<()> {
        self.socket.write_all(&mut &mut [IoSlice::new(&rest.bytes)][..], deadline)?;
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            write_tls(tls, &self.socket, &rest.plain, &[], deadline)?;
        }
        Ok(())
    }
}

fn gathered(slices: &[IoSlice<'_>]) -> Vec<u8> {
    slices.iter().flat_map(|slice| slice.iter().copied()).collect()
}

#[cfg(feature = "tls")]
fn write_tls(
    tls: &Mutex<rustls::ClientConnection>,
    socket: &ClientSocket,
    head: &[u8],
    body: &[u8],
    deadline: Option<Instant>,
) -> io::Result<Sent> {
    use std::io::Write;

    /// Ciphertext that is gathered before it is sent.
    const BATCH: usize = 256 << 10;

    let mut out = Vec::with_capacity(BATCH.min(head.len() + body.len() + 512));
    let mut left = [head, body];
    while left.iter().any(|part| !part.is_empty()) {
        {
            let mut tls = tls.lock();
            while out.len() < BATCH
                && let Some(part) = left.iter_mut().find(|part| !part.is_empty())
            {
                // Takes as much as rustls' own buffer holds.
                let taken = tls.writer().write(part)?;
                if taken == 0 && !tls.wants_write() {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                *part = &part[taken..];
                while tls.wants_write() {
                    tls.write_tls(&mut out)?;
                }
            }
        }
        let mut slices = [IoSlice::new(&out)];
        let mut unsent = &mut slices[..];
        match socket.write_all(&mut unsent, deadline) {
            // What was encrypted has to be sent: the session counts its records.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                return Ok(Sent::Part(Unsent { bytes: gathered(unsent), plain: left.concat() }));
            }
            written => written?,
        }
        out.clear();
    }
    Ok(Sent::Whole)
}

/// The error of a stream that ends where more should come.
pub(crate) fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed it")
}

/// The reading side of a link, with what has arrived and was not asked for yet. Belongs to the thread that
/// reads.
#[derive(Debug)]
pub(crate) struct Incoming {
    link: Arc<Link>,
    /// When what is read must have come; then reading fails with `WouldBlock`.
    pub(crate) deadline: Option<Instant>,
    spill: Buffer,
    /// What the socket gave that rustls has not taken yet.
    #[cfg(feature = "tls")]
    cipher: Buffer,
}

/// Bytes `start..end` of a buffer of fixed size.
#[derive(Debug)]
struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Buffer {
    fn new() -> Self {
        Self { bytes: vec![0; SPILL].into_boxed_slice(), start: 0, end: 0 }
    }

    /// Moves what it holds to `dest`, as far as that goes; how much that was.
    fn take(&mut self, dest: &mut [u8]) -> usize {
        let n = dest.len().min(self.end - self.start);
        dest[..n].copy_from_slice(&self.bytes[self.start..self.start + n]);
        self.start += n;
        n
    }
}

impl Incoming {
    pub(crate) fn new(link: Arc<Link>) -> Self {
        Self {
            link,
            deadline: None,
            spill: Buffer::new(),
            #[cfg(feature = "tls")]
            cipher: Buffer::new(),
        }
    }

    /// Fills `dest`; waits until the deadline.
    pub(crate) fn read_exact(&mut self, dest: &mut [u8]) -> io::Result<()> {
        self.fill(dest, false)
    }

    /// The same, for the beginning of a reply: fails with `Interrupted` if the calling thread is cancelled
    /// before a byte of it has come.
    pub(crate) fn begin(&mut self, dest: &mut [u8]) -> io::Result<()> {
        self.fill(dest, true)
    }

    fn fill(&mut self, dest: &mut [u8], may_leave: bool) -> io::Result<()> {
        let mut filled = self.spill.take(dest);
        while filled < dest.len() {
            let want = dest.len() - filled;
            match self.receive(&mut dest[filled..]) {
                Ok(0) => return Err(closed()),
                Ok(got) => {
                    filled += got.min(want);
                    (self.spill.start, self.spill.end) = (0, got.saturating_sub(want));
                }
                // The socket gives up now and then, so that it is asked what follows.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if may_leave && filled == 0 && cancel::is_cancelled() {
                        return Err(io::ErrorKind::Interrupted.into());
                    }
                }
                Err(error) => return Err(error),
            }
            if filled < dest.len() && self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        Ok(())
    }

    /// Receives `bytes` bytes and drops them.
    pub(crate) fn skip(&mut self, mut bytes: u64) -> io::Result<()> {
        let mut scrap = [0; 4096];
        while bytes > 0 {
            let n = bytes.min(scrap.len() as u64);
            self.read_exact(&mut scrap[..n as usize])?;
            bytes -= n;
        }
        Ok(())
    }

    /// The next `N` bytes.
    pub(crate) fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// One read: into `dest`, and what does not fit there into the (empty) spill buffer.
    fn receive(&mut self, dest: &mut [u8]) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.link.tls {
            return read_tls(tls, &self.link.socket, &mut self.cipher, dest);
        }
        self.link.socket.read(dest, &mut self.spill.bytes)
    }
}

#[cfg(feature = "tls")]
fn read_tls(
    tls: &Mutex<rustls::ClientConnection>,
    socket: &ClientSocket,
    cipher: &mut Buffer,
    dest: &mut [u8],
) -> io::Result<usize> {
    use std::io::Read;

    loop {
        {
            let mut tls = tls.lock();
            loop {
                match tls.reader().read(dest) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
                if cipher.start == cipher.end {
                    break;
                }
                cipher.start += tls.read_tls(&mut &cipher.bytes[cipher.start..cipher.end])?;
                tls.process_new_packets().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            }
        }
        (cipher.start, cipher.end) = (0, socket.read(&mut cipher.bytes, &mut [])?);
        if cipher.end == 0 {
            return Ok(0);
        }
    }
}

/// What an error of the stream means.
pub(crate) fn stream_error(error: std::io::Error) -> ClientError {
    #[cfg(feature = "tls")]
    if let Some(error) = super::tls::cause(&error) {
        return error;
    }
    ClientError::lost(error)
}
