//! NBD URIs, and QEMU's older spelling of the same.
//!
//! Called where the name of an image comes from a user: by `image` for paths, by the daemon for node options.
//! Parsing looks at nothing but the text. What [`NbdUri`] prints parses to an equal value.
//!
//! Sources: the NBD project's `doc/uri.md`, RFC 3986; for `tls-certificates` libnbd's documentation, for
//! `nbd:HOST:PORT:exportname=NAME` QEMU's.

use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;

/// The TCP port that IANA has given to NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// The longest export name the protocol allows, in bytes.
pub const MAX_EXPORT_NAME: usize = 4096;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NbdAddress {
    /// A host, by name or address (IPv6 without brackets), and a port.
    Tcp {
        /// The host.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix domain socket with a path; one that begins with a NUL is in Linux's abstract name space.
    Unix(PathBuf),
}

/// An export of a server, and how to get there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct NbdUri {
    /// Where the server listens.
    pub address: NbdAddress,
    /// The name of the export; the default export has an empty one.
    pub export: String,
    /// Whether the connection must be encrypted (`nbds`).
    pub tls: bool,
    /// A user name for kinds of TLS authentication that have one.
    pub user: Option<String>,
    /// `tls-certificates`: the directory with `ca-cert.pem` and perhaps `client-cert.pem` and
    /// `client-key.pem`.
    pub tls_certificates: Option<PathBuf>,
    /// `tls-hostname`: the name that the server's certificate must have, where it is not the host's.
    pub tls_hostname: Option<String>,
    /// `tls-verify-peer`: whether the server's certificate is looked at.
    pub tls_verify_peer: Option<bool>,
}

