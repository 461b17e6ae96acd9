//! The line `Formatting 'NAME', fmt=.. key=value ..`: the options of a new image with their defaults, in
//! QEMU's order and as they were typed.

use blockmirror_block::size::parse_size;
use blockmirror_image::Format;

use crate::args::CreateArgs;
use crate::failure::one_line;

/// The keys in QEMU's order, with their defaults.
const QCOW2: &[(&str, Option<&str>)] = &[
    ("cluster_size", Some("65536")),
    ("extended_l2", Some("off")),
    ("preallocation", None),
    ("compression_type", Some("zlib")),
    ("size", None),
    ("compat", None),
    ("backing_file", None),
    ("backing_fmt", None),
    ("data_file", None),
    ("data_file_raw", None),
    ("lazy_refcounts", Some("off")),
    ("refcount_bits", Some("16")),
    ("extent_size_hint", None),
];

const RAW: &[(&str, Option<&str>)] = &[("size", None), ("preallocation", None), ("extent_size_hint", None)];

/// The line about an image of `size` bytes.
pub(super) fn line(args: &CreateArgs, size: u64) -> String {
    let keys = match args.format {
        Format::Qcow2 => QCOW2,
        _ => RAW,
    };
    let typed = args.typed_options();
    let mut out = format!("Formatting '{}', fmt={}", args.typed.display(), args.format);
    for (key, default) in keys {
        let given = typed.iter().rev().find(|(typed, _)| typed == key).map(|(_, value)| value.clone());
        let value = match *key {
            "size" => Some(size.to_string()),
            "extent_size_hint" => given.and_then(|hint| parse_size(&hint).ok()).map(|hint| hint.to_string()),
            "backing_file" => args.backing.clone().or(given),
            "backing_fmt" => args.backing_format.map(|format| format.to_string()).or(given),
            _ => given,
        };
        if let Some(value) = value.or(default.map(ToOwned::to_owned)) {
            out.push_str(&format!(" {key}={value}"));
        }
    }
    one_line(&out) + "\n"
}
