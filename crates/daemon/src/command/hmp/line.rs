//! The grammar of a monitor's line: what follows the verb, by the verb's parameters. Called for each line;
//! pure.
//!
//! It is QEMU's, with its texts and its oddities: flags come in the order in which the verb has them, a
//! string may be quoted, a size without a suffix counts mebibytes.

use serde_json::{Map, Value};

use super::size;

/// What a size without a suffix counts.
const MEBIBYTE: u64 = 1 << 20;

/// What a parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ParamKind {
    /// `-x`, true or absent.
    Flag(char),
    /// A node, or a job.
    Device,
    Text,
    /// Bytes.
    Size,
}

/// A parameter of a verb.
#[derive(Clone, Copy, Debug)]
pub(super) struct Param {
    pub(super) name: &'static str,
    pub(super) kind: ParamKind,
    pub(super) optional: bool,
}

/// The arguments in `line` for the verb `verb` with the parameters `params`.
///
/// # Errors
/// What to tell the user.
pub(super) fn arguments(verb: &str, params: &[Param], line: &str) -> Result<Map<String, Value>, String> {
    let mut rest = line;
    let mut arguments = Map::new();
    for param in params {
        rest = rest.trim_start();
        if rest.is_empty() && param.optional {
            continue;
        }
        let value = match param.kind {
            ParamKind::Flag(letter) => {
                let Some(flag) = rest.strip_prefix('-') else { continue };
                if !flag.starts_with(letter) {
                    let given = flag.chars().next().unwrap_or(' ');
                    let known = |param: &Param| param.kind == ParamKind::Flag(given);
                    if params.iter().any(known) {
                        continue;
                    }
                    return Err(format!("{verb}: unsupported option -{given}\n"));
                }
                rest = &flag[letter.len_utf8()..];
                Value::Bool(true)
            }
            ParamKind::Device | ParamKind::Text => {
                let Some((text, after)) = string(rest) else {
                    let what = if param.kind == ParamKind::Device { "block device name" } else { "string" };
                    return Err(format!("{verb}: {what} expected\n"));
                };
                rest = after;
                Value::String(text)
            }
            ParamKind::Size => {
                let read = size::leading(rest, MEBIBYTE).filter(|(bytes, _)| i64::try_from(*bytes).is_ok());
                let Some((bytes, after)) = read else { return Err("invalid size\n".to_owned()) };
                rest = after;
                Value::from(bytes)
            }
        };
        arguments.insert(param.name.to_owned(), value);
    }
    if rest.trim_start().is_empty() {
        Ok(arguments)
    } else {
        Err(format!("{verb}: extraneous characters at the end of line\n"))
    }
}

/// A string at the beginning of `text`, quoted or up to a space, and what follows it.
fn string(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(|c: char| c.is_ascii_whitespace()).unwrap_or(text.len());
        return (end > 0).then(|| (text[..end].to_owned(), &text[end..]));
    };
    let mut string = String::new();
    let mut letters = quoted.chars();
    loop {
        match letters.next()? {
            '"' => return Some((string, letters.as_str())),
            '\\' => string.push(match letters.next()? {
                'n' => '\n',
                'r' => '\r',
                letter @ ('\\' | '\'' | '"') => letter,
                _ => return None,
            }),
            letter => string.push(letter),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MIRROR: &[Param] = &[
        Param { name: "reuse", kind: ParamKind::Flag('n'), optional: false },
        Param { name: "full", kind: ParamKind::Flag('f'), optional: false },
        Param { name: "device", kind: ParamKind::Device, optional: false },
        Param { name: "target", kind: ParamKind::Text, optional: false },
        Param { name: "speed", kind: ParamKind::Size, optional: true },
    ];

    fn read(line: &str) -> Value {
        match arguments("verb", MIRROR, line) {
            Ok(arguments) => Value::Object(arguments),
            Err(text) => json!(text),
        }
    }

    #[test]
    fn lines_are_read_by_the_parameters_of_their_verb() {
        assert_eq!(
            read(r#" -n -f d0 "a \"b\"\n" 1.5"#),
            json!({"reuse": true, "full": true, "device": "d0", "target": "a \"b\"\n", "speed": 1_572_864})
        );
        assert_eq!(read("-n-f d0\tt"), json!({"reuse": true, "full": true, "device": "d0", "target": "t"}));
        // Flags have an order, and stand alone.
        assert_eq!(read("-f -n t"), json!({"full": true, "device": "-n", "target": "t"}));
        assert_eq!(read("-nf t"), json!({"reuse": true, "device": "f", "target": "t"}));
        for (line, text) in [
            ("", "verb: block device name expected\n"),
            ("\"d0", "verb: block device name expected\n"),
            ("\"d\\x0\"", "verb: block device name expected\n"),
            ("d0", "verb: string expected\n"),
            ("-x d0 t", "verb: unsupported option -x\n"),
            ("- d0 t", "verb: unsupported option - \n"),
            ("-", "verb: unsupported option - \n"),
            ("d0 t a", "invalid size\n"),
            ("d0 t -1", "invalid size\n"),
            ("d0 t 8E", "invalid size\n"),
            ("d0 t 1 2", "verb: extraneous characters at the end of line\n"),
            ("d0 t 1kb", "verb: extraneous characters at the end of line\n"),
        ] {
            assert_eq!(read(line), json!(text), "{line}");
        }
    }
}
