//! `blockmirror hash`.

use std::fmt::Display;

use blockmirror_block::{self as block, BlockDevice, Visit};
use blockmirror_hash::{ContentHash, DiskHash, HashOptions};
use blockmirror_image::Image;
use serde_json::{Value, json};

use crate::args::{HashArgs, Output};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::meter::Meter;
use crate::progress::{Phase, Reading};
use crate::{json, lock_policy};

pub(crate) fn run(console: &mut Console<'_>, args: &HashArgs) -> Outcome {
    let interrupt = Interrupt::watch()?;
    let mut objects = Vec::new();
    for ((path, node, format), typed) in args.images.iter().zip(&args.files) {
        let image = lock_policy::of_source(&args.access)
            .format(*format)
            .node(node.clone())
            .cache(args.source_cache)
            .policy(lock_policy::policy(path, &args.access)?)
            .open(path)?;
        for note in image.notes() {
            console.note(note);
        }
        let hash = hash(console, args, &interrupt, &**image.device())?;
        match args.output.output {
            Output::Human => console.print(&format!("{hash}  {}\n", typed.display()))?,
            Output::Json => objects.push(object(&image, &hash)),
        }
    }
    if args.output.output == Output::Json {
        console.print(&(json::pretty(&Value::Array(objects)) + "\n"))?;
    }
    Ok(Exit::Done)
}

fn hash(
    console: &mut Console<'_>,
    args: &HashArgs,
    interrupt: &Interrupt,
    disk: &dyn BlockDevice,
) -> Outcome<String> {
    let mut meter = Meter::new(console, &args.progress, Phase::Hash);
    let progress = &mut |done| {
        meter.show(console, &Reading::of_pass(done, disk.len()), interrupt.progress_wanted());
        if interrupt.requested() { Visit::Break(()) } else { Visit::Continue(()) }
    };
    let hash = if args.plain {
        in_words(ContentHash::of(disk, progress))
    } else {
        in_words(DiskHash::of(disk, &HashOptions::new(), progress))
    };
    meter.finish(console);
    hash?.ok_or_else(|| Failure::failed("hash: interrupted").exit(interrupt.exit()))
}

fn in_words(hash: block::Result<Option<impl Display>>) -> Outcome<Option<String>> {
    Ok(hash?.map(|hash| hash.to_string()))
}

fn object(image: &Image, hash: &str) -> Value {
    json!({
        "filename": image.path().to_string_lossy(),
        "format": image.format().as_str(),
        "virtual-size": image.device().len(),
        "hash": hash,
    })
}
