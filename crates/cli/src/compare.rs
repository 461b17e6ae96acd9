//! `blockmirror compare`.

use std::path::Path;

use blockmirror_block::{self as block, BlockDevice, ByteRange, Visit};
use blockmirror_image::{
    CompareError, CompareOptions, Difference, Format, Image, NodeOptions, compare, differences,
};
use serde_json::json;

use crate::args::{CompareArgs, Output};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::meter::Meter;
use crate::progress::{Phase, Reading};
use crate::ranges::RangesFile;
use crate::{json, lock_policy, qemu_words};

pub(crate) fn run(console: &mut Console<'_>, args: &CompareArgs) -> Outcome {
    // 1 says that the images differ, so what fails says 2.
    run_inner(console, args).map_err(|failure| match failure.exit {
        Exit::Failed => failure.exit(Exit::NotCompared),
        _ => failure,
    })
}

fn run_inner(console: &mut Console<'_>, args: &CompareArgs) -> Outcome {
    let first = open(&args.first, &args.nodes.0, args.first_format, args)?;
    let second = open(&args.second, &args.nodes.1, args.second_format, args)?;
    for note in first.notes().iter().chain(second.notes()) {
        console.note(note);
    }
    let (a, b) = (&**first.device(), &**second.device());
    let interrupt = Interrupt::watch()?;
    let mut meter = Meter::new(console, &args.progress, Phase::Compare);
    let len = a.len().max(b.len());
    let mut stopped = false;
    let options = CompareOptions::default().strict(args.strict);
    let mut ranges = args.ranges.as_deref().map(|path| RangesFile::create(path, &interrupt)).transpose()?;
    let progress = &mut |done| {
        let reading = Reading::of_pass(done, len);
        meter.show(console, &reading, interrupt.progress_wanted());
        stopped = interrupt.requested();
        if stopped { Visit::Break(()) } else { Visit::Continue(()) }
    };
    let mut failure = None;
    let found = match &mut ranges {
        Some(file) => Ok(all_differences(a, b, file, progress).unwrap_or_else(|error| {
            failure = Some(Failure::from(error));
            None
        })),
        None => compare(a, b, options, progress),
    };
    meter.finish(console);
    if let Some(failure) = failure {
        return Err(failure);
    }
    let found = match found {
        Ok(found) => found,
        Err(error) => {
            let past_shorter = a.len() != b.len() && error.offset >= a.len().min(b.len());
            return Err(failed(console, args, error, past_shorter));
        }
    };
    if stopped {
        return Err(Failure::failed("compare: interrupted").exit(interrupt.exit()));
    }
    ranges.map_or(Ok(()), RangesFile::finish)?;
    let differ = found.is_some();
    if !args.progress.quiet {
        console.print(&match args.output.output {
            Output::Human => human(found, a.len(), b.len()),
            Output::Json => machine(found, &first, &second),
        })?;
    }
    Ok(if differ { Exit::Failed } else { Exit::Done })
}

/// The failure of a comparison, behind the end of the shorter disk if `past_shorter`.
fn failed(console: &mut Console<'_>, args: &CompareArgs, error: CompareError, past_shorter: bool) -> Failure {
    let name = if error.is_second { &args.typed.1 } else { &args.typed.0 }.display();
    let (exit, words) = if error.is_read {
        let why = qemu_words::reason(&error.cause);
        (Exit::NotRead, format!("Error while reading offset {} of {name}: {why}", error.offset))
    } else {
        (Exit::NotMapped, format!("Sector allocation test failed for {name}"))
    };
    let failure = Failure::from(error.cause).in_qemu(words).exit(exit);
    let after = console.voice.after_failed_compare(past_shorter);
    if after.is_empty() || args.progress.quiet {
        return failure;
    }
    if let Some(message) = console.voice.failure(failure) {
        console.complain(message);
    }
    console.report(after);
    Failure { exit, message: None, in_qemu: None, detail: None }
}

/// Writes all ranges that differ to `file`; the first of them.
fn all_differences(
    a: &dyn BlockDevice,
    b: &dyn BlockDevice,
    file: &mut RangesFile,
    progress: &mut dyn FnMut(u64) -> Visit,
) -> block::Result<Option<Difference>> {
    let mut first = None;
    let whole = ByteRange::new(0, a.len().max(b.len()));
    differences(a, b, whole, progress, &mut |range| {
        first.get_or_insert(Difference::Content { offset: range.start() });
        file.push(range);
    })?;
    Ok(first)
}

fn open(path: &Path, node: &NodeOptions, format: Option<Format>, args: &CompareArgs) -> Outcome<Image> {
    let allowed = lock_policy::allowed(&args.access)?.file(&args.first).file(&args.second);
    let options = lock_policy::of_source(&args.access)
        .format(format)
        .node(node.clone())
        .cache(args.source_cache)
        .policy(allowed.policy_for(path)?);
    Ok(options.open(path)?)
}

fn human(found: Option<Difference>, a: u64, b: u64) -> String {
    let verdict = match found {
        None => "Images are identical.\n".to_owned(),
        Some(Difference::Length) => return "Strict mode: Image size mismatch!\n".to_owned(),
        Some(Difference::Status { offset }) => {
            format!("Strict mode: Offset {offset} block status mismatch!\n")
        }
        Some(Difference::Content { offset }) => format!("Content mismatch at offset {offset}!\n"),
        Some(other) => format!("Images differ: {other:?}\n"),
    };
    // A difference in length is reported only if the common part is equal.
    let in_common = matches!(found, Some(Difference::Content { offset }) if offset < a.min(b));
    if a != b && !in_common { format!("Warning: Image size mismatch!\n{verdict}") } else { verdict }
}

fn machine(found: Option<Difference>, first: &Image, second: &Image) -> String {
    let images: Vec<_> = [first, second]
        .into_iter()
        .map(|image| {
            json!({
                "filename": image.path().to_string_lossy(),
                "format": image.format().as_str(),
                "virtual-size": image.device().len(),
            })
        })
        .collect();
    let (reason, offset) = match found {
        None => (None, None),
        Some(Difference::Length) => (Some("virtual-size"), None),
        Some(Difference::Status { offset }) => (Some("status"), Some(offset)),
        Some(Difference::Content { offset }) => (Some("content"), Some(offset)),
        Some(_) => (Some("other"), None),
    };
    let mut out = json!({ "identical": found.is_none(), "images": images });
    if let Some(out) = out.as_object_mut() {
        if let Some(reason) = reason {
            out.insert("difference".into(), json!(reason));
        }
        if let Some(offset) = offset {
            out.insert("offset".into(), json!(offset));
        }
    }
    json::pretty(&out) + "\n"
}
