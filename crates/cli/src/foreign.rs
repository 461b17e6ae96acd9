//! Files that another program reads: what they are, and the command of the NBD server that reads them.
//!
//! Called for images whose format is not given, and where a format is refused. Nothing but the first and the
//! last sector is looked at.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use blockmirror_image::{Detected, Format, PROBE_LEN, detect, is_uri};
use rustix::fs::OFlags;

use crate::quote::in_brackets;

/// The formats that are recognised by their first sector, and that qemu-nbd reads without a secret.
const QEMU: [&str; 9] = ["vmdk", "vdi", "vhdx", "vpc", "qcow", "qed", "parallels", "bochs", "cloop"];

/// What files begin with that hold an image in another form.
const PACKED: [(&[u8], Reader); 3] = [
    (b"\xfd7zXZ\0", Reader::Filter("xz")),
    (b"\x1f\x8b\x08", Reader::Filter("gzip")),
    (b"\x28\xb5\x2f\xfd", Reader::None("zstd")),
];

/// What reads a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reader {
    /// qemu-nbd, in this format, which it recognises by the last sector alone or not.
    Qemu { format: &'static str, by_footer: bool },
    /// nbdkit, with this filter.
    Filter(&'static str),
    /// No server that is common.
    None(&'static str),
}

impl Reader {
    /// The command for the file `path`.
    pub(crate) fn command(self, path: &Path) -> Option<Vec<OsString>> {
        let words = match self {
            Self::Qemu { format, .. } => vec!["qemu-nbd".into(), "-r".into(), "-f".into(), format.into()],
            Self::Filter(name) => vec!["nbdkit".into(), format!("--filter={name}").into(), "file".into()],
            Self::None(_) => return None,
        };
        Some(words.into_iter().chain([as_path(path).into_os_string()]).collect())
    }

    /// What reads the file `path`, if that is not done here.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        if is_uri(path) {
            return None;
        }
        let file = open(path).ok()?;
        let len = file.metadata().ok().filter(std::fs::Metadata::is_file)?.len();
        let mut head = [0; PROBE_LEN];
        let read = read_some(&file, &mut head);
        let head = &head[..read];
        match detect(head) {
            Detected::Foreign(format) => {
                QEMU.contains(&format).then_some(Self::Qemu { format, by_footer: false })
            }
            Detected::Known(Format::Raw) => {
                let mut tail = [0; 8];
                file.read_exact_at(&mut tail, len.checked_sub(512)?).ok()?;
                match &tail {
                    b"conectix" => Some(Self::Qemu { format: "vpc", by_footer: true }),
                    [b'k', b'o', b'l', b'y', ..] => Some(Self::Qemu { format: "dmg", by_footer: true }),
                    _ => PACKED.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, reader)| *reader),
                }
            }
            _ => None,
        }
    }
}

/// Opens the file `path` to look at it. A pipe is not waited for.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

fn read_some(file: &File, buf: &mut [u8]) -> usize {
    let mut done = 0;
    while let Ok(read @ 1..) = file.read_at(&mut buf[done..], done as u64) {
        done += read;
    }
    done
}

/// `path`, which no program takes for an option or for the name of a protocol.
fn as_path(path: &Path) -> PathBuf {
    let bytes = path.as_os_str().as_encoded_bytes();
    let first = bytes.split(|byte| *byte == b'/').next().unwrap_or_default();
    // nbdkit takes a word with a = for a parameter.
    match first.contains(&b':') || first.contains(&b'=') || first.starts_with(b"-") {
        true => Path::new(".").join(path),
        false => path.to_owned(),
    }
}

/// The bracketed command that reads the file `path` in `format`, which is not read here.
pub(crate) fn suggestion(path: &Path, format: &str) -> Option<String> {
    let format = QEMU.into_iter().find(|known| *known == format)?;
    Reader::Qemu { format, by_footer: false }.command(path).map(|command| in_brackets(&command))
}
