//! `info`: what an image says about itself.
//!
//! [`ImageInfo::read`] opens one file and nothing that it names; [`read_chain`] goes down the backing chain
//! under the caller's policy. [`ImageInfo::to_json`] has the members of `qemu-img info --output=json`, in its
//! order.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::Storage;
use blockmirror_file::LockMode;
use blockmirror_qcow2::format::bitmaps::{BitmapEntry, Bitmaps};
use blockmirror_qcow2::format::snapshot::{Snapshot, Snapshots};
use blockmirror_qcow2::options::{OptionValue, shown};
use blockmirror_qcow2::{CutShort, Header};
use blockmirror_raw::{Part, SECTOR};
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::format::Format;
use crate::open::{BackingRef, OpenOptions};
use crate::probe::probe;
use crate::protocol_layer::ProtocolLayer;
use crate::reference::join_name;

/// What an image says about itself, and what its file takes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ImageInfo {
    /// The path it was opened by.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// The file that it is in.
    pub file: FileInfo,
    /// The backing file that it names.
    pub backing: Option<BackingInfo>,
    /// What only qcow2 has.
    pub qcow2: Option<Qcow2Info>,
}

/// The host file of an image, or what stands for it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct FileInfo {
    /// Regular file or block device.
    pub kind: FileKind,
    /// Bytes from its beginning to its end.
    pub len: u64,
    /// Bytes that it occupies, if the host tells.
    pub allocated: Option<u64>,
}

impl FileInfo {
    fn is_local(&self) -> bool {
        matches!(self.kind, FileKind::Regular | FileKind::BlockDevice)
    }
}

/// What an image is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
    /// Zeros.
    Null,
    /// A file with fault injection.
    Blkdebug,
    /// An export of an NBD server.
    #[cfg(feature = "nbd")]
    Nbd,
}

impl FileKind {
    pub(crate) fn of(protocol: &ProtocolLayer) -> Self {
        match protocol {
            ProtocolLayer::File(file) if file.is_block_device() => Self::BlockDevice,
            ProtocolLayer::File(_) => Self::Regular,
            ProtocolLayer::Null(_) => Self::Null,
            ProtocolLayer::Failing(..) => Self::Blkdebug,
            #[cfg(feature = "nbd")]
            ProtocolLayer::Export(_) => Self::Nbd,
            ProtocolLayer::Unfinished(protocol, _) => Self::of(protocol),
        }
    }
}

impl FileKind {
    /// The name of QEMU's driver for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Regular => "file",
            Self::BlockDevice => "host_device",
            Self::Null => "null-co",
            Self::Blkdebug => "blkdebug",
            #[cfg(feature = "nbd")]
            Self::Nbd => "nbd",
        }
    }
}

/// A backing file as a header names it; whether it exists was not looked at.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackingInfo {
    /// The name in the header.
    pub name: PathBuf,
    /// The same as a path from where we are; the name itself if it is no plain path.
    pub full: PathBuf,
    /// The format in the header.
    pub format: Option<String>,
}

/// What only a qcow2 image has.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Qcow2Info {
    /// The checked header.
    pub header: Header,
    /// Its internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Its persistent bitmaps; empty if those in it are not to be believed.
    pub bitmaps: Vec<BitmapEntry>,
    /// What is missing, if the file was cut short. Data files are not looked at.
    pub cut_short: Option<CutShort>,
}

impl ImageInfo {
    /// Reads the image `path`, and no other file. The policy of `options` does not come into it, nor do
    /// locks: a header that changes meanwhile is read again where it is needed.
    ///
    /// # Errors
    /// If it cannot be opened, or its format refuses it.
    pub fn read(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let protocol = options.clone().lock(LockMode::Off).open_protocol(path, false)?;
        let info = Self::read_from(&protocol, options.given_node().part, path, options.given_format())?;
        options.check_virtual_size(info.virtual_size, path)?;
        Ok(info)
    }

