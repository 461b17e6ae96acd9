//! The plan of a copy: what it does with the disk, and what each granularity costs.

use std::time::Duration;

use blockmirror_block::size::human_size;

use crate::style::Color;
use crate::svg::{Anchor, Drawing, INNER, MARGIN, TextStyle};
use crate::text::{number, percent, shortened, size_and_share};

/// What a granularity costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GranularityRow {
    /// Bytes for each bit of the dirty bitmap.
    pub granularity: u64,
    /// Memory of the job's bitmaps, at most.
    pub memory: u64,
    /// Bytes that are copied after a small write of the guest.
    pub write: u64,
    /// The same where whole granules are copied.
    pub whole_write: u64,
    /// Bytes that the first pass allocates in the target where whole granules are copied.
    pub whole_allocation: u64,
    /// Whether it is the one of the plan.
    pub chosen: bool,
}

/// The space that the target takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceRow<'a> {
    /// Bytes that it takes, at most.
    pub needed: u64,
    /// Bytes that are there for it.
    pub free: u64,
    /// Why it may take less, if that is so.
    pub guess: Option<&'a str>,
}

/// The plan of a copy: the figures of a picture.
#[derive(Clone, Debug)]
pub struct CopyPlan<'a> {
    /// Name of the source.
    pub source: &'a str,
    /// Name of the target.
    pub target: &'a str,
    /// Length of the disk.
    pub len: u64,
    /// Bytes to copy.
    pub copy: u64,
    /// Bytes to make zero.
    pub zero: u64,
    /// Bytes that need nothing.
    pub skip: u64,
    /// Bytes of the target's units that what is copied touches.
    pub allocation: u64,
    /// The granularity and why it was chosen.
    pub granularity: &'a str,
    /// The guest's write that [`GranularityRow::write`] is about.
    pub small_write: u64,
    /// Each granularity, in order.
    pub rows: &'a [GranularityRow],
    /// Space needed and there, if it is known.
    pub space: Option<SpaceRow<'a>>,
    /// Bytes per second, if a rate is given, and how long the copy takes then.
    pub time: Option<(u64, Duration)>,
}

/// What the picture says, in a sentence.
pub(crate) fn sentence(plan: &CopyPlan<'_>) -> String {
    let chosen = plan.rows.iter().find(|row| row.chosen).map(|row| human_size(row.granularity));
    let granularity = chosen.map_or(String::new(), |size| format!(", at a granularity of {size}"));
    format!("{} of {} to copy{granularity}", human_size(plan.copy), human_size(plan.len))
}

/// Where the columns of the table begin or end, and how wide they are.
const GRANULARITY_END: f64 = 120.0;
const MEMORY_END: f64 = 206.0;
const DOTS: f64 = 246.0;
const DOTS_WIDTH: f64 = 300.0;
const BARS: f64 = 592.0;
const BARS_WIDTH: f64 = 120.0;

/// The radius of a disc, and of a ring, which can lie around one.
const DISC: f64 = 3.5;
const RING: f64 = 6.0;

/// The height of a row of the table.
const ROW: u32 = 22;

/// The drawing; with a title, which a page has already, if it is `titled`.
pub(crate) fn drawing(plan: &CopyPlan<'_>, titled: bool) -> String {
    let mut drawing = Drawing::default();
    let (sentence, left) = (sentence(plan), f64::from(MARGIN));
    let mut y = 24;
    if titled {
        drawing.text(left, 42, TextStyle::TITLE, &sentence);
        let names = format!("{} → {}", shortened(plan.source, 48), shortened(plan.target, 48));
        drawing.text(left, 66, TextStyle::PLAIN, &names);
        y = 104;
    }
    y = shares(&mut drawing, plan, y);
    y = table(&mut drawing, plan, y + 40);
    y = space(&mut drawing, plan, y);
    drawing.finish(y + 14, &sentence, !titled)
}

/// What is done with the disk; gives where that ends.
fn shares(drawing: &mut Drawing, plan: &CopyPlan<'_>, y: u32) -> u32 {
    drawing.text(f64::from(MARGIN), y, TextStyle::HEADING, "What the copy does with the disk");
    let parts = [
        ("Copy", plan.copy, Color::Data),
        ("Make zero", plan.zero, Color::Zero),
        ("Skip, nothing to do", plan.skip, Color::Hole),
    ];
    let bars: Vec<_> = parts.iter().map(|(_, bytes, color)| (*bytes, *color)).collect();
    drawing.stacked_bar(f64::from(y) + 12.0, 18.0, &bars, plan.len);
    for (at, (name, bytes, color)) in parts.iter().enumerate() {
        let x = f64::from(MARGIN) + at as f64 * (f64::from(INNER) / 3.0);
        drawing.legend(x, y + 54, *color, name, &size_and_share(*bytes, plan.len));
    }
    y + 74
}

