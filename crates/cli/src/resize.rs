//! `blockmirror resize`.

use blockmirror_block::size::human_size;
use blockmirror_block::{ByteRange, WriteFlags, ZeroFlags};
use blockmirror_image::{FileId, Format, Image, OpenOptions};

use crate::args::{Growth, NewSize, ResizeArgs};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;
use crate::lock_policy;

/// What is written at once for `--preallocation`.
const PIECE: u64 = 1 << 20;

/// What is mapped at once for `--preallocation=metadata`.
const MAPPED_PIECE: u64 = 1 << 30;

/// The length of a disk is a multiple of this.
const SECTOR: u64 = 512;

pub(crate) fn run(console: &mut Console<'_>, args: &ResizeArgs) -> Outcome {
    let file = args.file.display();
    console.keep_out_of(FileId::of(&args.file));
    let image = OpenOptions::new()
        .format(args.format)
        .part(args.part)
        .writable(true)
        .lock(lock_policy::lock(args.lock))
        .claim(!args.force)
        .policy(lock_policy::allowed_dirs(&args.allow_backing)?.policy_for(&args.file)?)
        .open(&args.file)?;
    console.keep_out_of(image.own_files());
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
    let growth = if size > old { args.preallocation } else { Growth::Off };
    if growth != args.preallocation && size < old {
        return Err(Failure::usage(format_args!(
            "resize: {file}: --preallocation is for what is added, and {size} bytes are less than {old}"
        )));
    }
    if args.preallocation == Growth::Metadata && image.format() == Format::Raw {
        return Err(Failure::usage(format_args!(
            "resize: {file}: a raw image has no metadata to preallocate: falloc and full allocate space"
        )));
    }
    let interrupt = Interrupt::watch()?;
    disk.resize(size, args.shrink)?;
    preallocate(&image, ByteRange::new(old, size), growth, &interrupt)?;
    if !args.quiet {
        let line = format!("resized {file}: {} ({size} bytes)", human_size(size));
        console.report(&(one_line(&line) + "\n"));
    }
    Ok(Exit::Done)
}

/// Gives `added`, which reads as zeros, its space. A raw file gets it without being written where `falloc`
/// suffices; in a qcow2 image data takes the space, or with `metadata` the mapping alone does.
fn preallocate(image: &Image, added: ByteRange, growth: Growth, interrupt: &Interrupt) -> Outcome<()> {
    if growth == Growth::Off {
        return Ok(());
    }
    let (disk, reserve) = (image.device(), growth == Growth::Falloc && image.format() == Format::Raw);
    let zeros = vec![0; PIECE as usize];
    let piece = if growth == Growth::Metadata { MAPPED_PIECE } else { PIECE };
    let mut at = added.start();
    while at < added.end() {
        if interrupt.requested() {
            let message = format_args!(
                "resize: {}: interrupted; it has its new size, and {} of it are not allocated",
                image.path().display(),
                human_size(added.end() - at)
            );
            return Err(Failure::failed(message).exit(interrupt.exit()));
        }
        let len = piece.min(added.end() - at);
        if growth == Growth::Metadata {
            disk.preallocate(ByteRange::at(at, len))?;
        } else if reserve {
            disk.write_zeroes(ByteRange::at(at, len), ZeroFlags::NONE)?;
        } else {
            disk.write_at(zeros.get(..len as usize).unwrap_or(&zeros), at, WriteFlags::NONE)?;
        }
        at += len;
    }
    Ok(disk.flush()?)
}
