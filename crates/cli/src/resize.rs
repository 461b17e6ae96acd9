//! `blockmirror resize`.

use blockmirror_image::OpenOptions;
use blockmirror_image::size::human_size;

use crate::access;
use crate::args::{NewSize, ResizeArgs};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome, one_line};

/// The length of a disk is a multiple of this.
const SECTOR: u64 = 512;

pub(crate) fn run(console: &mut Console<'_>, args: &ResizeArgs) -> Outcome {
    let file = args.file.display();
    if let Some(mode) = args.preallocation.as_deref().filter(|mode| *mode != "off") {
        return Err(Failure::usage(format_args!(
            "resize: {file}: --preallocation={mode} is not supported, only off"
        )));
    }
    let image = OpenOptions::new()
        .format(args.format)
        .writable(true)
        .lock(access::lock(args.lock))
        .claim(!args.force)
        .policy(access::policy_with(&args.file, &args.allow_backing)?)
        .open(&args.file)?;
    for note in image.notes() {
        console.note(note);
    }
    let disk = image.device();
    let old = disk.len();
    let size = match args.size {
        NewSize::Absolute(size) => Some(size),
        NewSize::More(by) => old.checked_add(by),
        NewSize::Less(by) => old.checked_sub(by).filter(|size| *size > 0),
    };
    let size = size.and_then(|size| size.checked_next_multiple_of(SECTOR));
    let Some(size) = size else {
        return Err(Failure::usage(format_args!(
            "resize: {file}: it has {old} bytes, which cannot be changed by that much"
        )));
    };
    if size < old && !args.shrink {
        return Err(Failure::usage(format_args!(
            "resize: {file}: {size} bytes would cut off the last {} of {old}; --shrink allows it",
            old - size
        )));
    }
    disk.resize(size, args.shrink)?;
    if !args.quiet {
        let line = format!("resized {file}: {} ({size} bytes)", human_size(size));
        console.report(&(one_line(&line) + "\n"));
    }
    Ok(Exit::Done)
}
