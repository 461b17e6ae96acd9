//! A page of the book: the commands in it, and what is printed below each.
//!
//! CONTRIBUTING.md ("The book") has the format.

use std::ops::Range;

/// What a page says.
pub(crate) struct Page {
    lines: Vec<String>,
    /// Programs that have to be installed.
    pub(crate) needs: Vec<String>,
    /// Whether it confines a command (`--limits=untrusted`), which takes a kernel with Landlock.
    pub(crate) needs_sandbox: bool,
    pub(crate) steps: Vec<Step>,
}

/// A command of the page.
pub(crate) struct Step {
    pub(crate) command: String,
    /// The number of its line, from 1 on.
    pub(crate) line: usize,
    /// Not shown: it succeeds, and what it prints does not matter.
    pub(crate) is_setup: bool,
    pub(crate) wanted: Printed,
    /// The lines of the page that have `wanted`.
    place: Range<usize>,
}

/// What a command has printed, or is to print.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Printed {
    pub(crate) lines: Vec<String>,
    pub(crate) exit_code: i32,
}

const EXIT: &str = "# exit ";

impl Page {
    /// # Panics
    /// If a console block begins with something else than a command, or is not closed.
    pub(crate) fn parse(text: &str) -> Self {
        let lines: Vec<_> = text.lines().map(str::to_owned).collect();
        let mut page = Self { lines: Vec::new(), needs: Vec::new(), needs_sandbox: false, steps: Vec::new() };
        let mut at = 0;
        while at < lines.len() {
            let comment = |key: &str| lines[at].strip_prefix(key).and_then(|rest| rest.strip_suffix(" -->"));
            if lines[at] == "<!-- needs a sandbox -->" {
                page.needs_sandbox = true;
            } else if let Some(needs) = comment("<!-- needs: ") {
                page.needs.extend(needs.split_whitespace().map(str::to_owned));
            } else if let Some(command) = comment("<!-- setup: ") {
                page.steps.push(Step {
                    command: command.to_owned(),
                    line: at + 1,
                    is_setup: true,
                    wanted: Printed { lines: vec!["...".to_owned()], exit_code: 0 },
                    place: at..at,
                });
            } else if lines[at].starts_with("```") {
                let rest = &lines[at + 1..];
                let length = rest.iter().position(|line| line == "```");
                let length = length.unwrap_or_else(|| panic!("line {}: the block has no end", at + 1));
                if lines[at] == "```console" {
                    page.block(&rest[..length], at + 1);
                }
                at += length + 1;
            }
            at += 1;
        }
        page.lines = lines;
        page
    }

    /// The commands of one block, whose first line is line `first` of the page, from 0 on.
    fn block(&mut self, block: &[String], first: usize) {
        let mut at = 0;
        while at < block.len() {
            let line = first + at + 1;
            let Some(typed) = block[at].strip_prefix("$ ") else {
                panic!("line {line}: a console block begins with `$ `");
            };
            let mut command = typed.to_owned();
            at += 1;
            while command.ends_with('\\') {
                command += "\n";
                command += &block[at];
                at += 1;
            }
            let printed = block[at..].iter().take_while(|line| !line.starts_with("$ ")).count();
            let mut lines = block[at..at + printed].to_vec();
            let place = first + at..first + at + printed;
            at += printed;
            let exit_code = lines.last().and_then(|last| last.strip_prefix(EXIT)?.parse().ok());
            if exit_code.is_some() {
                lines.pop();
            }
            let wanted = Printed { lines, exit_code: exit_code.unwrap_or(0) };
            self.steps.push(Step { command, line, is_setup: false, wanted, place });
        }
    }

