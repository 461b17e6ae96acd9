//! What speaks against a qcow2 image: names of other files, features, marks, damage of its directories, an
//! end that is missing, and a disk that looks like an image itself.
//!
//! Called by [`Inspection::read`] for a file that begins as such an image.

use std::sync::Arc;

use blockmirror_block::{BlockDevice, Error as BlockError, ErrorKind, Storage};
use blockmirror_qcow2::format::bitmaps::Bitmaps;
use blockmirror_qcow2::format::snapshot::Snapshots;
use blockmirror_qcow2::{CutShort, Error as Qcow2Error, Header, OpenOptions};

use super::header::Fields;
use super::signatures::Signatures;
use super::{FindingKind, Inspection};
use crate::error::Result;

/// The largest cluster: 2 MiB. The header and what it names lie in the first one.
const MAX_CLUSTER_BITS: u32 = 21;
/// Bytes that are read where the header does not say how large a cluster is.
const UNKNOWN_CLUSTER: u64 = 64 << 10;

impl Inspection {
    pub(super) fn qcow2(&mut self, storage: &Arc<dyn Storage>) -> Result<()> {
        let head = first_cluster(&**storage)?;
        let fields = Fields::read(&head);
        self.names(&fields);
        self.marks(&fields, &head);
        if !fields.has_known_version() || fields.is_unfinished() {
            self.size(fields.size);
            return Ok(());
        }
        let header = match Header::parse(&fields.masked(&head)) {
            Ok(header) => header,
            Err(error) => {
                self.size(fields.size);
                return self.refused(error);
            }
        };
        self.size(header.virtual_size);
        self.directories(&**storage, &header)?;
        if fields.is_encrypted() || fields.unknown_features() != 0 {
            // It cannot be opened.
            return Ok(());
        }
        match CutShort::find(Arc::clone(storage), &header) {
            Ok(Some(cut)) => self.cut_short(cut),
            Ok(None) => {}
            Err(error) => self.refused(error)?,
        }
        if header.data_file.is_none() {
            self.disk(storage)?;
        }
        Ok(())
    }

    fn cut_short(&mut self, cut: CutShort) {
        let (len, first, missing) = (cut.file_len, cut.first, cut.missing);
        let message = match missing {
            0 => format!("the file ends at {len}, and its tables are too many to look for what is missing"),
            _ => format!(
                "the file ends at {len}: {missing} bytes of the disk are missing, the first at {first}"
            ),
        };
        self.found(FindingKind::Truncated, message);
    }

    /// Names of other files.
    fn names(&mut self, fields: &Fields) {
        match (&fields.backing, &fields.backing_format) {
            (Some(name), Some(format)) => {
                self.found(
                    FindingKind::BackingFile,
                    format!("the header names {name:?} of the format {format:?}"),
                );
            }
            (Some(name), None) => {
                self.found(FindingKind::BackingFile, format!("the header names {name:?}, of no format"));
            }
            (None, Some(format)) => {
                let message =
                    format!("the header has the format of a backing file, {format:?}, and names none");
                self.found(FindingKind::FormatConfusion, message);
            }
            (None, None) => {}
        }
        match (&fields.data_file, fields.needs_data_file()) {
            (Some(name), true) => self.found(FindingKind::DataFile, format!("the header names {name:?}")),
            (None, true) => {
                self.found(FindingKind::DataFile, "the header asks for one, and does not name it")
            }
            (Some(name), false) => {
                let message = format!("the header names {name:?}, and lacks the feature that goes with it");
                self.found(FindingKind::DataFile, message);
            }
            (None, false) => {}
        }
    }

    /// What the header says of the image as a whole.
    fn marks(&mut self, fields: &Fields, head: &[u8]) {
        if !fields.has_known_version() {
            // That of version 1 is found with the format.
            if fields.version != 1 {
                let message =
                    format!("qcow2 version {} is not supported, only versions 2 and 3 are", fields.version);
                self.found(FindingKind::UnsupportedFormat, message);
            }
            return;
        }
        if fields.is_unfinished() {
            self.found(FindingKind::Truncated, Qcow2Error::Unfinished.to_string());
        }
        let unknown = fields.unknown_features();
        if unknown != 0 {
            let message = match Header::parse(head) {
                Err(error @ Qcow2Error::UnknownFeatures { .. }) => error.to_string(),
                _ => format!("the image needs features that are not supported: {unknown:#x}"),
            };
            self.found(FindingKind::UnknownFeatures, message);
        }
        if fields.is_dirty() {
            let message = "the image was not closed cleanly: opening it for writing repairs it first";
            self.found(FindingKind::Dirty, message);
        }
        if fields.is_corrupt() {
            self.found(FindingKind::Corrupt, "the image is marked corrupt");
        }
        if fields.is_encrypted() {
            let message = match fields.crypt_method {
                1 => "the image is encrypted (AES)".to_owned(),
                2 => "the image is encrypted (LUKS)".to_owned(),
                method => format!("the image is encrypted, by the method {method}"),
            };
            self.found(FindingKind::Encrypted, message);
        }
    }

