//! The map of a disk: cells that fill from below with what they hold, totals, and the pieces of the data.

use std::fmt::Write as _;

use blockmirror_block::size::human_size;

use crate::Format;
use crate::allocation::{Allocation, Content, LAYERS, Mix, PIECE_LIMITS, Pieces};
use crate::page::{Mood, Page};
use crate::style::Color;
use crate::svg::{Anchor, Drawing, INNER, MARGIN, TextStyle};
use crate::text::{counted, number, percent, shortened, size_and_share};

/// Cells in a row.
const COLUMNS: usize = 64;

/// From one cell to the next, in pixels, and what of it is drawn.
const PITCH: f64 = 12.0;
const SIDE: f64 = 11.0;

/// What is there at all is drawn so high at least: all kinds together still fit a cell.
const TRACE: f64 = 1.8;

/// Where the cells begin; offsets stand left of it.
const LEFT: f64 = MARGIN as f64 + 84.0;

/// A row of the cells has its offset beside it every so many rows.
const LABEL_EVERY: usize = 4;

impl Allocation {
    /// The picture; `name` is the image's.
    pub fn picture(&self, name: &str, format: Format) -> String {
        match format {
            Format::Svg => drawing(self, Some(name)),
            Format::Html => page(self, name),
        }
    }
}

/// What the picture says, in a sentence.
fn sentence(allocation: &Allocation) -> String {
    let (data, len) = (allocation.data(), allocation.len());
    if data == 0 {
        return format!("The disk of {} holds no data", human_size(len));
    }
    let pieces = match allocation.piece_count() {
        0 => "all of it compressed".to_owned(),
        count => format!("in {}", counted(count, "piece")),
    };
    let verb = if human_size(data).starts_with("1 ") { "holds" } else { "hold" };
    format!("{} of {} {verb} data, {pieces}", human_size(data), human_size(len))
}

/// The drawing; with a title, which a page has already, if `name` is given.
fn drawing(allocation: &Allocation, name: Option<&str>) -> String {
    let mut drawing = Drawing::default();
    let (sentence, left) = (sentence(allocation), f64::from(MARGIN));
    let mut y = 0;
    if let Some(name) = name {
        drawing.text(left, 42, TextStyle::TITLE, &sentence);
        drawing.text(left, 66, TextStyle::PLAIN, &shortened(name, 100));
        y = 70;
    }
    let row = human_size(allocation.cell().saturating_mul(COLUMNS as u64));
    let how = format!(
        "Each cell is {} of the disk, a full row {row}. It fills from below with what is there.",
        human_size(allocation.cell())
    );
    drawing.text(left, y + 20, TextStyle::NOTE, &how);
    y = cells(&mut drawing, allocation, y + 34);
    y = totals(&mut drawing, allocation, y + 40);
    y = pieces(&mut drawing, allocation, y + 26);
    drawing.finish(y + 12, &sentence, name.is_none())
}

/// The cells from `top` on; gives where they end.
fn cells(drawing: &mut Drawing, allocation: &Allocation, top: u32) -> u32 {
    let mut paths: [String; Content::ALL.len()] = Default::default();
    for (at, mix) in allocation.cells().iter().enumerate() {
        let (row, column) = (at / COLUMNS, at % COLUMNS);
        let (x, y) = (LEFT + column as f64 * PITCH, f64::from(top) + row as f64 * PITCH);
        if column == 0 && row % LABEL_EVERY == 0 {
            let offset = allocation.start() + (at as u64) * allocation.cell();
            let style = TextStyle::NOTE.at(Anchor::End);
            drawing.text(LEFT - 10.0, y as u32 + 10, style, &human_size(offset));
        }
        let mut bottom = y + SIDE;
        for (content, height) in heights(mix) {
            let _ = write!(
                paths[content as usize],
                "M{} {}h{}v{}h-{}z",
                number(x),
                number(bottom - height),
                number(SIDE),
                number(height),
                number(SIDE)
            );
            bottom -= height;
        }
    }
    for (content, path) in Content::ALL.into_iter().zip(&paths).filter(|(_, path)| !path.is_empty()) {
        drawing.path(path, content.color());
    }
    top + (allocation.cells().len().div_ceil(COLUMNS) as f64 * PITCH) as u32
}

