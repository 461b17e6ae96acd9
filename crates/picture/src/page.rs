//! A page around drawings: a heading that states the result, tables, how to read it.
//!
//! No script, and nothing that a browser would have to fetch.

use std::fmt::Write as _;

use crate::style;
use crate::text::escaped;

/// What a heading says of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Plain,
    Good,
    Bad,
}

/// A page in the making.
#[derive(Debug)]
pub(crate) struct Page {
    out: String,
}

impl Page {
    /// A page whose `heading` is a sentence.
    pub(crate) fn new(heading: &str, mood: Mood) -> Self {
        let class = match mood {
            Mood::Plain => "",
            Mood::Good => " class=\"good\"",
            Mood::Bad => " class=\"bad\"",
        };
        let (heading, style) = (escaped(heading), style::of_page());
        let out = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
             <title>{heading}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1{class}>{heading}</h1>\n"
        );
        Self { out }
    }

    /// A paragraph below the heading.
    pub(crate) fn subtitle(&mut self, text: &str) {
        let _ = writeln!(self.out, "<p class=\"sub\">{}</p>", escaped(text));
    }

    pub(crate) fn heading(&mut self, text: &str) {
        let _ = writeln!(self.out, "<h2>{}</h2>", escaped(text));
    }

    pub(crate) fn paragraph(&mut self, text: &str) {
        let _ = writeln!(self.out, "<p>{}</p>", escaped(text));
    }

    /// A drawing, which is markup, and what to know of it.
    pub(crate) fn figure(&mut self, svg: &str, caption: &str) {
        let _ = writeln!(self.out, "<figure><div class=\"wide\">{svg}</div>");
        if !caption.is_empty() {
            let _ = writeln!(self.out, "<figcaption>{}</figcaption>", escaped(caption));
        }
        self.out.push_str("</figure>\n");
    }

    /// A table of figures; the row `chosen` stands out.
    pub(crate) fn table(&mut self, head: &[&str], rows: &[Vec<String>], chosen: Option<usize>) {
        self.table_of("", head, rows, chosen);
    }

    /// A table whose last column is text.
    pub(crate) fn text_table(&mut self, head: &[&str], rows: &[Vec<String>]) {
        self.table_of(" class=\"text\"", head, rows, None);
    }

    fn table_of(&mut self, class: &str, head: &[&str], rows: &[Vec<String>], chosen: Option<usize>) {
        let _ = write!(self.out, "<div class=\"wide\"><table{class}>\n<tr>");
        for name in head {
            let _ = write!(self.out, "<th scope=\"col\">{}</th>", escaped(name));
        }
        self.out.push_str("</tr>\n");
        for (at, row) in rows.iter().enumerate() {
            self.out.push_str(if Some(at) == chosen { "<tr class=\"chosen\">" } else { "<tr>" });
            for cell in row {
                let _ = write!(self.out, "<td>{}</td>", escaped(cell));
            }
            self.out.push_str("</tr>\n");
        }
        self.out.push_str("</table></div>\n");
    }

    /// The page.
    pub(crate) fn finish(self) -> String {
        self.out + "</body>\n</html>\n"
    }
}