    fn read_from(protocol: &ProtocolLayer, part: Part, path: &Path, format: Option<Format>) -> Result<Self> {
        let whole = protocol.storage();
        let len = whole.len()?;
        let storage = part.of(whole)?;
        let file = &*storage;
        let format = match format {
            Some(format) => format,
            None => probe(file, path)?,
        };
        let mut info = Self {
            path: path.to_owned(),
            format,
            virtual_size: file.len()?.next_multiple_of(SECTOR),
            file: FileInfo { kind: FileKind::of(protocol), len, allocated: file.allocated_bytes()? },
            backing: None,
            qcow2: None,
        };
        if format == Format::Qcow2 {
            let qcow2 = read_qcow2(Arc::clone(&storage)).map_err(|e| e.in_file(&file.name().into()))?;
            info.virtual_size = qcow2.header.virtual_size;
            info.backing = qcow2.header.backing.as_ref().map(|backing| {
                let name = backing.name.as_path();
                BackingInfo {
                    name: name.to_owned(),
                    full: join_name(path, name.as_os_str()).unwrap_or_else(|| name.to_owned()),
                    format: backing.format.clone(),
                }
            });
            info.qcow2 = Some(qcow2);
        }
        Ok(info)
    }

    /// Whether the image was not closed cleanly.
    pub fn is_dirty(&self) -> bool {
        self.qcow2.as_ref().is_some_and(|qcow2| qcow2.header.is_dirty())
    }

    /// The members of `qemu-img info --output=json`, in its order.
    pub fn to_json(&self) -> Value {
        let mut out = Map::new();
        let mut put = |key: &str, value: Value| {
            out.insert(key.to_owned(), value);
        };
        put("children", json!([{ "name": "file", "info": self.file_json() }]));
        if let Some(qcow2) = self.qcow2.as_ref().filter(|qcow2| !qcow2.snapshots.is_empty()) {
            put("snapshots", qcow2.snapshots.iter().map(snapshot_json).collect());
        }
        if let Some(format) = self.backing.as_ref().and_then(|backing| backing.format.as_ref()) {
            put("backing-filename-format", json!(format));
        }
        put("virtual-size", json!(self.virtual_size));
        put("filename", json!(self.path.to_string_lossy()));
        if let Some(qcow2) = &self.qcow2 {
            put("cluster-size", json!(qcow2.header.cluster_size()));
        }
        put("format", json!(self.format.as_str()));
        if let Some(allocated) = self.file.allocated {
            put("actual-size", json!(allocated));
        }
        if let Some(qcow2) = &self.qcow2 {
            put("format-specific", json!({ "type": "qcow2", "data": qcow2.to_json() }));
        }
        if let Some(backing) = &self.backing {
            put("full-backing-filename", json!(backing.full.to_string_lossy()));
            put("backing-filename", json!(backing.name.to_string_lossy()));
        }
        // QEMU does not say it of what it knows nothing about but the bytes.
        if self.file.is_local() || self.qcow2.is_some() {
            put("dirty-flag", json!(self.is_dirty()));
        }
        // QEMU does not tell this.
        if let Some(cut) = self.qcow2.as_ref().and_then(|qcow2| qcow2.cut_short) {
            let mut figures =
                json!({ "file-length": cut.file_len, "first-missing": cut.first, "missing": cut.missing });
            if !cut.complete {
                figures["complete"] = json!(false);
            }
            put("x-blockmirror-cut-short", figures);
        }
        Value::Object(out)
    }

    fn file_json(&self) -> Value {
        let mut out = json!({
            "children": [],
            "virtual-size": self.file.len.next_multiple_of(SECTOR),
            "filename": self.path.to_string_lossy(),
            "format": self.file.kind.as_str(),
        });
        if let Some(out) = out.as_object_mut() {
            if let Some(allocated) = self.file.allocated {
                out.insert("actual-size".into(), json!(allocated));
            }
            if self.file.is_local() {
                out.insert("format-specific".into(), json!({ "type": "file", "data": {} }));
                out.insert("dirty-flag".into(), json!(false));
            }
        }
        out
    }
}