/// Why a text is no NBD URI.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum UriError {
    /// It begins like nothing that leads to an NBD server.
    #[error("an NBD URI begins with nbd://, nbds://, nbd+unix:// or nbds+unix://")]
    NotNbd,
    /// A transport that is known and not supported.
    #[error("{0} is not supported; nbd, nbds, nbd+unix and nbds+unix are")]
    Transport(String),
    /// `%` is not followed by two hexadecimal digits.
    #[error("\"{0}\": % is not followed by two hexadecimal digits")]
    Percent(String),
    /// What must be text is not UTF-8, or holds a NUL.
    #[error("the {0} is not UTF-8 text without NUL")]
    NotText(&'static str),
    /// The port is no number from 1 to 65535.
    #[error("\"{0}\" is not a port")]
    Port(String),
    /// The host is malformed, such as an IPv6 address without its closing bracket.
    #[error("\"{0}\" is not a host")]
    Host(String),
    /// A Unix domain socket without `socket`.
    #[error("a Unix domain socket needs socket=PATH")]
    NoSocket,
    /// `socket` where there is a host, or a host where there is a `socket`.
    #[error("{0}")]
    Misplaced(&'static str),
    /// A parameter that is not known.
    #[error("\"{0}\" is not a parameter of an NBD URI")]
    UnknownParameter(String),
    /// A parameter twice.
    #[error("{0} is given twice")]
    Twice(String),
    /// A parameter with a value that it cannot have, or that is not supported.
    #[error("{key}=\"{value}\": {why}")]
    Value {
        /// The parameter.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The export name is longer than the protocol allows.
    #[error("the export name has {0} bytes; {MAX_EXPORT_NAME} are allowed")]
    LongName(usize),
    /// There is a fragment.
    #[error("an NBD URI has no fragment; write # as %23")]
    Fragment,
}

impl NbdUri {
    /// The export `name` of the server that listens at `address`, not encrypted.
    pub fn new(address: NbdAddress, name: impl Into<String>) -> Self {
        Self {
            address,
            export: name.into(),
            tls: false,
            user: None,
            tls_certificates: None,
            tls_hostname: None,
            tls_verify_peer: None,
        }
    }

    /// The export `name` of the server that listens at the socket `path`.
    pub fn unix(path: impl Into<PathBuf>, name: impl Into<String>) -> Self {
        Self::new(NbdAddress::Unix(path.into()), name)
    }

    /// The export `name` of the server at a TCP port.
    pub fn tcp(host: impl Into<String>, port: u16, name: impl Into<String>) -> Self {
        Self::new(NbdAddress::Tcp { host: host.into(), port }, name)
    }

    /// Whether `name` is meant for NBD, rightly written or not: it begins with `nbd:`, `nbds:`, `nbd+..:` or
    /// `nbds+..:`. A file of that name is reached as `./nbd:..`.
    pub fn looks_like_uri(name: impl AsRef<OsStr>) -> bool {
        let bytes = name.as_ref().as_bytes();
        let Some(colon) = bytes.iter().position(|b| *b == b':') else { return false };
        let scheme = bytes[..colon].to_ascii_lowercase();
        let rest = scheme.strip_prefix(b"nbds").or_else(|| scheme.strip_prefix(b"nbd"));
        rest.is_some_and(|rest| {
            rest.is_empty() || (rest[0] == b'+' && rest[1..].iter().all(u8::is_ascii_alphanumeric))
        })
    }

    /// The name a server's certificate must have: `tls-hostname`, or else the host.
    pub fn certificate_name(&self) -> Option<&str> {
        match (&self.tls_hostname, &self.address) {
            (Some(name), _) => Some(name),
            (None, NbdAddress::Tcp { host, .. }) => Some(host),
            (None, NbdAddress::Unix(_)) => None,
        }
    }

    fn parse_uri(scheme: &str, rest: &str) -> Result<Self, UriError> {
        let scheme = scheme.to_ascii_lowercase();
        let (tls, unix) = match scheme.as_str() {
            "nbd" => (false, false),
            "nbds" => (true, false),
            "nbd+unix" => (false, true),
            "nbds+unix" => (true, true),
            other if other.starts_with("nbd+") || other.starts_with("nbds+") => {
                return Err(UriError::Transport(scheme));
            }
            _ => return Err(UriError::NotNbd),
        };
        if rest.contains('#') {
            return Err(UriError::Fragment);
        }
        let (before, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = match before.find('/') {
            Some(slash) => (&before[..slash], &before[slash + 1..]),
            None => (before, ""),
        };
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(text(user, "user name")?), host),
            None => (None, authority),
        };
        let address = if unix {
            if !host.is_empty() {
                return Err(UriError::Misplaced("a Unix domain socket has no host"));
            }
            // Its path comes with the parameters.
            NbdAddress::Unix(PathBuf::new())
        } else {
            tcp_address(host)?
        };
        let mut uri = Self::new(address, export_name(text(path, "export name")?)?);
        (uri.tls, uri.user) = (tls, user);
        uri.parameters(query)?;
        match &uri.address {
            NbdAddress::Unix(path) if path.as_os_str().is_empty() => Err(UriError::NoSocket),
            _ => Ok(uri),
        }
    }

    fn parameters(&mut self, query: &str) -> Result<(), UriError> {
        let mut seen: Vec<&str> = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if seen.contains(&key) {
                return Err(UriError::Twice(key.to_owned()));
            }
            seen.push(key);
            let invalid = |key: &'static str, why| UriError::Value { key, value: value.to_owned(), why };
            match key {
                "socket" => {
                    let path = decode(value)?;
                    let NbdAddress::Unix(socket) = &mut self.address else {
                        return Err(UriError::Misplaced("socket= belongs to nbd+unix and nbds+unix"));
                    };
                    if path.iter().skip(1).any(|b| *b == 0) {
                        return Err(invalid("socket", "NUL may stand at the beginning only"));
                    }
                    *socket = PathBuf::from(OsStr::from_bytes(&path));
                }
                "tls-certificates" => {
                    let path = decode(value)?;
                    if path.is_empty() || path.contains(&0) {
                        return Err(invalid("tls-certificates", "not a directory"));
                    }
                    self.tls_certificates = Some(PathBuf::from(OsStr::from_bytes(&path)));
                }
                "tls-hostname" => match text(value, "tls-hostname")? {
                    name if name.is_empty() => return Err(invalid("tls-hostname", "a name is needed")),
                    name => self.tls_hostname = Some(name),
                },
                "tls-verify-peer" => {
                    self.tls_verify_peer = Some(match value {
                        "1" | "true" | "on" | "yes" => true,
                        "0" | "false" | "off" | "no" => false,
                        _ => return Err(invalid("tls-verify-peer", "0 or 1 is needed")),
                    });
                }
                "tls-type" if value == "x509" => {}
                "tls-type" => return Err(invalid("tls-type", "only x509 is supported")),
                "tls-psk-file" => return Err(invalid("tls-psk-file", "pre-shared keys are not supported")),
                _ => return Err(UriError::UnknownParameter(key.to_owned())),
            }
        }
        Ok(())
    }

    /// What follows `nbd:` in QEMU's older form. Nothing in it is percent-encoded.
    fn parse_legacy(rest: &str) -> Result<Self, UriError> {
        let (place, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
        let address = match place.strip_prefix("unix:") {
            Some("") => return Err(UriError::NoSocket),
            Some(path) => NbdAddress::Unix(path.into()),
            // A port is needed here: `nbd:host` is a misspelt URI more often than anything else.
            None => match place.rsplit_once(':') {
                Some((host, port)) => NbdAddress::Tcp { host: bare_host(host)?, port: parse_port(port)? },
                None => return Err(UriError::NotNbd),
            },
        };
        if rest.contains('\0') {
            return Err(UriError::NotText("name"));
        }
        Ok(Self::new(address, export_name(export.to_owned())?))
    }
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(name: &str) -> Result<Self, UriError> {
        match name.split_once(':') {
            Some((scheme, rest)) => match rest.strip_prefix("//") {
                Some(rest) => Self::parse_uri(scheme, rest),
                None if scheme.eq_ignore_ascii_case("nbd") => Self::parse_legacy(rest),
                None => Err(UriError::NotNbd),
            },
            None => Err(UriError::NotNbd),
        }
    }
}

impl TryFrom<&Path> for NbdUri {
    type Error = UriError;

    fn try_from(path: &Path) -> Result<Self, UriError> {
        path.to_str().ok_or(UriError::NotText("URI"))?.parse()
    }
}

/// The URI, in its shortest spelling.
impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls { "nbds" } else { "nbd" })?;
        f.write_str(match &self.address {
            NbdAddress::Tcp { .. } => "://",
            NbdAddress::Unix(_) => "+unix://",
        })?;
        if let Some(user) = &self.user {
            encode(f, user.as_bytes(), "")?;
            f.write_char('@')?;
        }
        let mut separator = '?';
        let mut parameter = |f: &mut fmt::Formatter<'_>, key: &str, value: &[u8]| {
            write!(f, "{separator}{key}=")?;
            separator = '&';
            encode(f, value, "/:@")
        };
        match &self.address {
            NbdAddress::Tcp { host, port } => {
                if host.contains(':') {
                    f.write_char('[')?;
                    encode(f, host.as_bytes(), ":")?;
                    f.write_char(']')?;
                } else {
                    encode(f, host.as_bytes(), "")?;
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                f.write_char('/')?;
                encode(f, self.export.as_bytes(), "/:@")?;
            }
            NbdAddress::Unix(path) => {
                f.write_char('/')?;
                encode(f, self.export.as_bytes(), "/:@")?;
                parameter(f, "socket", path.as_os_str().as_bytes())?;
            }
        }
        if let Some(path) = &self.tls_certificates {
            parameter(f, "tls-certificates", path.as_os_str().as_bytes())?;
        }
        if let Some(name) = &self.tls_hostname {
            parameter(f, "tls-hostname", name.as_bytes())?;
        }
        if let Some(verify) = self.tls_verify_peer {
            parameter(f, "tls-verify-peer", if verify { b"1" } else { b"0" })?;
        }
        Ok(())
    }
}