/// A row for each granularity; gives where they end.
fn table(drawing: &mut Drawing, plan: &CopyPlan<'_>, y: u32) -> u32 {
    let left = f64::from(MARGIN);
    drawing.text(left, y, TextStyle::HEADING, "What each granularity costs");
    drawing.text(left, y + 21, TextStyle::NOTE, &format!("Chosen: {}", plan.granularity));
    let small = human_size(plan.small_write);
    let head = y + 54;
    let bold = TextStyle::NOTE.bold();
    drawing.text(GRANULARITY_END, head, bold.at(Anchor::End), "Granularity");
    drawing.text(MEMORY_END, head, bold.at(Anchor::End), "Memory");
    drawing.text(MEMORY_END, head + 20, TextStyle::NOTE.at(Anchor::End), "at most");
    drawing.text(DOTS, head, bold, &format!("Copied after a guest write of {small}"));
    drawing.text(BARS, head, bold, "Allocated in the target");
    drawing.text(BARS, head + 20, TextStyle::NOTE, "where whole granules are copied");
    let top = f64::from(head) + 30.0;
    let bottom = top + (plan.rows.len() as u32 * ROW) as f64;
    highlight(drawing, plan, top);
    scale(drawing, plan, head + 20, top, bottom);
    for (at, row) in plan.rows.iter().enumerate() {
        let base = top as u32 + at as u32 * ROW + 16;
        let style = if row.chosen { TextStyle::PLAIN.bold() } else { TextStyle::PLAIN };
        drawing.text(GRANULARITY_END, base, style.at(Anchor::End), &human_size(row.granularity));
        drawing.text(MEMORY_END, base, style.at(Anchor::End), &human_size(row.memory));
        let (middle, from) = (f64::from(base) - 5.0, dot(plan, row.write));
        let to = dot(plan, row.whole_write);
        drawing.line((from, middle), (to, middle), 2.0, Color::Zero);
        drawing.disc(to, middle, RING, Color::Warning, true);
        drawing.disc(from, middle, DISC, Color::Data, false);
        allocation(drawing, plan, row, middle);
    }
    keys(drawing, plan, bottom as u32 + 24)
}

/// A band behind the chosen row.
fn highlight(drawing: &mut Drawing, plan: &CopyPlan<'_>, top: f64) {
    if let Some(at) = plan.rows.iter().position(|row| row.chosen) {
        let y = top + (at as u32 * ROW) as f64;
        drawing.rect(f64::from(MARGIN), y, f64::from(INNER), f64::from(ROW), Color::Highlight);
    }
}

/// Lines and sizes above the dots.
fn scale(drawing: &mut Drawing, plan: &CopyPlan<'_>, label: u32, top: f64, bottom: f64) {
    for size in [4 << 10, 64 << 10, 1 << 20, 16 << 20] {
        let (least, most) = bounds(plan);
        if size < least || size > most {
            continue;
        }
        let x = dot(plan, size);
        drawing.line((x, top), (x, bottom), 1.0, Color::Grid);
        drawing.text(x, label, TextStyle::NOTE.at(Anchor::Middle), &human_size(size));
    }
}

fn bounds(plan: &CopyPlan<'_>) -> (u64, u64) {
    let sizes = || plan.rows.iter().flat_map(|row| [row.write, row.whole_write]);
    let least = sizes().min().unwrap_or(1).max(1);
    (least, sizes().max().unwrap_or(1).max(least * 2))
}

/// Where `bytes` lie among the dots: each step is a power of two.
fn dot(plan: &CopyPlan<'_>, bytes: u64) -> f64 {
    let (least, most) = bounds(plan);
    let (least, most) = ((least as f64).log2(), (most as f64).log2());
    DOTS + 8.0 + ((bytes.max(1) as f64).log2() - least) / (most - least) * DOTS_WIDTH
}

/// What the target allocates where whole granules are copied: what has to be, and what is added.
fn allocation(drawing: &mut Drawing, plan: &CopyPlan<'_>, row: &GranularityRow, middle: f64) {
    let most = plan.rows.iter().map(|row| row.whole_allocation).max().unwrap_or(0).max(1) as f64;
    let width = |bytes: u64| bytes as f64 / most * BARS_WIDTH;
    let needed = plan.allocation.min(row.whole_allocation);
    let added = row.whole_allocation - needed;
    drawing.rect(BARS, middle - 6.0, width(needed).max(1.0), 12.0, Color::Data);
    if added > 0 {
        drawing.rect(BARS + width(needed), middle - 6.0, width(added).max(1.0), 12.0, Color::Warning);
    }
    let text = with_added(row.whole_allocation, plan.allocation);
    drawing.text(BARS + BARS_WIDTH + 10.0, middle as u32 + 5, TextStyle::NOTE, &text);
}

/// The bytes `whole`, and how much more than `needed` that is.
pub(crate) fn with_added(whole: u64, needed: u64) -> String {
    let size = human_size(whole);
    match whole.saturating_sub(needed) {
        0 => size,
        added if added < needed => format!("{size} (+{})", percent(added, needed)),
        _ => format!("{size} (×{})", number((whole as f64 / needed.max(1) as f64 * 10.0).round() / 10.0)),
    }
}

