//! What `qemu-img` says of a qcow2 image that cannot be opened, and of options that do not make one.

use blockmirror_block::size::SizeError;
use blockmirror_image::{OptionError, Qcow2Error};

/// A unit or a number that is none, as QEMU's parser of options says it.
const NOT_A_SIZE: &str = "expects a non-negative number below 2^64\n\
    Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
    and exabytes, respectively.";

/// What is wrong with a header or a table.
pub(super) fn of_header(error: &Qcow2Error) -> Option<String> {
    Some(match error {
        Qcow2Error::NotQcow2 { .. } => "Image is not in qcow2 format".to_owned(),
        Qcow2Error::Version { version } => format!("Unsupported qcow2 version {version}"),
        Qcow2Error::UnknownFeatures { bits, names } => features(*bits, names),
        Qcow2Error::HeaderField { field, .. } => match *field {
            "backing_file_offset" => "Invalid backing file offset".to_owned(),
            "backing_file_size" => "Backing file name too long".to_owned(),
            "refcount_table_clusters" => "Image does not contain a reference count table".to_owned(),
            "refcount_table_offset" => "Reference count table offset invalid".to_owned(),
            "l1_table_offset" => "Active L1 table offset invalid".to_owned(),
            "l1_size" => "L1 table is too small".to_owned(),
            "refcount_order" => "Reference count entry width too large; may not exceed 64 bits".to_owned(),
            "snapshots_offset" => "Snapshot table offset invalid".to_owned(),
            "cluster_bits" => "Unsupported cluster size: 2^N".to_owned(),
            _ => return None,
        },
        Qcow2Error::LimitExceeded { what, .. } => match *what {
            "the refcount table, in bytes," => "Reference count table too large",
            "the L1 table, in bytes," => "Active L1 table too large",
            "the L1 table for this virtual size, in bytes," => "Image is too big",
            "the number of snapshots" => "Snapshot table too large",
            "the snapshot table, in bytes," => "Snapshot table is too big",
            _ => return None,
        }
        .to_owned(),
        _ => return None,
    })
}

/// The names of unknown features; those without one as a mask.
fn features(bits: u64, names: &[String]) -> String {
    let mut unnamed = bits;
    let mut known = Vec::new();
    for name in names {
        // `"NAME" (bit N)`, or `bit N` where the image has no name for it.
        let Some((name, bit)) = name.rsplit_once(" (bit ") else { continue };
        if let Ok(bit) = bit.trim_end_matches(')').parse::<u32>() {
            unnamed &= !1_u64.checked_shl(bit).unwrap_or(0);
        }
        known.push(name.trim_matches('"').to_owned());
    }
    if unnamed != 0 {
        known.push(format!("Unknown incompatible feature: {unnamed:x}"));
    }
    format!("Unsupported qcow2 feature(s): {}", known.join(", "))
}

/// What is wrong with the options of a new image.
pub(super) fn of_settings(error: &Qcow2Error) -> Option<String> {
    let Qcow2Error::Option { option, problem } = error else { return None };
    if problem.contains("compat=1.1") {
        let what = match *option {
            "refcount_bits" => "Different refcount widths than 16 bits require",
            "lazy_refcounts" => "Lazy refcounts only supported with",
            "extended_l2" => "Extended L2 entries are only supported with",
            "compression_type" => "Non-zlib compression type is only supported with",
            "data_file" | "data_file_raw" => "External data files are only supported with",
            _ => return None,
        };
        // QEMU has two forms of it.
        let and = if what.ends_with("require") { "or" } else { "and" };
        return Some(format!("{what} compatibility level 1.1 {and} above (use version=v3 or greater)"));
    }
    Some(
        match *option {
            "cluster_size" => "Cluster size must be a power of two between 512 and 2048k",
            "refcount_bits" => "Refcount width must be a power of two and may not exceed 64 bits",
            "extended_l2" => {
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
            }
            "size" => "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            "data_file_raw" if problem.contains("needs a data_file") => "data-file-raw requires data-file",
            "data_file_raw" => "Backing file and data-file-raw cannot be used at the same time",
            "preallocation" => {
                "Backing file and preallocation can only be used at the same time if extended_l2 is on"
            }
            _ => return None,
        }
        .to_owned(),
    )
}

/// What is wrong with the text of `-o`.
pub(crate) fn of_option(error: &OptionError) -> Option<String> {
    Some(match error {
        OptionError::NotAPair { part } => format!("Invalid parameter '{part}'"),
        OptionError::UnknownKey { key, .. } | OptionError::OnlyAtCreation { key } => {
            format!("Invalid parameter '{key}'")
        }
        OptionError::BadSize { key, cause: SizeError::NotASize(text) } if text.starts_with('-') => {
            format!("Value '{text}' is out of range for parameter '{key}'")
        }
        OptionError::BadSize { key, .. } => format!("Parameter '{key}' {NOT_A_SIZE}"),
        OptionError::BadValue { key, value, expected } => match key.as_str() {
            "compat" => format!("Parameter 'version' does not accept value '{value}'"),
            "refcount_bits" => "Refcount width must be a power of two and may not exceed 64 bits".to_owned(),
            "backing_fmt" => format!("unrecognized backing format '{value}'"),
            _ if expected == "on or off" => format!("Parameter '{key}' expects 'on' or 'off'"),
            key => format!("Parameter '{}' does not accept value '{value}'", key.replace('_', "-")),
        },
        _ => return None,
    })
}
