//! `inspect`: what must be known of an image from a stranger before any other program is given it.
//!
//! Called by the command; a service calls [`Inspection::read`] on what was uploaded to it. One file is opened
//! and nothing that it names, whatever it holds. The header is read twice: once for each field by itself
//! ([`header`]), so that one finding does not hide another, and once as opening the image would read it.
//!
//! What must hold: memory and work are bounded by the caps of the format (2 MiB of header, 32 MiB of L1
//! table, 64 MiB each of the tables of snapshots and bitmaps, and the bounds of [`CutShort::find`]), not by
//! what the image says of itself.
//!
//! [`CutShort::find`]: blockmirror_qcow2::CutShort::find

mod finding;
mod header;
mod qcow2;
mod signatures;

use std::path::{Path, PathBuf};

use blockmirror_file::LockMode;
use blockmirror_raw::SECTOR;
use serde_json::{Value, json};

use self::signatures::Signatures;
use crate::error::Result;
use crate::format::Format;
use crate::info::{FileInfo, FileKind};
use crate::open::OpenOptions;

pub use self::finding::{FindingKind, InspectFinding, UnknownFinding};

/// The longest disk that an inspection accepts unless [`OpenOptions::max_virtual_size`] says otherwise,
/// 64 TiB. A copy of a longer one does not fit where images are kept.
pub const MAX_INSPECTED_SIZE: u64 = 64 << 40;

/// What was found in an image.
///
/// ```
/// use blockmirror_image::{
///     CreateSettings, CreateSpec, FindingKind, Format, Inspection, NewImage, OpenOptions,
/// };
///
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("disk.qcow2");
/// let spec = CreateSpec::new(Format::Qcow2, 1 << 30, CreateSettings::default());
/// NewImage::create(&path, &spec)?.persist()?;
///
/// let inspection = Inspection::read(&path, &OpenOptions::new())?;
/// assert_eq!((inspection.format, inspection.virtual_size), ("qcow2", Some(1 << 30)));
/// assert!(inspection.findings.is_empty());
///
/// let as_raw = Inspection::read(&path, &OpenOptions::new().format(Format::Raw))?;
/// assert_eq!(as_raw.findings[0].kind, FindingKind::FormatConfusion);
/// assert_eq!(as_raw.refusals(&[FindingKind::FormatConfusion]).count(), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspection {
    /// The path it was opened by.
    pub path: PathBuf,
    /// The format that was given, else the one that was detected. It need not be one that can be opened.
    pub format: &'static str,
    /// The file that it is in.
    pub file: FileInfo,
    /// Bytes of the disk, as far as that is known.
    pub virtual_size: Option<u64>,
    /// What the disk begins with, as far as that is known and no finding: `gpt`, `mbr`, `iso`, `luks`.
    pub contents: Vec<&'static str>,
    /// Internal snapshots.
    pub snapshots: u64,
    /// Persistent bitmaps.
    pub bitmaps: u64,
    /// What speaks against opening it.
    pub findings: Vec<InspectFinding>,
    max_virtual_size: u64,
}

impl Inspection {
    /// Inspects the image `path`, in the format that `options` give or, without one, in what is detected.
    /// Opens no other file; takes no lock.
    ///
    /// # Errors
    /// It cannot be opened or read. Whatever its bytes say is a finding.
    pub fn read(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let protocol = options.clone().lock(LockMode::Off).open_protocol(path, false)?;
        let whole = protocol.storage();
        let len = whole.len()?;
        let storage = options.given_node().part.of(whole)?;
        let file = FileInfo { kind: FileKind::of(&protocol), len, allocated: storage.allocated_bytes()? };
        let image_len = storage.len()?;
        let signatures = Signatures::read(&|buf, at| storage.read_at(buf, at), image_len)?;
        let given = options.given_format();
        let mut out = Self {
            path: path.to_owned(),
            format: given.map_or(signatures.detected(), Format::as_str),
            file,
            virtual_size: None,
            contents: Vec::new(),
            snapshots: 0,
            bitmaps: 0,
            findings: Vec::new(),
            max_virtual_size: options.given_max_virtual_size().unwrap_or(MAX_INSPECTED_SIZE),
        };
        out.judge_format(given, &signatures);
        match out.format {
            "raw" => out.raw(image_len, &signatures),
            "qcow2" | "qcow" if signatures.formats.contains(&out.format) => {
                out.qcow2(&storage)?;
                out.judge_contents(&signatures, qcow2::cluster_size(&*storage)?);
            }
            _ => out.judge_contents(&signatures, u64::MAX),
        }
        Ok(out)
    }

