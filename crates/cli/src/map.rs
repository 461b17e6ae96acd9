//! `blockmirror map`: rows as they are found, or a picture of all of them.

use std::io::{BufWriter, Write};
use std::sync::Arc;

use blockmirror_block::{BlockDevice, ByteRange, Visit};
use blockmirror_image::{Image, MapRow, map};
use blockmirror_picture::{Allocation, Content, Format};

use crate::args::{MapArgs, View};
use crate::console::{Console, with_names};
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::lock_policy;

pub(crate) fn run(console: &mut Console<'_>, args: &MapArgs) -> Outcome {
    let options = lock_policy::of_source(&args.access)
        .format(args.format)
        .node(args.node.clone())
        .holes_if_preallocated(args.holes_if_preallocated)
        .policy(lock_policy::policy(&args.file, &args.access)?);
    let context = options.open_context(&args.file)?;
    let shows_context = context.is_some();
    let device = match context {
        Some(device) => device,
        None => {
            let image = options.open(&args.file)?;
            image.notes().iter().for_each(|note| console.note(note));
            located(&image)?
        }
    };
    let end = args.max_length.map_or(device.len(), |length| args.start_offset.saturating_add(length));
    let range = ByteRange::new(args.start_offset, end);
    let mapping = Mapping { device: &*device, range, shows_context };
    match args.output.output.picture() {
        Some(format) => mapping.draw(console, args, format),
        None => mapping.list(console, args.output.output == View::Json),
    }
}

/// A disk, which part of it is wanted, and whether it is a context.
struct Mapping<'a> {
    device: &'a dyn BlockDevice,
    range: ByteRange,
    shows_context: bool,
}

impl Mapping<'_> {
    /// Hands each row to `visit`. A signal ends this command at once, so nothing is asked between rows.
    fn each(&self, visit: &mut dyn FnMut(MapRow) -> Visit) -> Outcome<()> {
        map(self.device, self.range, &mut |_| Visit::Continue(()), &mut |row| {
            visit(if self.shows_context { in_context(row) } else { row })
        })?;
        Ok(())
    }

    /// Draws all rows.
    fn draw(&self, console: &mut Console<'_>, args: &MapArgs, format: Format) -> Outcome {
        let range = self.range.intersect(ByteRange::new(0, self.device.len()));
        let mut allocation = Allocation::new(range.start()..range.end());
        self.each(&mut |row| {
            let end = row.start.saturating_add(row.length);
            allocation.push(row.start..end, content(&row), row.depth);
            Visit::Continue(())
        })?;
        // What is drawn is escaped, so it has the names that are shown before that.
        let name = args.file.to_string_lossy();
        let name = with_names(&console.shown_names, &name, false);
        console.print(&allocation.picture(&name, format))?;
        Ok(Exit::Done)
    }

    /// Prints each row as it is found.
    fn list(&self, console: &mut Console<'_>, json: bool) -> Outcome {
        let mut out = BufWriter::new(&mut console.out);
        let mut failed = None;
        let mut rows = 0u64;
        match json {
            true => out.write_all(b"["),
            false => writeln!(out, "{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to"),
        }
        .map_err(|e| Failure::output(&e))?;
        self.each(&mut |mut row| {
            if let Some((_, file)) = &mut row.host {
                *file = with_names(&console.shown_names, file, false).into_owned();
            }
            let written = if json {
                let comma: &[u8] = if rows == 0 { b"" } else { b",\n" };
                let written = out.write_all(comma).and_then(|()| row.write_json(&mut out));
                written.map_err(|e| Failure::output(&e))
            } else {
                human(&row, &mut out)
            };
            rows += 1;
            match written {
                Ok(()) => Visit::Continue(()),
                Err(failure) => {
                    failed = Some(failure);
                    Visit::Break(())
                }
            }
        })?;
        if let Some(failure) = failed {
            let _ = out.flush();
            return Err(failure);
        }
        let end = if json { writeln!(out, "]") } else { Ok(()) };
        end.and_then(|()| out.flush()).map_err(|e| Failure::output(&e))?;
        Ok(Exit::Done)
    }
}

/// What a row is in a picture.
fn content(row: &MapRow) -> Content {
    match row {
        MapRow { compressed: true, .. } => Content::Compressed,
        MapRow { data: true, zero: true, .. } => Content::Preallocated,
        MapRow { data: true, depth: 0, .. } => Content::Data,
        MapRow { data: true, .. } => Content::Backing,
        MapRow { present: true, .. } => Content::Zero,
        _ => Content::Hole,
    }
}

/// A row of a context, as QEMU has it: flags in place of what there is.
fn in_context(mut row: MapRow) -> MapRow {
    row.zero &= row.present;
    row.host = row.present.then(|| (row.start, String::new()));
    row
}

/// The disk with the places of its bytes: a filter over the image hides them, since who reads there goes past
/// it. Nothing is read here, but what it says of being asked counts.
fn located(image: &Image) -> Outcome<Arc<dyn BlockDevice>> {
    let device = image.device();
    let Some(below) = device.forwards_to() else { return Ok(Arc::clone(device)) };
    device.extents(ByteRange::new(0, device.len()), &mut |_| Visit::Break(()))?;
    Ok(below)
}

/// A row for people: data only, and only where it lies as it is in a file.
fn human(row: &MapRow, out: &mut impl Write) -> Outcome<()> {
    if !row.data || row.zero {
        return Ok(());
    }
    let Some((offset, file)) = &row.host else {
        return Err(Failure::failed(format_args!(
            "map: data at {} is compressed or has no plain mapping; --output=json shows it",
            row.start
        ))
        .in_qemu("File contains external, encrypted or compressed clusters."));
    };
    let hex = |n: u64| if n == 0 { "0".to_owned() } else { format!("{n:#x}") };
    let file = one_line(file);
    writeln!(out, "{:<16}{:<16}{:<16}{file}", hex(row.start), hex(row.length), hex(*offset))
        .map_err(|e| Failure::output(&e))
}
