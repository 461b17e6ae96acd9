//! `blockmirror resize`.

use blockmirror_block::size::human_size;
use blockmirror_block::{ByteRange, Error, WriteFlags, ZeroFlags};
use blockmirror_image::{FileId, Format, Image, OpenOptions};

use crate::args::{Growth, NewSize, ResizeArgs};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::lock_policy;

/// What is written at once for `--preallocation`.
const PIECE: u64 = 1 << 20;

/// What is mapped at once for `--preallocation=metadata`.
const MAPPED_PIECE: u64 = 1 << 30;

/// What `qemu-img` says where `--shrink` is missing.
const SHRINK_IN_QEMU: &str = "Use the --shrink option to perform a shrink operation.\n\
    qemu-img: warning: Shrinking an image will delete all data beyond the shrunken image's end. \
    Before performing such an operation, make sure there is no important data there.";

/// The length of a disk is a multiple of this.
const SECTOR: u64 = 512;

pub(crate) fn run(console: &mut Console<'_>, args: &ResizeArgs) -> Outcome {
    let file = args.file.display();
    console.keep_out_of(FileId::of(&args.file));
    let image = OpenOptions::new()
        .format(args.format)
        .node(args.node.clone())
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
        ))
        .in_qemu(SHRINK_IN_QEMU));
    }
    let growth = if size > old { args.preallocation } else { Growth::Off };
    if growth != args.preallocation && size < old {
        return Err(Failure::usage(format_args!(
            "resize: {file}: --preallocation is for what is added, and {size} bytes are less than {old}"
        ))
        .in_qemu("Preallocation can only be used for growing images"));
    }
    if args.preallocation == Growth::Metadata && image.format() == Format::Raw {
        return Err(Failure::usage(format_args!(
            "resize: {file}: a raw image has no metadata to preallocate: falloc and full allocate space"
        )));
    }
    let interrupt = Interrupt::watch()?;
    disk.resize(size, args.shrink)?;
    preallocate(&image, ByteRange::new(old, size), growth, &interrupt)?;
    image.close()?;
    if !args.quiet {
        let text = console.voice.resized(&args.file, size);
        console.report(&text);
    }
    Ok(Exit::Done)
}

/// Gives `added`, which reads as zeros, its space. The disk has its new size already, and errors say so: the
/// same command, given again, makes it longer once more.
fn preallocate(image: &Image, added: ByteRange, growth: Growth, interrupt: &Interrupt) -> Outcome<()> {
    if growth == Growth::Off {
        return Ok(());
    }
    let file = image.path().display();
    let last = last_cluster(image, added, growth);
    let mut at = added.start();
    while at < added.end() {
        let left = human_size(added.end() - at);
        if interrupt.requested() {
            let message = format_args!(
                "resize: {file}: interrupted; it has its new size, and {left} of it are not allocated"
            );
            return Err(Failure::failed(message).exit(interrupt.exit()));
        }
        let end = if at < last { last } else { added.end() };
        at = preallocate_piece(image, ByteRange::new(at, end), growth, last).map_err(|error| {
            let size = added.end();
            let done = format!("{file} has its new size, {size} bytes, and {left} of it are not allocated");
            Failure::failed(format_args!("{error}; {done}"))
        })?;
    }
    let flushed = image.device().flush();
    flushed.map_err(|error| {
        Failure::failed(format_args!("{error}; {file} has its new size, {} bytes", added.end()))
    })
}

/// Where the cluster begins that the disk ends within, if its file is to end with the whole of it, as
/// `qemu-img` leaves it: of a qcow2 image that gets data.
fn last_cluster(image: &Image, added: ByteRange, growth: Growth) -> u64 {
    let cluster = image.device().geometry().cluster_size.unwrap_or(1);
    let is_cut = !added.end().is_multiple_of(cluster);
    if image.format() == Format::Qcow2 && growth != Growth::Metadata && is_cut {
        (added.end() / cluster * cluster).max(added.start())
    } else {
        added.end()
    }
}

/// Gives the first bytes of `rest` their space; returns where they end. A raw file gets it without being
/// written where `falloc` suffices; in a qcow2 image data takes the space, or with `metadata` the mapping
/// alone does. From `last` on lies a cut cluster: mapping it makes the file as long as the whole of it.
fn preallocate_piece(image: &Image, rest: ByteRange, growth: Growth, last: u64) -> Result<u64, Error> {
    let disk = image.device();
    if rest.start() == last {
        disk.preallocate(rest)?;
    }
    let most = if growth == Growth::Metadata { MAPPED_PIECE } else { PIECE };
    let piece = ByteRange::at(rest.start(), most.min(rest.len()));
    match growth {
        Growth::Metadata => disk.preallocate(piece)?,
        Growth::Falloc if image.format() == Format::Raw => disk.write_zeroes(piece, ZeroFlags::NONE)?,
        _ => disk.write_at(&vec![0; piece.len() as usize], piece.start(), WriteFlags::NONE)?,
    }
    Ok(piece.end())
}
