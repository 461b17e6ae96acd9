//! Payloads of the answers to `INFO`, `GO`, `LIST` and the meta context options.

use super::fields::{Fields, put_counted};
use super::{InfoCode, MAX_STRING, ProtoError, TransmissionFlags};

/// One fact about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Info {
    /// Always sent before transmission.
    Export {
        /// Bytes of the export.
        size: u64,
        /// What it can do.
        flags: TransmissionFlags,
    },
    /// The name that the export goes by.
    Name(String),
    /// Words for people.
    Description(String),
    /// Which request sizes are legal, in bytes.
    BlockSize {
        /// Requests must be aligned to this power of two.
        minimum: u32,
        /// Requests aligned to this power of two are quick.
        preferred: u32,
        /// Payloads may be this long.
        maximum: u32,
    },
    /// A fact that is not known here; ignored by clients.
    Other(InfoCode),
}

impl Info {
    /// What a server sent.
    ///
    /// # Errors
    /// Payloads of the wrong length, bad strings, block sizes that are no powers of two.
    pub fn decode(payload: &[u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("info", payload);
        let info = match InfoCode::from_wire(fields.u16()?) {
            InfoCode::Export => {
                Self::Export { size: fields.u64()?, flags: TransmissionFlags::from_bits(fields.u16()?) }
            }
            InfoCode::Name => Self::Name(fields.rest_str()?.to_owned()),
            InfoCode::Description => Self::Description(fields.rest_str()?.to_owned()),
            InfoCode::BlockSize => {
                let (minimum, preferred, maximum) = (fields.u32()?, fields.u32()?, fields.u32()?);
                for size in [minimum, preferred] {
                    if !size.is_power_of_two() {
                        return Err(ProtoError::Value { what: "block size", found: u64::from(size) });
                    }
                }
                if maximum < minimum {
                    return Err(ProtoError::Value { what: "maximum block size", found: u64::from(maximum) });
                }
                Self::BlockSize { minimum, preferred, maximum }
            }
            other => return Ok(Self::Other(other)),
        };
        if !matches!(info, Self::Name(_) | Self::Description(_)) {
            fields.end()?;
        }
        Ok(info)
    }

    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&self.code().to_wire().to_be_bytes());
        match self {
            Self::Export { size, flags } => {
                out.extend_from_slice(&size.to_be_bytes());
                out.extend_from_slice(&flags.bits().to_be_bytes());
            }
            Self::Name(text) | Self::Description(text) => out.extend_from_slice(text.as_bytes()),
            Self::BlockSize { minimum, preferred, maximum } => {
                for size in [minimum, preferred, maximum] {
                    out.extend_from_slice(&size.to_be_bytes());
                }
            }
            Self::Other(_) => {}
        }
        out
    }

    /// What kind of fact it is.
    pub fn code(&self) -> InfoCode {
        match self {
            Self::Export { .. } => InfoCode::Export,
            Self::Name(_) => InfoCode::Name,
            Self::Description(_) => InfoCode::Description,
            Self::BlockSize { .. } => InfoCode::BlockSize,
            Self::Other(code) => *code,
        }
    }
}

/// One export in the answer to `LIST`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerEntry<'a> {
    /// Its name.
    pub name: &'a str,
    /// Words for people; may be empty.
    pub description: &'a str,
}

impl<'a> ServerEntry<'a> {
    /// What a server sent.
    ///
    /// # Errors
    /// Payloads that end early or hold bad strings.
    pub fn decode(payload: &'a [u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("list entry", payload);
        Ok(Self { name: fields.counted_str()?, description: fields.rest_str()? })
    }

    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_counted(&mut out, self.name);
        out.extend_from_slice(self.description.as_bytes());
        out
    }
}

/// One meta context in the answer to the meta context options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextReply<'a> {
    /// What block status will call it; zero and without meaning when only listed.
    pub id: u32,
    /// `namespace:leaf`.
    pub name: &'a str,
}

impl<'a> MetaContextReply<'a> {
    /// What a server sent.
    ///
    /// # Errors
    /// Payloads that end early or hold bad strings.
    pub fn decode(payload: &'a [u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("meta context", payload);
        Ok(Self { id: fields.u32()?, name: fields.rest_str()? })
    }

    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(4 + self.name.len().min(MAX_STRING));
        out.extend_from_slice(&self.id.to_be_bytes());
        out.extend_from_slice(self.name.as_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_come_back_as_they_went() {
        for info in [
            Info::Export { size: u64::MAX, flags: TransmissionFlags::HAS_FLAGS },
            Info::Name("disk".into()),
            Info::Description(String::new()),
            Info::BlockSize { minimum: 1, preferred: 4096, maximum: 32 << 20 },
            Info::Other(InfoCode::Other(9)),
        ] {
            assert_eq!(Info::decode(&info.encode()), Ok(info));
        }
        let entry = ServerEntry { name: "a", description: "b c" };
        assert_eq!(ServerEntry::decode(&entry.encode()), Ok(entry));
        let context = MetaContextReply { id: 7, name: "qemu:allocation-depth" };
        assert_eq!(MetaContextReply::decode(&context.encode()), Ok(context));
    }

    #[test]
    fn facts_that_cannot_be_are_refused() {
        let bad = Info::BlockSize { minimum: 3, preferred: 4096, maximum: 4096 };
        assert_eq!(Info::decode(&bad.encode()), Err(ProtoError::Value { what: "block size", found: 3 }));
        let bad = Info::BlockSize { minimum: 4096, preferred: 4096, maximum: 512 };
        assert!(Info::decode(&bad.encode()).is_err());
        assert!(Info::decode(&[0]).is_err());
        assert!(Info::decode(&[0, 0, 1]).is_err());
        assert!(matches!(Info::decode(&[0, 0].repeat(7)), Err(ProtoError::Long { .. })));
    }
}
