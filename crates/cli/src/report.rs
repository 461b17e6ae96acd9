//! What `blockmirror mirror` and `blockmirror convert` print about a copy: the plan, and what was done.

use blockmirror_block::size::human_size;
use blockmirror_mirror::{GranularityChoice, Plan};
use blockmirror_ops::ConvertOutcome;
use serde_json::{Value, json};

use crate::args::{CopyArgs, Output};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::json;

/// The text of a dry run.
pub(crate) fn planned(args: &CopyArgs, plan: &Plan) -> Outcome<String> {
    let (source, target) = (args.shown_sources(), args.target.to_string_lossy());
    if args.output.output == Output::Human {
        let heading = one_line(&format!("dry run: {source} -> {target}: {}", human_size(plan.len)));
        return Ok(format!("{heading}\n{plan}\n"));
    }
    let (name, value) = member(args);
    let mut out = json!({ (name): value, "target": target });
    let plan = serde_json::to_value(plan).map_err(Failure::failed)?;
    if let (Value::Object(out), Value::Object(plan)) = (&mut out, plan) {
        out.extend(plan);
    }
    Ok(json::pretty(&out) + "\n")
}

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
    if args.output.output == Output::Json {
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
fn member(args: &CopyArgs) -> (&'static str, Value) {
    match &*args.names {
        [only] => ("source", json!(only.path.to_string_lossy())),
        all => ("sources", all.iter().map(|name| json!(name.path.to_string_lossy())).collect()),
    }
}