/// `HOST`, `HOST:PORT`, `[IPv6]` or `[IPv6]:PORT`; nothing at all is the local host.
fn tcp_address(authority: &str) -> Result<NbdAddress, UriError> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or_else(|| UriError::Host(authority.to_owned()))?;
            if host.is_empty() || !host.contains(':') {
                return Err(UriError::Host(authority.to_owned()));
            }
            match rest.strip_prefix(':') {
                Some(port) => (host, port),
                None if rest.is_empty() => (host, ""),
                None => return Err(UriError::Host(authority.to_owned())),
            }
        }
        None => {
            let (host, port) = authority.split_once(':').unwrap_or((authority, ""));
            if port.contains(':') || host.contains([']', '[']) {
                return Err(UriError::Host(authority.to_owned()));
            }
            (host, port)
        }
    };
    let host = match text(host, "host")? {
        host if host.is_empty() => "localhost".to_owned(),
        host => host,
    };
    let port = if port.is_empty() { DEFAULT_PORT } else { parse_port(port)? };
    Ok(NbdAddress::Tcp { host, port })
}

fn bare_host(host: &str) -> Result<String, UriError> {
    let bare = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').filter(|host| !host.is_empty()),
        None => Some(host).filter(|host| !host.contains([':', '/'])),
    };
    match bare {
        Some("") => Ok("localhost".to_owned()),
        Some(bare) => Ok(bare.to_owned()),
        None => Err(UriError::Host(host.to_owned())),
    }
}

fn parse_port(port: &str) -> Result<u16, UriError> {
    let number = if port.bytes().all(|b| b.is_ascii_digit()) { port.parse().ok() } else { None };
    number.filter(|port| *port != 0).ok_or_else(|| UriError::Port(port.to_owned()))
}

fn export_name(name: String) -> Result<String, UriError> {
    if name.len() > MAX_EXPORT_NAME { Err(UriError::LongName(name.len())) } else { Ok(name) }
}

/// Decodes percent-encoded text.
fn text(encoded: &str, what: &'static str) -> Result<String, UriError> {
    let text = String::from_utf8(decode(encoded)?).map_err(|_| UriError::NotText(what))?;
    if text.contains('\0') { Err(UriError::NotText(what)) } else { Ok(text) }
}

fn decode(encoded: &str) -> Result<Vec<u8>, UriError> {
    let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16)).and_then(|d| u8::try_from(d).ok());
    let mut out = Vec::with_capacity(encoded.len());
    let mut bytes = encoded.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        match (digit(bytes.next()), digit(bytes.next())) {
            (Some(high), Some(low)) => out.push(high << 4 | low),
            _ => return Err(UriError::Percent(encoded.to_owned())),
        }
    }
    Ok(out)
}

/// Writes `bytes`, percent-encoding all but RFC 3986's unreserved characters and those in `also`.
fn encode(f: &mut fmt::Formatter<'_>, bytes: &[u8], also: &str) -> fmt::Result {
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) || also.as_bytes().contains(byte) {
            f.write_char(char::from(*byte))?;
        } else {
            write!(f, "%{byte:02X}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