/// Reads `path` and every image below it, the top first: what its name says that it stands on, or what the
/// header does. Data files are not opened, and nothing is locked.
///
/// # Errors
/// Also if the policy of `options` does not allow a backing file, if the chain comes back to itself, or if it
/// is too deep.
pub fn read_chain(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Vec<ImageInfo>> {
    let mut path = path.as_ref().to_owned();
    let mut options = options.clone().lock(LockMode::Off);
    let (mut files, mut chain) = (Vec::new(), Vec::new());
    // Down what is typed; what the last of it stands on is in its header.
    loop {
        let typed = options.open_protocol(&path, false)?;
        files.push(typed.id());
        options = options.for_opened(&path, &typed);
        let (part, format) = (options.given_node().part, options.given_format());
        let info = ImageInfo::read_from(&typed, part, &path, format)?;
        options.check_virtual_size(info.virtual_size, &path)?;
        chain.push(info);
        let Some(below) = options.typed_backing(&path, &files)? else { break };
        (path, options) = below;
    }
    // The depth counts from there.
    let above = chain.len() - 1;
    while let Some(last) = chain.last() {
        let Some(qcow2) = &last.qcow2 else { break };
        if chain.len() == above + 1 && options.given_node().no_backing {
            break;
        }
        let Some(below) = BackingRef::authorize(&options, &last.path, &qcow2.header)? else { break };
        let file = below.open(&options, chain.len() - above, &mut files, false)?;
        let path = below.target.path();
        let info = ImageInfo::read_from(&file, Part::default(), path, below.format)?;
        options.check_virtual_size(info.virtual_size, path)?;
        chain.push(info);
    }
    Ok(chain)
}

fn read_qcow2(storage: Arc<dyn Storage>) -> blockmirror_qcow2::Result<Qcow2Info> {
    let file = &*storage;
    let header = Header::read(file)?;
    let snapshots = Snapshots::new(file, &header)?.collect::<Result<_, _>>()?;
    let bitmaps = match &header.bitmaps {
        Some(extension) if header.bitmaps_valid() => {
            Bitmaps::new(file, extension)?.collect::<Result<_, _>>()?
        }
        _ => Vec::new(),
    };
    let cut_short = CutShort::find(storage, &header)?;
    Ok(Qcow2Info { header, snapshots, bitmaps, cut_short })
}

/// What a header says of its image under QEMU's keys, in QEMU's order. The bitmaps, which are not in the
/// header, come [before](BITMAPS_BEFORE) one of them.
pub fn qcow2_fields(header: &Header) -> impl Iterator<Item = (&'static str, Value)> {
    shown(header).map(|(key, value)| {
        let value = match value {
            OptionValue::Flag(on) => json!(on),
            OptionValue::Number(number) => json!(number),
            OptionValue::Choice(choice) => json!(choice),
            OptionValue::Text(text) => json!(String::from_utf8_lossy(&text)),
        };
        (key, value)
    })
}

/// The key of [`qcow2_fields`] that follows the bitmaps of an image.
pub const BITMAPS_BEFORE: &str = "refcount-bits";

impl Qcow2Info {
    fn to_json(&self) -> Value {
        let mut out = Map::new();
        for (key, value) in qcow2_fields(&self.header) {
            if key == BITMAPS_BEFORE && !self.bitmaps.is_empty() {
                out.insert("bitmaps".into(), self.bitmaps.iter().map(bitmap_json).collect());
            }
            out.insert(key.into(), value);
        }
        Value::Object(out)
    }
}

fn snapshot_json(snapshot: &Snapshot) -> Value {
    let mut out = Map::new();
    if let Some(icount) = snapshot.icount {
        out.insert("icount".into(), json!(icount));
    }
    for (key, value) in [
        ("vm-clock-nsec", json!(snapshot.vm_clock.subsec_nanos())),
        ("name", json!(snapshot.name)),
        ("date-sec", json!(snapshot.date.as_secs())),
        ("date-nsec", json!(snapshot.date.subsec_nanos())),
        ("vm-clock-sec", json!(snapshot.vm_clock.as_secs())),
        ("id", json!(snapshot.id)),
        ("vm-state-size", json!(snapshot.vm_state_size)),
    ] {
        out.insert(key.to_owned(), value);
    }
    Value::Object(out)
}

fn bitmap_json(bitmap: &BitmapEntry) -> Value {
    let flags: Vec<_> = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")]
        .into_iter()
        .filter_map(|(set, name)| set.then_some(name))
        .collect();
    json!({ "flags": flags, "name": bitmap.name.to_text(), "granularity": bitmap.granularity })
}