/// How high each content of a cell is drawn, from below. Together they fill the cell; what is there at all
/// has [`TRACE`], which the others give.
fn heights(mix: &Mix) -> Vec<(Content, f64)> {
    let whole: u64 = mix.iter().sum();
    if whole == 0 {
        return vec![(Content::Hole, SIDE)];
    }
    let there = Content::ALL.into_iter().filter(|content| mix[*content as usize] > 0);
    let raw: Vec<_> = there
        .map(|content| (content, (mix[content as usize] as f64 / whole as f64 * SIDE).max(TRACE)))
        .collect();
    let over = raw.iter().map(|(_, height)| height).sum::<f64>() - SIDE;
    let spare: f64 = raw.iter().map(|(_, height)| height - TRACE).sum();
    // The kinds together fill the cell or more, so what is above a trace can give what is over.
    let given = |height: f64| if over > 0.0 { (height - TRACE) / spare * over } else { 0.0 };
    raw.iter().map(|(content, height)| (*content, height - given(*height))).collect()
}

/// A bar of all bytes and its legend; gives where they end.
fn totals(drawing: &mut Drawing, allocation: &Allocation, y: u32) -> u32 {
    drawing.text(f64::from(MARGIN), y, TextStyle::HEADING, "In total");
    let there: Vec<_> = Content::ALL
        .into_iter()
        .map(|content| (content, allocation.total(content)))
        .filter(|(_, bytes)| *bytes > 0)
        .collect();
    let parts: Vec<_> = there.iter().map(|(content, bytes)| (*bytes, content.color())).collect();
    drawing.stacked_bar(f64::from(y) + 12.0, 18.0, &parts, allocation.len());
    let mut bottom = y + 30;
    for (at, (content, bytes)) in there.iter().enumerate() {
        let x = f64::from(MARGIN) + (at % 3) as f64 * (f64::from(INNER) / 3.0);
        bottom = y + 60 + (at / 3) as u32 * 48;
        let value = size_and_share(*bytes, allocation.len());
        drawing.legend(x, bottom, content.color(), content.name(), &value);
        bottom += 20;
    }
    bottom
}

/// The pieces of the data by length; gives where they end.
fn pieces(drawing: &mut Drawing, allocation: &Allocation, mut y: u32) -> u32 {
    let all: u64 = allocation.pieces().iter().map(|pieces| pieces.bytes).sum();
    if all == 0 {
        return y;
    }
    y += 16;
    drawing.text(f64::from(MARGIN), y, TextStyle::HEADING, "How the data lies in its file");
    y += 21;
    let average = human_size(all / allocation.piece_count().max(1));
    let note = format!("{}, {average} on average", counted(allocation.piece_count(), "piece"));
    drawing.text(f64::from(MARGIN), y, TextStyle::NOTE, &note);
    y += 12;
    let (from, most) = (f64::from(MARGIN) + 170.0, 430.0);
    for (order, Pieces { count, bytes }) in allocation.pieces().iter().enumerate() {
        y += 24;
        let style = TextStyle::PLAIN.at(Anchor::End);
        drawing.text(from - 12.0, y, style, &order_name(order));
        drawing.rect(from, f64::from(y) - 13.0, most, 16.0, Color::Hole);
        if *bytes > 0 {
            let width = (*bytes as f64 / all as f64 * most).max(2.0);
            drawing.rect(from, f64::from(y) - 13.0, width, 16.0, Color::Data);
        }
        let value = format!("{} · {}", size_and_share(*bytes, all), counted(*count, "piece"));
        drawing.text(from + most + 12.0, y, TextStyle::NOTE, if *count == 0 { "none" } else { &value });
    }
    y + 4
}

fn order_name(order: usize) -> String {
    match (order.checked_sub(1).and_then(|below| PIECE_LIMITS.get(below)), PIECE_LIMITS.get(order)) {
        (None, Some(below)) => format!("below {}", human_size(*below)),
        (Some(from), Some(below)) => format!("{} to {}", human_size(*from), human_size(*below)),
        (Some(from), None) => format!("{} and more", human_size(*from)),
        (None, None) => String::new(),
    }
}