    /// The page with `printed` below the commands; below those without a value what is there now.
    pub(crate) fn with(&self, printed: &[Option<Printed>]) -> String {
        let mut lines = self.lines.clone();
        for (step, printed) in self.steps.iter().zip(printed).rev() {
            let Some(printed) = printed.as_ref().filter(|_| !step.is_setup) else { continue };
            let mut new = printed.lines.clone();
            if printed.exit_code != 0 {
                new.push(format!("{EXIT}{}", printed.exit_code));
            }
            lines.splice(step.place.clone(), new);
        }
        lines.join("\n") + "\n"
    }
}

impl Printed {
    /// Whether `real` is what the page says, with its places for anything.
    pub(crate) fn fits(&self, real: &Self) -> bool {
        self.exit_code == real.exit_code && lines_fit(&self.lines, &real.lines)
    }
}

fn lines_fit(wanted: &[String], real: &[String]) -> bool {
    match wanted {
        [] => real.is_empty(),
        [any, rest @ ..] if any == "..." => (0..=real.len()).any(|skip| lines_fit(rest, &real[skip..])),
        [line, rest @ ..] => {
            real.first().is_some_and(|first| line_fits(line, first)) && lines_fit(rest, &real[1..])
        }
    }
}

/// What differs from run to run and from machine to machine: how long a copy took, and the space that the
/// host gives a file.
fn steady(line: &str) -> &str {
    if let Some(at) = line.rfind(" in ").filter(|_| line.ends_with(" s")) {
        return &line[..at];
    }
    line.find("disk size: ").map_or(line, |at| &line[..at + "disk size:".len()])
}

fn line_fits(wanted: &str, real: &str) -> bool {
    let (wanted, real) = (steady(wanted), steady(real));
    let mut parts = wanted.split("[..]");
    let first = parts.next().unwrap_or_default();
    let Some(mut left) = real.strip_prefix(first) else { return false };
    let mut last = None;
    for part in parts {
        if let Some(earlier) = last.replace(part) {
            let Some((_, after)) = left.split_once(earlier) else { return false };
            left = after;
        }
    }
    last.map_or(left.is_empty(), |last| left.ends_with(last))
}

#[test]
fn a_page_is_read_and_written_anew() {
    let text = "# A\n<!-- needs: jq  socat -->\n<!-- setup: true -->\n```sh\n$ not run\n```\n\
                ```console\n$ a \\\n  b\none\n# exit 3\n$ c\n```\nend\n";
    let page = Page::parse(text);
    assert_eq!(page.needs, ["jq", "socat"]);
    let steps: Vec<_> = page.steps.iter().map(|step| (step.command.as_str(), step.line)).collect();
    assert_eq!(steps, [("true", 3), ("a \\\n  b", 8), ("c", 12)]);
    let printed = |line: &str, exit_code| Printed { lines: vec![line.into()], exit_code };
    assert_eq!(page.steps[1].wanted, printed("one", 3));
    assert_eq!(page.with(&[None, None, None]), text);
    let new = page.with(&[None, Some(printed("two", 0)), Some(printed("three", 1))]);
    assert!(new.ends_with("  b\ntwo\n$ c\nthree\n# exit 1\n```\nend\n"), "{new}");
}

#[test]
fn places_for_anything() {
    let fits = |wanted: &str, real: &str| {
        let printed = |text: &str| Printed { lines: text.lines().map(str::to_owned).collect(), exit_code: 0 };
        printed(wanted).fits(&printed(real))
    };
    assert!(fits("a\nb", "a\nb"));
    assert!(!fits("a", "a\nb") && !fits("a\nb", "a"));
    assert!(fits("a\n...\nd", "a\nb\nc\nd") && fits("a\n...\nd", "a\nd") && !fits("a\n...", "b\na"));
    assert!(fits("in [..] s", "in 0.15 s") && fits("a[..]", "a") && fits("a[..]b[..]c", "a1b2bc"));
    assert!(fits("done, in 0.1 s", "done, in 2.7 s") && fits(" disk size: 3 MiB", " disk size: 4 MiB"));
    assert!(!fits("in [..] s", "in 0.15 ms") && !fits("a[..]a", "a") && !fits("a[..]b[..]c", "acb"));
}
