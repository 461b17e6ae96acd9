//! `blockmirror inspect`: the verdict on an image from a stranger.

use blockmirror_image::{FindingKind, Inspection, OpenOptions};

use crate::args::{InspectArgs, Output};
use crate::console::Console;
use crate::failure::{Exit, Outcome, one_line};
use crate::info::exact;
use crate::{json, lock_policy};

pub(crate) fn run(console: &mut Console<'_>, args: &InspectArgs) -> Outcome {
    let options = OpenOptions::new().format(args.format).node(args.node.clone());
    let options = lock_policy::limited(options, args.limits);
    let inspection = Inspection::read(&args.file, &options)?;
    let text = match args.output.output {
        Output::Json => json::pretty(&inspection.to_json(&args.allow)) + "\n",
        Output::Human => human(&inspection, &args.allow),
    };
    console.print(&text)?;
    Ok(match inspection.refusals(&args.allow).next() {
        Some(_) => Exit::Refused,
        None => Exit::Done,
    })
}

fn human(inspection: &Inspection, allowed: &[FindingKind]) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&one_line(&text));
        out.push('\n');
    };
    line(format!("image: {}", inspection.path.display()));
    line(format!("format: {}", inspection.format));
    line(match inspection.virtual_size {
        Some(size) => format!("virtual size: {}", exact(size)),
        None => "virtual size: not known".to_owned(),
    });
    line(format!("file length: {}", exact(inspection.file.len)));
    if !inspection.contents.is_empty() {
        line(format!("contents: {}", inspection.contents.join(", ")));
    }
    for (name, count) in [("snapshots", inspection.snapshots), ("bitmaps", inspection.bitmaps)] {
        if count > 0 {
            line(format!("{name}: {count}"));
        }
    }
    for finding in &inspection.findings {
        let verdict = if allowed.contains(&finding.kind) { "allowed" } else { "refused" };
        line(format!("{verdict}: {}: {}", finding.kind, finding.message));
    }
    let mut kinds: Vec<_> = inspection.refusals(allowed).map(|finding| finding.kind.as_str()).collect();
    kinds.dedup();
    line(match &*kinds {
        [] => "verdict: accepted".to_owned(),
        kinds => format!("verdict: refused ({})", kinds.join(", ")),
    });
    out
}
