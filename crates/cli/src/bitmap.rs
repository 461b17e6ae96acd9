//! `blockmirror bitmap`: changes of a persistent bitmap, one after the other, each durable.

use std::path::Path;

use blockmirror_image::{FileId, Image, NodeOptions, OpenOptions};

use crate::args::BitmapArgs;
use crate::console::Console;
use crate::failure::{Exit, Outcome};
use crate::lock_policy;

pub(crate) fn run(console: &mut Console<'_>, args: &BitmapArgs) -> Outcome {
    console.keep_out_of(FileId::of(&args.file));
    let options = OpenOptions::new().lock(lock_policy::lock(args.lock));
    let image = open(
        args,
        &args.file,
        &args.node,
        options.clone().format(args.format).writable(true).claim(!args.force),
    )?;
    console.keep_out_of(image.own_files());
    let source = match &args.source_file {
        // Its bits do not depend on what it stands on, which may be the image itself.
        Some(file) => {
            let options = options.format(args.source_format).with_backing(false);
            Some(open(args, file, &args.source_node, options)?)
        }
        None => None,
    };
    for image in std::iter::once(&image).chain(&source) {
        image.notes().iter().for_each(|note| console.note(note));
    }
    for action in &args.actions.0 {
        image.change_bitmap(&args.bitmap, action, source.as_ref())?;
    }
    image.close()?;
    Ok(Exit::Done)
}

fn open(args: &BitmapArgs, path: &Path, node: &NodeOptions, options: OpenOptions) -> Outcome<Image> {
    let policy = lock_policy::allowed_dirs(&args.allow_backing)?.policy_for(path)?;
    Ok(options.node(node.clone()).policy(policy).open(path)?)
}
