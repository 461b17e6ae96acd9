//! What `mirror` and `convert` say of a finished copy in our own voice.

use blockmirror_block::size::human_size;
use blockmirror_ops::ConvertOutcome;

use crate::args::CopyArgs;
use crate::failure::one_line;

/// A finished copy for people, in our own voice.
pub(super) fn line(args: &CopyArgs, outcome: &ConvertOutcome) -> String {
    let copy = &outcome.copy;
    let lost: u64 = copy.given_up.iter().map(|range| range.range.len()).sum();
    let lost = match copy.given_up.is_empty() {
        true => String::new(),
        false => format!("{} failed, ", human_size(lost)),
    };
    let shared = match copy.shared {
        0 => String::new(),
        bytes => format!("{} shared ({} calls), ", human_size(bytes), copy.clone_calls),
    };
    let durable = if outcome.durable { "" } else { ", not durable" };
    let line = format!(
        "{} -> {} ({}): {}: {} copied, {shared}{} zeroed, {} skipped, {lost}in {:.2} s{durable}",
        args.shown_sources(),
        args.target.display(),
        outcome.format,
        human_size(outcome.len),
        human_size(copy.copied),
        human_size(copy.zeroed),
        human_size(copy.skipped),
        copy.elapsed.as_secs_f64()
    );
    let mut text = one_line(&line) + "\n";
    if let Some(verified) = &outcome.verified {
        let (bytes, mode) = (human_size(verified.bytes), verified.mode.as_str());
        text.push_str(&format!("verified ({mode}): {bytes} equal"));
        if let Some(hash) = verified.hash {
            text.push_str(&format!(", {hash}"));
        }
        text.push('\n');
    }
    text
}