/// What dots and colours mean; gives where that ends.
fn keys(drawing: &mut Drawing, plan: &CopyPlan<'_>, y: u32) -> u32 {
    let base = f64::from(y) - 5.0;
    drawing.disc(DOTS + 8.0, base, DISC, Color::Data, false);
    drawing.text(DOTS + 20.0, y, TextStyle::NOTE, "blockmirror");
    drawing.disc(DOTS + 124.0, base, RING, Color::Warning, true);
    drawing.text(DOTS + 138.0, y, TextStyle::NOTE, "whole granules, as in QEMU");
    drawing.rect(BARS, base - 6.0, 12.0, 12.0, Color::Data);
    let needed = format!("needed: {}", human_size(plan.allocation));
    drawing.text(BARS + 20.0, y, TextStyle::NOTE, &needed);
    drawing.rect(BARS + 150.0, base - 6.0, 12.0, 12.0, Color::Warning);
    drawing.text(BARS + 170.0, y, TextStyle::NOTE, "added");
    y
}

/// Space and time, as far as they are known; gives where that ends.
fn space(drawing: &mut Drawing, plan: &CopyPlan<'_>, mut y: u32) -> u32 {
    for (at, line) in space_and_time(plan).iter().enumerate() {
        y += if at == 0 { 44 } else { 22 };
        drawing.text(f64::from(MARGIN), y, TextStyle::PLAIN, line);
    }
    y
}

/// A line about space and one about time, as far as they are known.
pub(crate) fn space_and_time(plan: &CopyPlan<'_>) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(SpaceRow { needed, free, guess }) = plan.space {
        let fits = match (needed <= free, guess) {
            (true, _) => "it fits".to_owned(),
            (false, None) => "it does not fit".to_owned(),
            (false, Some(why)) => format!("it may not fit ({why})"),
        };
        lines.push(format!(
            "Space: the target takes up to {}, {} are free: {fits}.",
            human_size(needed),
            human_size(free)
        ));
    }
    if let Some((rate, time)) = plan.time {
        lines.push(format!("Time: {} at {}/s.", duration(time), human_size(rate)));
    }
    lines
}

/// A time in its two largest units.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{}\u{a0}s", number(time.as_secs_f64().max(0.01))),
        10..60 => format!("{:.0}\u{a0}s", time.as_secs_f64()),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Format;

    /// A plan with three granularities.
    fn picture(format: Format) -> String {
        let row = |granularity: u64, whole_allocation| GranularityRow {
            granularity,
            memory: 100 << 10,
            write: 4096,
            whole_write: granularity,
            whole_allocation,
            chosen: granularity == 65536,
        };
        CopyPlan {
            source: "<script>\n.raw",
            target: "b&b",
            len: 1 << 30,
            copy: 200 << 20,
            zero: 24 << 20,
            skip: 800 << 20,
            allocation: 200 << 20,
            granularity: "64 KiB (the target's cluster size)",
            small_write: 4096,
            rows: &[row(4096, 200 << 20), row(65536, 200 << 20), row(1 << 20, 600 << 20)],
            space: Some(SpaceRow { needed: 1 << 30, free: 1 << 20, guess: None }),
            time: Some((100 << 20, Duration::from_secs(2))),
        }
        .picture(format)
    }

    #[test]
    fn a_small_plan_is_drawn_whole() {
        insta::assert_snapshot!(picture(Format::Svg));
    }

    #[test]
    fn a_page_has_the_figures_and_what_they_mean() {
        let page = picture(Format::Html);
        assert!(page.contains("<h1>200 MiB of 1 GiB to copy, at a granularity of 64 KiB</h1>"), "{page}");
        assert!(page.contains("the target takes up to 1 GiB, 1 MiB are free: it does not fit."), "{page}");
        assert!(page.contains("<tr class=\"chosen\"><td>64 KiB</td>"), "{page}");
        assert!(page.contains("<td>600 MiB (×3)</td>") && !page.contains("<script"), "{page}");
    }

    #[test]
    fn times_have_two_units() {
        let text = |seconds| duration(Duration::from_secs_f64(seconds)).replace('\u{a0}', " ");
        assert_eq!(text(0.0), "0.01 s");
        assert_eq!(text(1.25), "1.25 s");
        assert_eq!(text(59.4), "59 s");
        assert_eq!(text(61.0), "1 min 1 s");
        assert_eq!(text(7260.0), "2 h 1 min");
        assert_eq!(text(90_000.0), "1 d 1 h");
    }

    #[test]
    fn what_is_added_is_a_share_or_a_factor() {
        assert_eq!(with_added(100 << 20, 100 << 20), "100 MiB");
        assert_eq!(with_added(110 << 20, 100 << 20), "110 MiB (+10 %)");
        assert_eq!(with_added(350 << 20, 100 << 20), "350 MiB (×3.5)");
        assert_eq!(with_added(0, 0), "0 B");
    }
}
