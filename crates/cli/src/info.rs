//! `blockmirror info`.

use std::fmt::Write;

use blockmirror_block::size::human_size;
use blockmirror_image::{
    BITMAPS_BEFORE, CutShort, Format, ImageInfo, OpenOptions, Qcow2Info, qcow2_fields, read_chain,
};
use serde_json::Value;

use crate::args::{InfoArgs, Output};
use crate::console::Console;
use crate::failure::{Exit, Outcome, one_line};
use crate::{json, lock_policy, snapshot};

pub(crate) fn run(console: &mut Console<'_>, args: &InfoArgs) -> Outcome {
    let options =
        OpenOptions::new().format(args.format).node(args.node.clone()).nbd(lock_policy::nbd(&args.access));
    let options = lock_policy::limited(options, args.access.limits);
    // Held while the image is looked at.
    let _lock = match args.locks {
        true => Some(lock_policy::of_source(&args.access).format(Format::Raw).open(&args.file)?),
        false => None,
    };
    let text = if args.backing_chain {
        let policy = lock_policy::policy(&args.file, &args.access)?;
        let chain = read_chain(&args.file, &options.policy(policy))?;
        match args.output.output {
            Output::Json => json::pretty(&chain.iter().map(ImageInfo::to_json).collect::<Value>()) + "\n",
            Output::Human => chain.iter().map(human).collect::<Vec<_>>().join("\n"),
        }
    } else {
        let info = ImageInfo::read(&args.file, &options)?;
        match args.output.output {
            Output::Json => json::pretty(&info.to_json()) + "\n",
            Output::Human => human(&info),
        }
    };
    console.print(&text)?;
    Ok(Exit::Done)
}

fn human(info: &ImageInfo) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&one_line(&text));
        out.push('\n');
    };
    let allocated = || info.file.allocated.map_or_else(|| "unavailable".to_owned(), human_size);
    line(format!("image: {}", info.path.display()));
    line(format!("file format: {}", info.format));
    line(format!("virtual size: {}", exact(info.virtual_size)));
    line(format!("disk size: {}", allocated()));
    if let Some(qcow2) = &info.qcow2 {
        line(format!("cluster_size: {}", qcow2.header.cluster_size()));
    }
    if info.is_dirty() {
        line("cleanly shut down: no".to_owned());
    }
    if let Some(cut) = info.qcow2.as_ref().and_then(|qcow2| qcow2.cut_short) {
        line(cut_short(cut));
    }
    if let Some(backing) = &info.backing {
        let mut text = format!("backing file: {}", backing.name.display());
        if backing.full != backing.name {
            let _ = write!(text, " (actual path: {})", backing.full.display());
        }
        line(text);
        if let Some(format) = &backing.format {
            line(format!("backing file format: {format}"));
        }
    }
    if let Some(qcow2) = &info.qcow2 {
        snapshot::list(&qcow2.snapshots, &mut line);
        specific(qcow2, &mut line);
    }
    line("Child node '/file':".to_owned());
    line(format!("    filename: {}", info.path.display()));
    line(format!("    protocol type: {}", info.file.kind.as_str()));
    // QEMU rounds the length of a file up to sectors for people, too.
    line(format!("    file length: {}", exact(info.file.len.next_multiple_of(512))));
    line(format!("    disk size: {}", allocated()));
    out
}

pub(crate) fn exact(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", human_size(bytes))
}

fn cut_short(cut: CutShort) -> String {
    let (len, first) = (cut.file_len, cut.first);
    let missing = exact(cut.missing);
    match (cut.complete, cut.missing) {
        (true, _) => {
            format!(
                "cut short: the file ends at {len}; {missing} of the disk are missing, the first at {first}"
            )
        }
        (false, 0) => format!(
            "cut short: not known; the file ends at {len}, and of the disk only what lies before {first} was looked at"
        ),
        (false, _) => format!(
            "cut short: the file ends at {len}; {missing} of the disk or more are missing, the first at {first}"
        ),
    }
}

fn specific(qcow2: &Qcow2Info, line: &mut dyn FnMut(String)) {
    line("Format specific information:".to_owned());
    for (key, value) in qcow2_fields(&qcow2.header) {
        if key == BITMAPS_BEFORE {
            bitmaps(qcow2, line);
        }
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        line(format!("    {}: {text}", key.replace('-', " ")));
    }
}

fn bitmaps(qcow2: &Qcow2Info, line: &mut dyn FnMut(String)) {
    if qcow2.bitmaps.is_empty() {
        return;
    }
    line("    bitmaps:".to_owned());
    for (i, bitmap) in qcow2.bitmaps.iter().enumerate() {
        line(format!("        [{i}]:"));
        line("            flags:".to_owned());
        let flags = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")];
        for (i, (_, flag)) in flags.iter().filter(|(set, _)| *set).enumerate() {
            line(format!("                [{i}]: {flag}"));
        }
        line(format!("            name: {}", bitmap.name));
        line(format!("            granularity: {}", bitmap.granularity));
    }
}
