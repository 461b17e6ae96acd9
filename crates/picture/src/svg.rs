//! A drawing in the making: rectangles, paths and text, in the palette of [`crate::style`].
//!
//! Coordinates are in pixels of a drawing that is [`WIDTH`] wide; a page scales it. Text is escaped here.

use std::fmt::Write as _;

use crate::style::{self, Color};
use crate::text::{escaped, number};

/// The width of every drawing.
pub(crate) const WIDTH: u32 = 900;

/// Space that is left free on both sides.
pub(crate) const MARGIN: u32 = 24;

/// The width between the margins.
pub(crate) const INNER: u32 = WIDTH - 2 * MARGIN;

/// Which end of a text its place is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// How a text looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TextStyle {
    size: u32,
    bold: bool,
    color: Color,
    anchor: Anchor,
}

impl TextStyle {
    pub(crate) const TITLE: Self = Self::new(22, true, Color::Ink);
    pub(crate) const HEADING: Self = Self::new(16, true, Color::Ink);
    pub(crate) const PLAIN: Self = Self::new(14, false, Color::Ink);
    pub(crate) const NOTE: Self = Self::new(13, false, Color::Muted);

    const fn new(size: u32, bold: bool, color: Color) -> Self {
        Self { size, bold, color, anchor: Anchor::Start }
    }

    pub(crate) const fn bold(self) -> Self {
        Self { bold: true, ..self }
    }

    pub(crate) const fn at(self, anchor: Anchor) -> Self {
        Self { anchor, ..self }
    }
}

/// A drawing in the making.
#[derive(Debug, Default)]
pub(crate) struct Drawing {
    body: String,
}

impl Drawing {
    /// A text whose base line is at `y`.
    pub(crate) fn text(&mut self, x: f64, y: u32, style: TextStyle, text: &str) {
        let anchor = match style.anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let weight = if style.bold { " font-weight=\"600\"" } else { "" };
        let (x, size, color, text) = (number(x), style.size, style.color.hex(), escaped(text));
        let _ = writeln!(
            self.body,
            "<text x=\"{x}\" y=\"{y}\" font-size=\"{size}\"{weight}{anchor} fill=\"{color}\">{text}</text>"
        );
    }

    /// A rectangle.
    pub(crate) fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, color: Color) {
        let (x, y, width, height) = (number(x), number(y), number(width), number(height));
        let color = color.hex();
        let _ = writeln!(
            self.body,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{color}\"/>"
        );
    }

    /// A filled path.
    pub(crate) fn path(&mut self, path: &str, color: Color) {
        let _ = writeln!(self.body, "<path d=\"{path}\" fill=\"{}\"/>", color.hex());
    }

    /// A straight line.
    pub(crate) fn line(&mut self, from: (f64, f64), to: (f64, f64), width: f64, color: Color) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ = writeln!(
            self.body,
            "<line x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\" stroke=\"{}\" stroke-width=\"{}\"/>",
            number(x1),
            number(y1),
            number(x2),
            number(y2),
            color.hex(),
            number(width)
        );
    }

    /// A disc, or with `hollow` its edge.
    pub(crate) fn disc(&mut self, x: f64, y: f64, radius: f64, color: Color, hollow: bool) {
        let (x, y, radius, color) = (number(x), number(y), number(radius), color.hex());
        let look = match hollow {
            true => format!("fill=\"{}\" stroke=\"{color}\" stroke-width=\"2\"", Color::Paper.hex()),
            false => format!("fill=\"{color}\""),
        };
        let _ = writeln!(self.body, "<circle cx=\"{x}\" cy=\"{y}\" r=\"{radius}\" {look}/>");
    }

    /// A bar between the margins whose parts stand side by side. A part that is there has a pixel at least.
    pub(crate) fn stacked_bar(&mut self, y: f64, height: f64, parts: &[(u64, Color)], whole: u64) {
        let mut x = f64::from(MARGIN);
        self.rect(x, y, f64::from(INNER), height, Color::Hole);
        let right = x + f64::from(INNER);
        for (bytes, color) in parts.iter().filter(|(bytes, _)| *bytes > 0) {
            let width = (*bytes as f64 / whole.max(1) as f64 * f64::from(INNER)).max(1.0).min(right - x);
            self.rect(x, y, width, height, *color);
            x += width;
        }
    }

    /// A square of `color` with the words `name` and `value` beside it.
    pub(crate) fn legend(&mut self, x: f64, y: u32, color: Color, name: &str, value: &str) {
        self.rect(x, f64::from(y) - 12.0, 14.0, 14.0, color);
        self.text(x + 22.0, y, TextStyle::PLAIN.bold(), name);
        self.text(x + 22.0, y + 19, TextStyle::NOTE, value);
    }

    /// The drawing, `height` high; `name` is what it is to a reader who does not see it. With its own style
    /// sheet and a background unless it goes into a page, which has them.
    pub(crate) fn finish(self, height: u32, name: &str, in_page: bool) -> String {
        let name = escaped(name);
        // A page has its own margins.
        let (left, width) = if in_page { (MARGIN, INNER) } else { (0, WIDTH) };
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"{left} 0 {width} {height}\" \
             width=\"{width}\" height=\"{height}\" role=\"img\" aria-label=\"{name}\">\n"
        );
        if !in_page {
            let _ = writeln!(out, "<title>{name}</title>\n<style>{}</style>", style::of_drawing());
            let paper = Color::Paper.hex();
            let _ = writeln!(out, "<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"{paper}\"/>");
        }
        out + &self.body + "</svg>\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_is_there_is_seen_and_none_leaves_the_bar() {
        let mut drawing = Drawing::default();
        drawing.stacked_bar(
            0.0,
            10.0,
            &[(1, Color::Data), (0, Color::Zero), (u64::MAX, Color::Hole)],
            u64::MAX,
        );
        let svg = drawing.finish(10, "a & b", true);
        assert!(svg.contains("<rect x=\"24\" y=\"0\" width=\"1\" height=\"10\" fill=\"#0072B2\"/>"), "{svg}");
        assert!(svg.contains("<rect x=\"25\" y=\"0\" width=\"851\""), "{svg}");
        assert!(svg.contains("aria-label=\"a &amp; b\"") && !svg.contains("<style>"), "{svg}");
    }
}
