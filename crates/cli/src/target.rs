//! What the commands that make an image say about its files before they write them.

use std::path::Path;

use blockmirror_block::size::human_size;
use blockmirror_image::{Format, InPlace, PreparedImage, Target};

use crate::console::Console;
use crate::interrupt::Interrupt;

/// Names that images of other formats go by.
const OTHER_FORMATS: [&str; 7] = ["qcow2", "qcow", "qed", "vmdk", "vdi", "vhd", "vhdx"];

/// What is said of the target `path` that becomes raw because no format was given, where its name promises
/// another one.
pub(crate) fn raw_despite_name(path: &Path) -> Option<String> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    if !OTHER_FORMATS.contains(&&*extension) {
        return None;
    }
    let how = if extension == "qcow2" { "; -O qcow2 makes a qcow2 image" } else { "" };
    Some(format!("{}: it becomes a raw image, whatever its name says{how}", path.display()))
}

/// Says how the files of a new image are written where that is not as usual, and what earlier runs left. What
/// is printed later goes into none of them, and a signal that ends the process at once removes the temporary
/// ones. Without an `interrupt` they stay, and what was copied can be gone on with.
pub(crate) fn announce(console: &mut Console<'_>, prepared: &PreparedImage, interrupt: Option<&Interrupt>) {
    console.keep_out_of(prepared.targets().filter_map(Target::file));
    if let Some(interrupt) = interrupt {
        interrupt.remove_at_end(prepared.targets().filter_map(Target::partial_path));
    }
    for (index, target) in prepared.targets().enumerate() {
        let name = target.name();
        if let Some(why) = target.in_place() {
            let why = match why {
                InPlace::Asked => String::new(),
                why => format!(" ({why})"),
            };
            // The image is the first; its data file has no header.
            let meanwhile = match prepared.format() {
                Format::Qcow2 if index == 0 => "it cannot be opened until it is complete",
                _ if interrupt.is_none() => {
                    "a failure leaves it incomplete until the same command has gone on"
                }
                _ => "a failure leaves it unusable",
            };
            console.note(format_args!("{name}: written in place{why}: {meanwhile}"));
        }
        for left in target.leftovers() {
            let (path, size) = (left.path().display(), human_size(left.allocated()));
            let what = match left.failure() {
                Some(why) => format!("cannot be removed ({why})"),
                None if left.is_removed() => "removed".to_owned(),
                None => "kept; --clean removes it".to_owned(),
            };
            console
                .note(format_args!("{name}: temporary file of an interrupted run: {path} ({size}): {what}"));
        }
    }
}