    /// Counts snapshots and bitmaps, and reads each entry, one at a time.
    fn directories(&mut self, storage: &dyn Storage, header: &Header) -> Result<()> {
        self.snapshots = header.snapshot_count.into();
        if let Err(error) = Snapshots::new(storage, header).and_then(read_all) {
            self.refused(error)?;
        }
        let Some(extension) = &header.bitmaps else { return Ok(()) };
        self.bitmaps = extension.count.into();
        // Those that are out of date are not read by any program.
        if header.bitmaps_valid()
            && let Err(error) = Bitmaps::new(storage, extension).and_then(read_all)
        {
            self.refused(error)?;
        }
        Ok(())
    }

    /// Looks at what the disk begins with, as a program would that has converted it to raw.
    fn disk(&mut self, storage: &Arc<dyn Storage>) -> Result<()> {
        let disk = match OpenOptions::new().without_backing().open(Arc::clone(storage)) {
            Ok(disk) => disk,
            Err(error) => return self.refused(error),
        };
        let seen = Signatures::read(&|buf, at| disk.read_at(buf, at), disk.len());
        let seen = match seen.map_err(Qcow2Error::Storage) {
            Ok(seen) => seen,
            Err(error) => return self.refused(error),
        };
        for format in seen.formats {
            match format {
                "luks" => self.contents.push(format),
                _ => {
                    let message = format!("the disk in the image begins as {format} does");
                    self.found(FindingKind::FormatConfusion, message);
                }
            }
        }
        if seen.has_vpc_footer {
            let message = "the disk in the image ends as a vpc image of fixed size does";
            self.found(FindingKind::FormatConfusion, message);
        }
        self.contents.extend(seen.contents);
        Ok(())
    }

    /// Why the format refuses the image is a finding, unless the file itself cannot be read.
    fn refused(&mut self, error: Qcow2Error) -> Result<()> {
        let kind = match error.kind() {
            _ if matches!(error, Qcow2Error::HeaderField { field: "file length", .. }) => {
                FindingKind::Truncated
            }
            ErrorKind::Corrupt => FindingKind::Malformed,
            ErrorKind::LimitExceeded => FindingKind::LimitExceeded,
            ErrorKind::Unsupported => FindingKind::UnsupportedFormat,
            ErrorKind::CutShort => FindingKind::Truncated,
            _ => return Err(BlockError::from(error).into()),
        };
        // What is missing has been found as a whole where it could be.
        if kind != FindingKind::Truncated || self.findings.iter().all(|found| found.kind != kind) {
            self.found(kind, error.to_string());
        }
        Ok(())
    }
}

/// Reads all entries of a directory; fails at the first that is damaged.
fn read_all<T>(
    mut entries: impl Iterator<Item = blockmirror_qcow2::Result<T>>,
) -> blockmirror_qcow2::Result<()> {
    entries.try_for_each(|entry| entry.map(drop))
}

/// The first cluster, or what the file has of it: 2 MiB at most.
fn first_cluster(storage: &dyn Storage) -> Result<Vec<u8>> {
    // What is read fits into memory.
    let mut head = vec![0; cluster_size(storage)?.min(storage.len()?) as usize];
    storage.read_at(&mut head, 0)?;
    Ok(head)
}

/// Bytes of a cluster, as the header says; a likely size if that makes no sense.
pub(super) fn cluster_size(storage: &dyn Storage) -> Result<u64> {
    let mut bits = [0; 4];
    storage.read_at(&mut bits, 20)?;
    Ok(match u32::from_be_bytes(bits) {
        bits @ 9..=MAX_CLUSTER_BITS => 1 << bits,
        _ => UNKNOWN_CLUSTER,
    })
}
