//! What `blockmirror mirror` and `blockmirror convert` print about a copy that was made.

use blockmirror_mirror::GranularityChoice;
use blockmirror_ops::ConvertOutcome;
use serde_json::{Value, json};

use crate::args::{CopyArgs, View};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome};
use crate::json;

/// Prints what was done, and lists what was given up.
pub(crate) fn conclude(console: &mut Console<'_>, args: &CopyArgs, outcome: &ConvertOutcome) -> Outcome {
    if !outcome.durable && !args.no_sync {
        console.note(format_args!(
            "{}: its server has no flush command: the copy may not be durable",
            args.target.display()
        ));
    }
    let given_up = &outcome.copy.given_up;
    for line in console.voice.failed_ranges(&args.target, given_up, &outcome.copy.unmapped) {
        console.complain(line);
    }
    if args.output.output == View::Json {
        let text = machine(args, outcome)?;
        console.report(&text);
    } else if !args.progress.quiet {
        let text = console.voice.copied(args, outcome);
        console.report(&text);
    }
    Ok(if given_up.is_empty() { Exit::Done } else { Exit::Incomplete })
}

fn machine(args: &CopyArgs, outcome: &ConvertOutcome) -> Outcome<String> {
    let copy = &outcome.copy;
    let given_up: Vec<_> = copy
        .given_up
        .iter()
        .map(|range| {
            json!({ "start": range.range.start(), "length": range.range.len(), "message": range.message })
        })
        .collect();
    let (name, value) = member(args);
    let mut out = json!({
        (name): value,
        "target": args.target.to_string_lossy(),
        "target-format": outcome.format.as_str(),
        "len": outcome.len,
        "copied": copy.copied,
        "zeroed": copy.zeroed,
        "skipped": copy.skipped,
        "shared": copy.shared,
        "clone-calls": copy.clone_calls,
        "given-up": given_up,
        "durable": outcome.durable,
        "elapsed": copy.elapsed.as_secs_f64(),
    });
    if outcome.resumed > 0 {
        out["resumed"] = json!(outcome.resumed);
    }
    if let (Some(verified), Value::Object(out)) = (&outcome.verified, &mut out) {
        let mut object = json!({ "mode": verified.mode.as_str(), "bytes": verified.bytes });
        if let (Some(hash), Value::Object(object)) = (verified.hash, &mut object) {
            object.insert("hash".into(), json!(hash.to_string()));
        }
        out.insert("verified".into(), object);
    }
    add_granularity(&mut out, copy.granularity)?;
    Ok(json::pretty(&out) + "\n")
}

/// Adds `granularity` in bytes and the reason for it.
fn add_granularity(out: &mut Value, choice: GranularityChoice) -> Outcome<()> {
    let choice = serde_json::to_value(choice).map_err(Failure::failed)?;
    if let (Value::Object(out), Value::Object(choice)) = (out, choice) {
        out.extend(choice);
    }
    Ok(())
}

/// The names of the sources as a member for programs.
pub(crate) fn member(args: &CopyArgs) -> (&'static str, Value) {
    match &*args.names {
        [only] => ("source", json!(only.path.to_string_lossy())),
        all => ("sources", all.iter().map(|name| json!(name.path.to_string_lossy())).collect()),
    }
}
