//! Colours and fonts, for the light and the dark page.
//!
//! A drawing has the light colours in its attributes. The style sheet puts the dark ones in their place, by
//! attribute, so that what `plotters` has drawn follows as well, and a viewer without style sheets shows the
//! light page. Hues are those of Okabe and Ito, which readers with any colour vision tell apart; what stands
//! side by side differs in lightness, too.

use std::fmt::Write as _;

use plotters::style::RGBColor;

/// A colour by what it is for; the values are those of [`PALETTE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Color {
    Paper,
    Ink,
    Muted,
    Grid,
    Hole,
    Zero,
    Data,
    Backing,
    Compressed,
    Preallocated,
    Warning,
    Highlight,
}

/// Each colour on the light page, and on the dark one.
const PALETTE: [(Color, u32, u32); 12] = [
    (Color::Paper, 0xffffff, 0x14181d),
    (Color::Ink, 0x1b2733, 0xe6ebf0),
    (Color::Muted, 0x5b6875, 0xa3b0bd),
    (Color::Grid, 0xdce2e8, 0x2e3843),
    (Color::Hole, 0xe5e9ee, 0x242d36),
    (Color::Zero, 0xb4c1cd, 0x556473),
    (Color::Data, 0x0072b2, 0x4da8e0),
    (Color::Backing, 0x009e73, 0x2fc79a),
    (Color::Compressed, 0xe69f00, 0xf0b429),
    (Color::Preallocated, 0x8cc4ea, 0x2f6e99),
    (Color::Warning, 0xd55e00, 0xff8a3d),
    (Color::Highlight, 0xfff1cc, 0x3d3316),
];

impl Color {
    fn values(self) -> (u32, u32) {
        let found = PALETTE.iter().find(|(color, ..)| *color == self);
        found.map_or((0, 0xffffff), |(_, light, dark)| (*light, *dark))
    }

    /// As `plotters` writes it, too.
    pub(crate) fn hex(self) -> String {
        hex(self.values().0)
    }

    /// For `plotters`.
    pub(crate) fn rgb(self) -> RGBColor {
        let [_, red, green, blue] = self.values().0.to_be_bytes();
        RGBColor(red, green, blue)
    }
}

fn hex(value: u32) -> String {
    format!("#{value:06X}")
}

/// Fonts that are there on every system, for all text.
const FONTS: &str = "system-ui,-apple-system,\"Segoe UI\",\"Noto Sans\",\"DejaVu Sans\",sans-serif";

/// The style sheet of a drawing.
pub(crate) fn of_drawing() -> String {
    let mut css = format!("text{{font-family:{FONTS};font-variant-numeric:tabular-nums}}");
    css.push_str("@media(prefers-color-scheme:dark){");
    for (_, light, dark) in PALETTE {
        let (light, dark) = (hex(light), hex(dark));
        let _ = write!(css, "[fill=\"{light}\"]{{fill:{dark}}}[stroke=\"{light}\"]{{stroke:{dark}}}");
    }
    css.push('}');
    css
}

/// The style sheet of a page, drawings included.
pub(crate) fn of_page() -> String {
    let mut css = String::from(":root{color-scheme:light dark");
    let variables = [("paper", Color::Paper), ("ink", Color::Ink), ("muted", Color::Muted)];
    let variables = variables.into_iter().chain([("grid", Color::Grid), ("highlight", Color::Highlight)]);
    let mut dark_css = String::new();
    for (name, color) in variables.chain([("warning", Color::Warning), ("good", Color::Backing)]) {
        let (light, dark) = color.values();
        let _ = write!(css, ";--{name}:{}", hex(light));
        let _ = write!(dark_css, "--{name}:{};", hex(dark));
    }
    let _ = write!(css, "}}@media(prefers-color-scheme:dark){{:root{{{dark_css}}}}}");
    let _ = write!(css, "body{{margin:0 auto;padding:24px 20px 48px;max-width:900px;font:16px/1.5 {FONTS};");
    css.push_str(
        "color:var(--ink);background:var(--paper)}\
         h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere;text-wrap:balance}\
         h2{font-size:18px;margin:36px 0 8px}\
         p{margin:6px 0;max-width:68ch;overflow-wrap:anywhere}\
         .sub,figcaption{color:var(--muted)}\
         .bad{border-left:4px solid var(--warning);padding-left:12px}\
         .good{border-left:4px solid var(--good);padding-left:12px}\
         figure{margin:16px 0 0}figcaption{font-size:14px;margin-top:6px}\
         .wide{overflow-x:auto}.wide svg{display:block;width:100%;min-width:640px;height:auto}\
         table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
         th,td{padding:5px 20px 5px 0;text-align:right;vertical-align:top;border-bottom:1px solid var(--grid)}\
         th{font-weight:600;color:var(--muted);font-size:14px}\
         th:first-child,td:first-child,.text td:last-child,.text th:last-child{text-align:left}\
         tr.chosen td{background:var(--highlight);font-weight:600}\
         td{overflow-wrap:anywhere}",
    );
    css + &of_drawing()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_colour_is_one_of_its_kind() {
        for (at, (color, light, dark)) in PALETTE.iter().enumerate() {
            assert_eq!(color.values(), (*light, *dark));
            assert!(PALETTE[..at].iter().all(|(_, other, _)| other != light), "{color:?}");
        }
        assert_eq!(Color::Data.hex(), "#0072B2");
        assert_eq!(Color::Data.rgb(), RGBColor(0, 0x72, 0xb2));
    }
}
