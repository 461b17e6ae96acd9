//! Brackets on the command line.
//!
//! The rule is nbdcopy's: `[` and `]` are words of their own, and the first `]` ends the command that the `[`
//! before it began; a `[` in between is a word like any other. An operand of `dd` ends with the bracket:
//! `if=[`.

use std::ffi::{OsStr, OsString};

use thiserror::Error;

/// What a command line consists of.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Word {
    Plain(OsString),
    /// A server: what stands before its bracket in the same word, and the program with its arguments.
    Server {
        before: OsString,
        command: Vec<OsString>,
    },
}

/// Why brackets make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum BracketError {
    #[error("\"[\" without \"]\": an NBD server is written [ PROGRAM ARGUMENT... ]; a file named [ is ./[")]
    NotClosed,
    #[error("\"]\" without \"[\": the first ] ends the command of an NBD server; a file named ] is ./]")]
    NotOpened,
    #[error("[ ]: the program is missing: an NBD server is written [ PROGRAM ARGUMENT... ]")]
    NoProgram,
}

/// The words of a command line, which begin with the name of the program.
pub(super) fn parse(words: &[OsString]) -> Result<Vec<Word>, BracketError> {
    let mut out = Vec::with_capacity(words.len());
    let mut rest = words.iter();
    out.extend(rest.next().cloned().map(Word::Plain));
    while let Some(word) = rest.next() {
        if word == "]" {
            return Err(BracketError::NotOpened);
        }
        let Some(before) = before_bracket(word) else {
            out.push(Word::Plain(word.clone()));
            continue;
        };
        let after = rest.as_slice();
        let end = after.iter().position(|word| word == "]").ok_or(BracketError::NotClosed)?;
        let command = after[..end].to_vec();
        if command.first().is_none_or(|program| program.is_empty()) {
            return Err(BracketError::NoProgram);
        }
        out.push(Word::Server { before: before.into(), command });
        rest = after[end + 1..].iter();
    }
    Ok(out)
}

/// What stands before the bracket that `word` opens.
fn before_bracket(word: &OsStr) -> Option<&'static str> {
    [("[", ""), ("if=[", "if="), ("of=[", "of=")]
        .into_iter()
        .find_map(|(whole, before)| (word == whole).then_some(before))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Vec<String>, BracketError> {
        let words: Vec<_> = line.split(' ').map(OsString::from).collect();
        let show = |word| match word {
            Word::Plain(word) => word.into_string().unwrap(),
            Word::Server { before, command } => format!("{}{command:?}", before.display()),
        };
        Ok(parse(&words)?.into_iter().map(show).collect())
    }

    #[test]
    fn the_first_closing_bracket_ends_a_command() {
        assert_eq!(
            parsed("[ convert a [b] c]"),
            Ok(["[", "convert", "a", "[b]", "c]"].map(str::to_owned).to_vec())
        );
        let found = parsed("blockmirror convert -- [ nbdkit -r [ x ] -n [ qemu-nbd y ]").unwrap();
        let want =
            ["blockmirror", "convert", "--", r#"["nbdkit", "-r", "[", "x"]"#, "-n", r#"["qemu-nbd", "y"]"#];
        assert_eq!(found, want);
        assert_eq!(parsed("b dd if=[ a ] of=out").unwrap(), ["b", "dd", r#"if=["a"]"#, "of=out"]);
    }

    #[test]
    fn brackets_without_a_meaning_are_refused() {
        for (line, why) in [
            ("b info [", BracketError::NotClosed),
            ("b info [ nbdkit", BracketError::NotClosed),
            ("b info [ ]", BracketError::NoProgram),
            ("b info [  ]", BracketError::NoProgram),
            ("b info ]", BracketError::NotOpened),
            ("b info [ a [ b ] ]", BracketError::NotOpened),
        ] {
            assert_eq!(parsed(line), Err(why), "{line}");
        }
    }
}