    /// The findings that are not among `allowed`. Without any the image may be opened.
    pub fn refusals(&self, allowed: &[FindingKind]) -> impl Iterator<Item = &InspectFinding> {
        self.findings.iter().filter(|finding| !allowed.contains(&finding.kind))
    }

    /// All of it, with the verdict under the policy that the findings `allowed` refuse nothing.
    pub fn to_json(&self, allowed: &[FindingKind]) -> Value {
        let finding = |finding: &InspectFinding| {
            json!({
                "kind": finding.kind.as_str(),
                "message": finding.message,
                "allowed": allowed.contains(&finding.kind),
            })
        };
        let mut out = json!({
            "filename": self.path.to_string_lossy(),
            "format": self.format,
            "file-length": self.file.len,
            "contents": self.contents,
            "snapshots": self.snapshots,
            "bitmaps": self.bitmaps,
            "findings": self.findings.iter().map(finding).collect::<Value>(),
            "verdict": if self.refusals(allowed).next().is_none() { "accepted" } else { "refused" },
        });
        if let Some(size) = self.virtual_size {
            out["virtual-size"] = json!(size);
        }
        out
    }

    fn found(&mut self, kind: FindingKind, message: impl Into<String>) {
        let finding = InspectFinding { kind, message: message.into() };
        if !self.findings.contains(&finding) {
            self.findings.push(finding);
        }
    }

    /// Compares the format that was given, if one was, with all that the bytes look like.
    fn judge_format(&mut self, given: Option<Format>, seen: &Signatures) {
        use FindingKind::{Encrypted, FormatConfusion, UnsupportedFormat};
        let images: Vec<_> = seen.formats.iter().copied().filter(|name| *name != "luks").collect();
        let has_luks = images.len() < seen.formats.len();
        match (given, &*images) {
            (Some(Format::Raw), []) | (None, []) => {}
            (Some(given), []) => {
                let is = seen.detected();
                self.found(
                    FormatConfusion,
                    format!("{given} was given, and the file is no such image: {is}"),
                );
            }
            (Some(given), images) if !images.contains(&given.as_str()) => {
                let begins = images.join(" and ");
                self.found(
                    FormatConfusion,
                    format!("{given} was given, and the file begins as {begins} does"),
                );
            }
            (_, [first, second, ..]) => {
                self.found(FormatConfusion, format!("the file begins as {first} does and as {second} does"));
            }
            (_, [_]) => {}
        }
        if seen.has_vpc_footer && !seen.formats.contains(&"vpc") {
            let message =
                "the file ends as a vpc image of fixed size does; programs that look there read it as one";
            self.found(FormatConfusion, message);
        }
        if has_luks {
            self.found(Encrypted, "the file begins with a LUKS header");
        }
        if !matches!(self.format, "raw" | "qcow2" | "luks") {
            let message =
                format!("{} is not supported: what the image holds and names is not known", self.format);
            self.found(UnsupportedFormat, message);
        }
    }

    /// What a disk begins with, in the file of an image: past its first `header` bytes may lie data, and then
    /// it is on the disk in the image as well.
    fn judge_contents(&mut self, seen: &Signatures, header: u64) {
        let is_data = |name: &str| seen.end_of(name) > header && self.contents.contains(&name);
        let strange: Vec<_> = seen.contents.iter().copied().filter(|name| !is_data(name)).collect();
        if !strange.is_empty() {
            let (format, contents) = (self.format, strange.join(" and "));
            let message = format!("the file is {format}, and has {contents} like a raw disk");
            self.found(FindingKind::FormatConfusion, message);
        }
    }

    fn raw(&mut self, len: u64, signatures: &Signatures) {
        self.size(len.next_multiple_of(SECTOR));
        self.contents.clone_from(&signatures.contents);
        if let Some(end) = signatures.gpt_end.filter(|end| *end > len) {
            let message = format!("its GPT is that of a disk of {end} bytes or more; the file has {len}");
            self.found(FindingKind::Truncated, message);
        }
    }

    /// The disk has `size` bytes.
    fn size(&mut self, size: u64) {
        self.virtual_size = Some(size);
        let limit = self.max_virtual_size;
        if size > limit {
            let message = format!("the disk has {size} bytes, more than the limit of {limit}");
            self.found(FindingKind::LimitExceeded, message);
        }
    }
}
