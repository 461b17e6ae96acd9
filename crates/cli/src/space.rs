//! What `mirror` and `convert` say of a target that will not fit, and of space that has run out.
//!
//! The figures are those of [`PreparedConvert::space`]; called by [`crate::copy`] before anything is written.

use std::path::Path;

use blockmirror_block::size::human_size;
use blockmirror_block::{self as block, ErrorKind};
use blockmirror_image::FreeSpace;
use blockmirror_ops::PreparedConvert;

use crate::args::CopyArgs;
use crate::checkpoint;
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;

/// Refuses a copy that cannot fit; where that is a guess it is noted.
pub(crate) fn check(
    console: &mut Console<'_>,
    args: &CopyArgs,
    prepared: &PreparedConvert,
    interrupt: &Interrupt,
) -> Outcome<()> {
    if args.no_space_check {
        return Ok(());
    }
    let Some(space) = prepared.space(&|| interrupt.requested()).filter(|space| !space.fits()) else {
        return Ok(());
    };
    let (needed, free) = (human_size(space.needed), human_size(space.free));
    if let Some(why) = space.guess {
        let target = args.target.display();
        console.note(format_args!(
            "{target}: up to {needed} are needed, {free} are free: it may not fit ({why})"
        ));
        return Ok(());
    }
    let error = block::Error::new(ErrorKind::NoSpace, "copy")
        .in_file(args.target.display().to_string())
        .because(format!("up to {needed} are needed, and {free} are free"));
    let kept = checkpoint::kept(prepared);
    Err(Failure::failed(format_args!("{error}; {kept}--no-space-check copies all the same"))
        .caused_by(Some(&error)))
}

/// What is missing for a copy to `target` that has run out of space, with about `left` bytes to write.
pub(crate) fn missing(target: &Path, left: u64) -> String {
    let free = FreeSpace::of(target).ok().flatten().filter(|space| space.device.is_some());
    let free = free.map_or_else(String::new, |space| format!(", {} are free", human_size(space.bytes)));
    format!("up to {} are still to be written{free}", human_size(left))
}
