//! The images of `serve`, as exports.

use std::collections::BTreeSet;
use std::sync::Arc;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::{ByteRange, Result, Visit};
use blockmirror_image::{Format, Image, ImageName, is_uri};
use blockmirror_nbd::server::{Export, MetaContext};
use tracing::warn;

use crate::args::ServeArgs;
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::lock_policy;

/// The names of the exports, in the order of the images.
pub(super) fn export_names(args: &ServeArgs) -> Outcome<Vec<String>> {
    let usage = |why: String| Err(Failure::usage(format_args!("serve: {why}")));
    let (images, given) = (args.images.len(), args.names.len());
    let names = match given {
        0 if images == 1 => vec![String::new()],
        0 => args.images.iter().map(default_name).collect(),
        _ if given == images => args.names.clone(),
        _ => return usage(format!("{given} names (--name) for {images} images")),
    };
    let mut seen = BTreeSet::new();
    match names.iter().find(|name| !seen.insert(name.as_str())) {
        Some(twice) => usage(format!("two exports would be called '{twice}'; --name gives other names")),
        None => Ok(names),
    }
}

/// The name of a file without its directory; of an export elsewhere, its URI.
fn default_name(image: &ImageName) -> String {
    let path = &image.path;
    let name = if is_uri(path) { None } else { path.file_name() };
    name.unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Opens all images.
pub(super) fn open_all(console: &mut Console<'_>, args: &ServeArgs) -> Outcome<Vec<Image>> {
    if args.writable && args.access.force_share {
        return Err(Failure::usage("serve: -U is for reading; it cannot be combined with --writable"));
    }
    let mut images = Vec::new();
    for name in &args.images {
        let image = open(args, name)?;
        if args.writable {
            console.keep_out_of(image.own_files());
        }
        for note in image.notes() {
            console.note(note);
        }
        images.push(image);
    }
    Ok(images)
}

fn open(args: &ServeArgs, name: &ImageName) -> Outcome<Image> {
    let access = &args.access;
    let options = match args.writable {
        true => lock_policy::limited(lock_policy::of_target(access), access.limits),
        false => lock_policy::of_source(access),
    };
    let image = options
        .format(name.format)
        .node(name.node.clone())
        .snapshot(args.snapshot.clone())
        .cache(args.cache)
        .writable(args.writable)
        .claim(args.writable && !args.force)
        .policy(lock_policy::policy(&name.path, access)?)
        .open(&name.path)?;
    // What a client writes to the beginning would be taken for a format the next time.
    if args.writable && name.format.is_none() && image.format() == Format::Raw {
        let path = name.path.display();
        return Err(Failure::usage(format_args!("{path}: it looks raw; to let clients write, give -f raw")));
    }
    Ok(image)
}

/// `image` as the export `name`.
pub(super) fn export(name: &str, image: &Image, args: &ServeArgs) -> Outcome<Export> {
    let shown = image.path().display().to_string();
    let mut export = Export::new(name, Arc::clone(image.device()))
        .writable(args.writable)
        .allocation_depth(true)
        .on_cut_short(move |error| {
            warn!(target: blockmirror_daemon::NOTICE, "{shown}: {error}; clients read zeros there");
        });
    for bitmap in &args.bitmaps {
        export = export.context(Arc::new(StoredBitmap::read(image, bitmap, args.writable)?));
    }
    Ok(export)
}

/// A persistent bitmap that does not change, as a context.
struct StoredBitmap {
    /// On the wire.
    name: String,
    bits: DirtyBitmap,
}

impl StoredBitmap {
    /// Reads the bitmap `name` of `image`. One that records what clients write would change under those who
    /// read it.
    fn read(image: &Image, name: &str, writable: bool) -> Outcome<Self> {
        let path = image.path().display();
        let failed = |why: &dyn std::fmt::Display| Failure::failed(format_args!("{path}: {why}"));
        let qcow2 = image.with_bitmaps()?;
        let entries = qcow2.bitmaps().map_err(|error| failed(&error))?;
        if writable && entries.iter().any(|entry| entry.name == *name && entry.auto) {
            return Err(Failure::failed(format_args!(
                "{path}: the bitmap '{name}' records writes; `bitmap --disable` ends that, or serve it without \
                 --writable"
            )));
        }
        let bits = qcow2.read_bitmap(name).map_err(|error| failed(&error))?;
        Ok(Self { name: format!("qemu:dirty-bitmap:{name}"), bits })
    }
}

impl MetaContext for StoredBitmap {
    fn name(&self) -> &str {
        &self.name
    }

    fn visit(&self, range: ByteRange, visit: &mut dyn FnMut(ByteRange, u32) -> Visit) -> Result<()> {
        let (mut at, end) = (range.start(), range.end());
        while at < end {
            let dirty = self.bits.next_dirty(at, end - at).filter(|run| run.start < end);
            let dirty =
                dirty.map_or(ByteRange::new(end, end), |run| ByteRange::new(run.start, run.end.min(end)));
            if at < dirty.start() && visit(ByteRange::new(at, dirty.start()), 0).is_break() {
                return Ok(());
            }
            if !dirty.is_empty() && visit(dirty, 1).is_break() {
                return Ok(());
            }
            at = dirty.end();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_a_bitmap_cover_what_is_asked_for() {
        let mut bits = DirtyBitmap::new(1 << 20, 65536).unwrap();
        bits.set(65536..3 * 65536);
        bits.set((1 << 20) - 1..1 << 20);
        let context = StoredBitmap { name: "qemu:dirty-bitmap:b".into(), bits };
        let runs = |start, end| {
            let mut runs = Vec::new();
            context
                .visit(ByteRange::new(start, end), &mut |run, flags| {
                    runs.push((run.start() >> 9, run.end() >> 9, flags));
                    Visit::Continue(())
                })
                .unwrap();
            runs
        };
        assert_eq!(runs(0, 1 << 20), [(0, 128, 0), (128, 384, 1), (384, 1920, 0), (1920, 2048, 1)]);
        assert_eq!(runs(512, 65536), [(1, 128, 0)]);
        assert_eq!(runs(65536 + 512, 131_072), [(129, 256, 1)]);
        let mut first = 0;
        let stop = |_: ByteRange, _: u32| {
            first += 1;
            Visit::Break(())
        };
        context.visit(ByteRange::new(0, 1 << 20), &mut { stop }).unwrap();
        assert_eq!(first, 1);
    }
}
