//! The README of a published package, made from the front page of its `lib.rs`: one text for docs.rs and for
//! the registry.
//!
//! `cargo xtask docs` writes them, `cargo xtask tidy` compares.

/// The README of the package `name` whose `lib.rs` is `source`.
pub(crate) fn of_front_page(name: &str, source: &str) -> String {
    let mut readme = format!("# {name}\n\n");
    // The language of the code block that a line is in.
    let mut block: Option<String> = None;
    for line in source.lines().map_while(|line| line.strip_prefix("//!")) {
        let line = line.strip_prefix(' ').unwrap_or(line);
        match (line.strip_prefix("```"), &block) {
            (Some(_), Some(_)) => {
                block = None;
                readme.push_str("```");
            }
            (Some(tag), None) => {
                // Without a tag it is Rust, as for rustdoc.
                let tag = match tag {
                    "" => "rust".to_owned(),
                    "no_run" => "rust,no_run".to_owned(),
                    other => other.to_owned(),
                };
                readme.push_str("```");
                readme.push_str(&tag);
                block = Some(tag);
            }
            // What rustdoc hides.
            (None, Some(tag)) if tag.starts_with("rust") && (line == "#" || line.starts_with("# ")) => {
                continue;
            }
            (None, Some(_)) => readme.push_str(line),
            (None, None) => {
                if line.starts_with('#') {
                    readme.push('#');
                }
                readme.push_str(&without_item_links(line));
            }
        }
        readme.push('\n');
    }
    readme.push_str("\n## Licence\n\nMIT or Apache-2.0, at your choice.\n");
    readme
}

/// `line` with the text of links to items in place of the links: only rustdoc can follow those.
fn without_item_links(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((before, link)) = rest.split_once('[') {
        out.push_str(before);
        let Some((text, after)) = link.split_once(']') else {
            out.push('[');
            rest = link;
            continue;
        };
        let target = after.strip_prefix('(').and_then(|after| after.split_once(')'));
        match target {
            Some((target, after)) if !target.contains("://") => {
                out.push_str(text);
                rest = after;
            }
            None if text.starts_with('`') || text.contains("()") => {
                out.push_str(text);
                rest = after;
            }
            _ => {
                out.push('[');
                rest = link;
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_lines_and_links_to_items_are_left_out() {
        let source = "\
            //! A [`Tap`] in [the module](super).\n//!\n//! # More\n//! [x](https://x.org) [map()] a[1]\n\
            //! ```\n//! # hidden\n//! use a::B;\n//! #\n//! ```\n\
            //! ```text\n//! # [`shown`]\n//! ```\n\nmod a;\n//! no\n";
        assert_eq!(
            of_front_page("p", source),
            "# p\n\nA `Tap` in the module.\n\n## More\n[x](https://x.org) map() a[1]\n```rust\nuse a::B;\n```\n\
             ```text\n# [`shown`]\n```\n\n## Licence\n\nMIT or Apache-2.0, at your choice.\n"
        );
    }
}
