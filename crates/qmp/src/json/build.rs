//! Tokens to a value, with a stack of its own in place of recursion. Called by [`super::parser`], which says
//! when a value is complete (its brackets are balanced) and throws the builder away at the first error.

use serde_json::{Map, Number, Value};

use super::lex::Token;
use super::utf8;

/// Where a list stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Just opened: a value (or key), or the end.
    Open,
    /// After a comma.
    Next,
    /// After a key.
    Colon,
    /// After the colon.
    Value,
    /// After a value: a comma, or the end.
    Separator,
}

#[derive(Debug)]
enum Frame {
    List(Vec<Value>, At),
    Dict { members: Map<String, Value>, key: String, at: At },
}

/// Makes one value.
#[derive(Debug, Default)]
pub(super) struct Builder {
    stack: Vec<Frame>,
    done: Option<Value>,
}

impl Builder {
    /// The value, if the tokens made a whole one.
    pub(super) fn take(self) -> Option<Value> {
        self.done.filter(|_| self.stack.is_empty())
    }

    /// Takes the next token; an error is what is wrong with it.
    pub(super) fn push(&mut self, token: &Token) -> Result<(), String> {
        if let Token::Mark(mark) = token {
            return self.mark(*mark);
        }
        // A scalar where none may stand is found before it is parsed.
        self.expect_value()?;
        let value = match token {
            Token::String(raw) => Value::String(unquote(raw)?),
            Token::Integer(text) | Token::Float(text) => number(text)?,
            Token::Word(word) => match word.as_slice() {
                b"true" => Value::Bool(true),
                b"false" => Value::Bool(false),
                b"null" => Value::Null,
                _ => return Err(format!("invalid keyword '{}'", utf8::lossy(word))),
            },
            Token::Mark(_) | Token::Stray(_) => return Err("expecting value".into()),
        };
        self.place(value)
    }

    fn mark(&mut self, mark: u8) -> Result<(), String> {
        match mark {
            b'[' | b'{' => {
                self.expect_value()?;
                self.stack.push(if mark == b'[' {
                    Frame::List(Vec::new(), At::Open)
                } else {
                    Frame::Dict { members: Map::new(), key: String::new(), at: At::Open }
                });
                Ok(())
            }
            b']' | b'}' => self.close(mark),
            b',' => match self.stack.last_mut() {
                Some(Frame::List(_, at) | Frame::Dict { at, .. }) if *at == At::Separator => {
                    *at = At::Next;
                    Ok(())
                }
                _ => self.expect_value().and(Err("expecting value".into())),
            },
            _ => match self.stack.last_mut() {
                Some(Frame::Dict { at, .. }) if *at == At::Colon => {
                    *at = At::Value;
                    Ok(())
                }
                _ => self.expect_value().and(Err("expecting value".into())),
            },
        }
    }

    fn close(&mut self, mark: u8) -> Result<(), String> {
        let fits = match self.stack.last() {
            Some(Frame::List(_, at)) => mark == b']' && matches!(at, At::Open | At::Separator),
            Some(Frame::Dict { at, .. }) => mark == b'}' && matches!(at, At::Open | At::Separator),
            None => false,
        };
        if !fits {
            return self.expect_value().and(Err("expecting value".into()));
        }
        let value = match self.stack.pop() {
            Some(Frame::List(items, _)) => Value::Array(items),
            Some(Frame::Dict { members, .. }) => Value::Object(members),
            None => return Err("expecting value".into()),
        };
        self.place(value)
    }

    /// Whether a value or key may stand here, and what is missing if not.
    fn expect_value(&self) -> Result<(), String> {
        match self.stack.last() {
            Some(Frame::List(_, At::Separator)) => Err("expected separator in list".into()),
            Some(Frame::Dict { at: At::Separator, .. }) => Err("expected separator in dict".into()),
            Some(Frame::Dict { at: At::Colon, .. }) => Err("missing : in object pair".into()),
            _ => Ok(()),
        }
    }

    fn place(&mut self, value: Value) -> Result<(), String> {
        match self.stack.last_mut() {
            None => self.done = Some(value),
            Some(Frame::List(items, at)) => {
                items.push(value);
                *at = At::Separator;
            }
            Some(Frame::Dict { key, at, .. }) if matches!(at, At::Open | At::Next) => {
                let Value::String(name) = value else { return Err("key is not a string in object".into()) };
                *key = name;
                *at = At::Colon;
            }
            Some(Frame::Dict { members, key, at }) => {
                *at = At::Separator;
                if members.insert(std::mem::take(key), value).is_some() {
                    return Err("duplicate key".into());
                }
            }
        }
        Ok(())
    }
}

fn number(text: &[u8]) -> Result<Value, String> {
    let text = utf8::lossy(text);
    if let Ok(n) = text.parse::<i64>() {
        return Ok(n.into());
    }
    if let Ok(n) = text.parse::<u64>() {
        return Ok(n.into());
    }
    text.parse()
        .ok()
        .and_then(Number::from_f64)
        .map(Value::Number)
        .ok_or_else(|| "number out of range".into())
}

/// The text of a string token: quotes off, escapes resolved, UTF-8 checked.
fn unquote(raw: &[u8]) -> Result<String, String> {
    let end = raw.len().saturating_sub(1);
    let mut at = 1;
    let mut text = String::with_capacity(end);
    while at < end {
        // The closing quote is part of what an error shows.
        let rest = raw.get(at..).unwrap_or_default();
        let (c, used) = match rest.first() {
            Some(b'\\') => escape(rest)?,
            _ => {
                let (c, used) = utf8::next(raw.get(at..end).unwrap_or_default());
                (c.ok_or("invalid UTF-8 sequence in string")?, used)
            }
        };
        text.push(c);
        at += used;
    }
    Ok(text)
}

/// The character that the escape at the start of `rest` stands for, and the escape's length.
fn escape(rest: &[u8]) -> Result<(char, usize), String> {
    let c = match rest.get(1) {
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(b'n') => '\n',
        Some(b'r') => '\r',
        Some(b't') => '\t',
        Some(c @ (b'"' | b'\'' | b'\\' | b'/')) => char::from(*c),
        Some(b'u') => {
            let shown = || utf8::lossy(rest.get(..6).unwrap_or(rest));
            return unicode(rest).ok_or_else(|| format!("{} is not a valid Unicode character", shown()));
        }
        _ => return Err("invalid escape sequence in string".into()),
    };
    Ok((c, 2))
}

/// A `\u` escape, or two that are a surrogate pair.
fn unicode(rest: &[u8]) -> Option<(char, usize)> {
    let first = hex4(rest.get(2..6))?;
    let (code, used) = match first {
        0xd800..0xdc00 if rest.get(6..8) == Some(b"\\u") => {
            let second = hex4(rest.get(8..12)).filter(|code| (0xdc00..0xe000).contains(code))?;
            (0x1_0000 + ((first & 0x3ff) << 10) + (second & 0x3ff), 12)
        }
        _ => (first, 6),
    };
    char::from_u32(code).filter(|c| utf8::is_character(*c)).map(|c| (c, used))
}

fn hex4(digits: Option<&[u8]>) -> Option<u32> {
    digits?.iter().try_fold(0, |code, d| Some(code << 4 | char::from(*d).to_digit(16)?))
}