/// The page.
fn page(allocation: &Allocation, name: &str) -> String {
    let mut page = Page::new(&sentence(allocation), Mood::Plain);
    page.subtitle(name);
    page.figure(&drawing(allocation, None), "");
    page.heading("Figures");
    let rows: Vec<_> = Content::ALL
        .into_iter()
        .map(|content| {
            let bytes = allocation.total(content);
            let share = percent(bytes, allocation.len());
            vec![content.name().to_owned(), human_size(bytes), share, bytes.to_string()]
        })
        .collect();
    page.table(&["", "size", "of the disk", "bytes"], &rows, None);
    if allocation.layers()[1..].iter().any(|bytes| *bytes > 0) {
        page.heading("Where the data comes from");
        let rows: Vec<_> = allocation
            .layers()
            .iter()
            .enumerate()
            .filter(|(_, bytes)| **bytes > 0)
            .map(|(depth, bytes)| {
                vec![layer_name(depth), human_size(*bytes), percent(*bytes, allocation.data())]
            })
            .collect();
        page.table(&["layer", "data", "of all data"], &rows, None);
    }
    page.heading("How to read it");
    for text in [
        "The map runs from left to right and from top to bottom, as offsets grow. A cell that holds several \
         things shows each by its share; what is there at all is drawn, however little it is.",
        "A piece is data that lies in one go, in the disk and in the file that stores it. Few long pieces are \
         read fast; many short ones mean that the file is fragmented, or that the disk is written in many \
         places. Compressed data is not counted in pieces.",
    ] {
        page.paragraph(text);
    }
    page.finish()
}

fn layer_name(depth: usize) -> String {
    match depth {
        0 => "the image itself".to_owned(),
        1 => "its backing file".to_owned(),
        LAYERS => format!("{LAYERS} or more layers below"),
        depth => format!("{depth} layers below"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_full_and_shows_what_is_there() {
        for mix in [[1, 1, 1, 1, 1, 1 << 60], [1, 0, 0, 0, 0, 7], [0, 0, 0, 0, 0, 5], [1, 1, 1, 1, 1, 1]] {
            let drawn = heights(&mix);
            let sum: f64 = drawn.iter().map(|(_, height)| height).sum();
            assert!((sum - SIDE).abs() < 1e-9, "{mix:?}: {drawn:?}");
            assert!(drawn.iter().all(|(_, height)| *height > 1.79), "{mix:?}: {drawn:?}");
            assert_eq!(drawn.len(), mix.iter().filter(|bytes| **bytes > 0).count());
        }
    }

    fn small() -> Allocation {
        let mut allocation = Allocation::new(0..96 << 10);
        allocation.push(0..8 << 10, Content::Data, 0);
        allocation.push(8 << 10..12 << 10, Content::Compressed, 0);
        allocation.push(12 << 10..20 << 10, Content::Backing, 1);
        allocation.push(20 << 10..24 << 10, Content::Preallocated, 0);
        allocation.push(24 << 10..40 << 10, Content::Zero, 0);
        allocation.push(40 << 10..96 << 10, Content::Hole, 0);
        allocation
    }

    #[test]
    fn a_small_disk_is_drawn_whole() {
        insta::assert_snapshot!(small().picture("a<b>&\"\n\u{fffd}.raw", Format::Svg));
    }

    #[test]
    fn a_page_has_figures_and_nothing_foreign() {
        let page = small().picture("<script>alert(1)</script>", Format::Html);
        assert!(page.contains("<p class=\"sub\">&lt;script&gt;alert(1)&lt;/script&gt;</p>"), "{page}");
        for foreign in ["<script", "href", "src=", "url(", "@import", "http://"] {
            let rest = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
            assert!(!rest.contains(foreign), "{foreign}");
        }
        assert!(page.contains("<td>its backing file</td><td>8 KiB</td><td>40 %</td>"), "{page}");
    }

    #[test]
    fn sentences_say_what_is_there() {
        assert_eq!(sentence(&Allocation::new(0..0)), "The disk of 0 B holds no data");
        let mut allocation = Allocation::new(0..8 << 40);
        allocation.push(0..1 << 40, Content::Compressed, 0);
        assert_eq!(sentence(&allocation), "1 TiB of 8 TiB holds data, all of it compressed");
        assert_eq!(sentence(&small()), "20 KiB of 96 KiB hold data, in 2 pieces");
    }
}
