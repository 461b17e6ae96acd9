//! Checking and repairing an image: one file, no chain. Formats without metadata have nothing to check.
//!
//! Called by the command. The figures are those of `qemu-img check`, and [`ImageCheck::to_json`] has its
//! members.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::Storage;
use blockmirror_qcow2::{CheckObserver, CheckReport, Header, Repair};
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::format::Format;
use crate::open::OpenOptions;
use crate::probe::probe;

/// What a check has found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ImageCheck {
    /// The path it was opened by.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The figures.
    pub report: CheckReport,
}

/// Checks the image `path`; `None` if its format has nothing to check. No file that it names is opened, so
/// the policy of `options` does not come into it.
///
/// # Errors
/// If it cannot be opened or read, or its header makes no sense.
pub fn check(
    path: impl AsRef<Path>,
    options: &OpenOptions,
    observer: &mut dyn CheckObserver,
) -> Result<Option<ImageCheck>> {
    run(path.as_ref(), options, false, &mut |storage| blockmirror_qcow2::check(storage, observer))
}

/// Checks the image `path` and repairs what is wrong; nothing else may have it open.
///
/// # Errors
/// As for [`check`], and if it cannot be written.
pub fn repair(
    path: impl AsRef<Path>,
    options: &OpenOptions,
    what: Repair,
    observer: &mut dyn CheckObserver,
) -> Result<Option<ImageCheck>> {
    run(path.as_ref(), options, true, &mut |storage| blockmirror_qcow2::repair(storage, what, observer))
}

fn run(
    path: &Path,
    options: &OpenOptions,
    writable: bool,
    work: &mut dyn FnMut(&dyn Storage) -> blockmirror_qcow2::Result<CheckReport>,
) -> Result<Option<ImageCheck>> {
    let protocol = options.open_protocol(path, writable)?;
    let storage: Arc<dyn Storage> = options.given_node().part.of(protocol.storage())?;
    let format = match options.given_format() {
        Some(format) => format,
        None => probe(&*storage, path)?,
    };
    match format {
        Format::Raw => Ok(None),
        Format::Qcow2 => {
            // What is wrong with a header is the check's to find.
            if let Ok(header) = Header::read(&*storage) {
                options.check_virtual_size(header.virtual_size, path)?;
            }
            let report = work(&*storage).map_err(|error| error.in_file(&storage.name().into()))?;
            Ok(Some(ImageCheck { path: path.to_owned(), format, report }))
        }
    }
}

impl ImageCheck {
    /// The members of `qemu-img check --output=json`, in its order. Figures that are zero are left out.
    pub fn to_json(&self) -> Value {
        let report = &self.report;
        let figures = [
            ("image-end-offset", report.image_end_offset),
            ("compressed-clusters", report.compressed_clusters),
            ("total-clusters", report.total_clusters),
            ("corruptions", report.corruptions),
            ("corruptions-fixed", report.corruptions_fixed),
            ("check-errors", report.check_errors),
            ("leaks", report.leaks),
            ("leaks-fixed", report.leaks_fixed),
            ("allocated-clusters", report.allocated_clusters),
        ];
        let shown = figures.into_iter().filter(|(name, figure)| *figure > 0 || *name == "check-errors");
        let mut out: Map<String, Value> =
            shown.map(|(name, figure)| (name.to_owned(), json!(figure))).collect();
        out.insert("filename".into(), json!(self.path.to_string_lossy()));
        out.insert("format".into(), json!(self.format.as_str()));
        if report.fragmented_clusters > 0 {
            out.insert("fragmented-clusters".into(), json!(report.fragmented_clusters));
        }
        Value::Object(out)
    }
}
