//! The stream: bytes in, complete values out, with limits. Called by the sessions with what they read, and by
//! [`parse`] with a whole text.
//!
//! Brackets are counted, and a value is complete when none is open, whether or not it was well formed: so one
//! broken value costs one error, and the next is read as what it is.

use serde_json::Value;
use thiserror::Error;

use super::build::Builder;
use super::lex::{Lexer, Step, Token};
use super::utf8;

/// What one value may cost at most. What goes over is dropped with an error, and memory given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of all its tokens.
    pub bytes: usize,
    /// Tokens: each scalar, bracket, comma and colon is one.
    pub tokens: usize,
    /// Brackets and braces open at once.
    pub depth: usize,
}

impl Limits {
    /// 8 MiB, 256 Ki tokens, 1024 levels.
    pub const DEFAULT: Self = Self { bytes: 8 << 20, tokens: 256 << 10, depth: 1024 };
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Why a text is not a value.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum JsonError {
    /// The tokens do not make a value.
    #[error("JSON parse error, {0}")]
    Syntax(String),
    /// One of [`Limits`] was exceeded: `token size`, `token count` or `nesting depth`.
    #[error("JSON {0} limit exceeded")]
    Limit(&'static str),
}

/// A stream of values: [`Parser::next`] takes bytes as they come.
///
/// ```
/// let mut parser = blockmirror_qmp::json::Parser::default();
/// let mut input: &[u8] = b"{'execute': 'quit'} [1, 2";
/// assert_eq!(parser.next(&mut input), Some(Ok(serde_json::json!({"execute": "quit"}))));
/// assert_eq!(parser.next(&mut input), None); // the list is not complete
/// let mut input: &[u8] = b", 3]";
/// assert_eq!(parser.next(&mut input), Some(Ok(serde_json::json!([1, 2, 3]))));
/// ```
#[derive(Debug)]
pub struct Parser {
    limits: Limits,
    lexer: Lexer,
    value: Unfinished,
}

/// The value whose brackets are not balanced yet.
#[derive(Debug, Default)]
struct Unfinished {
    builder: Builder,
    /// The first thing that was wrong with it.
    error: Option<JsonError>,
    braces: i64,
    brackets: i64,
    tokens: usize,
    bytes: usize,
}

impl Default for Parser {
    fn default() -> Self {
        Self::new(Limits::DEFAULT)
    }
}

impl Parser {
    /// A parser at the start of a stream.
    pub fn new(limits: Limits) -> Self {
        Self { limits, lexer: Lexer::new(), value: Unfinished::default() }
    }

    /// Takes bytes from the front of `input` until a value is complete or found broken; `None` when `input`
    /// is used up and more is needed. A number or a word that stands alone is complete only with the byte
    /// after it.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, JsonError>> {
        while let Some((&byte, rest)) = input.split_first() {
            let token = match self.lexer.push(byte) {
                Step::Taken => {
                    *input = rest;
                    if self.lexer.pending() <= self.limits.bytes {
                        continue;
                    }
                    self.lexer.recover();
                    self.value = Unfinished::default();
                    return Some(Err(JsonError::Limit("token size")));
                }
                Step::Token(token) => {
                    *input = rest;
                    token
                }
                Step::Before(token) => token,
            };
            if let Some(done) = self.token(&token) {
                return Some(done);
            }
        }
        None
    }

    /// The end of the stream: what is left is complete or an error; `None` if nothing is left.
    pub fn finish(&mut self) -> Option<Result<Value, JsonError>> {
        if let Some(done) = self.lexer.finish().and_then(|token| self.token(&token)) {
            return Some(done);
        }
        let rest = std::mem::take(&mut self.value);
        (rest.tokens > 0)
            .then(|| Err(rest.error.unwrap_or_else(|| JsonError::Syntax("premature EOI".into()))))
    }

    fn token(&mut self, token: &Token) -> Option<Result<Value, JsonError>> {
        let value = &mut self.value;
        let length = match token {
            Token::Stray(bytes) => {
                let error = JsonError::Syntax(format!("stray '{}'", utf8::lossy(bytes)));
                self.value = Unfinished::default();
                return Some(Err(error));
            }
            Token::Mark(mark) => {
                match mark {
                    b'{' => value.braces += 1,
                    b'}' => value.braces -= 1,
                    b'[' => value.brackets += 1,
                    b']' => value.brackets -= 1,
                    _ => {}
                }
                1
            }
            Token::String(text) | Token::Integer(text) | Token::Float(text) | Token::Word(text) => text.len(),
        };
        value.tokens += 1;
        value.bytes = value.bytes.saturating_add(length);
        let depth = usize::try_from(value.braces.saturating_add(value.brackets)).unwrap_or(0);
        let limit = if value.bytes > self.limits.bytes {
            Some("token size")
        } else if value.tokens > self.limits.tokens {
            Some("token count")
        } else if depth > self.limits.depth {
            Some("nesting depth")
        } else {
            None
        };
        if let Some(limit) = limit {
            self.value = Unfinished::default();
            return Some(Err(JsonError::Limit(limit)));
        }
        if value.error.is_none()
            && let Err(what) = value.builder.push(token)
        {
            value.error = Some(JsonError::Syntax(what));
            value.builder = Builder::default();
        }
        let complete = value.braces < 0 || value.brackets < 0 || (value.braces == 0 && value.brackets == 0);
        complete.then(|| {
            let Unfinished { builder, error, .. } = std::mem::take(value);
            match error {
                Some(error) => Err(error),
                None => builder.take().ok_or_else(|| JsonError::Syntax("premature EOI".into())),
            }
        })
    }
}

/// The one value that `text` is.
///
/// # Errors
/// `text` is not one value, or exceeds [`Limits::DEFAULT`].
pub fn parse(text: &str) -> Result<Value, JsonError> {
    let mut parser = Parser::default();
    let mut input = text.as_bytes();
    let Some(first) = parser.next(&mut input).or_else(|| parser.finish()) else {
        return Err(JsonError::Syntax("expecting value".into()));
    };
    let value = first?;
    match parser.next(&mut input).or_else(|| parser.finish()) {
        None => Ok(value),
        Some(Err(error)) => Err(error),
        Some(Ok(_)) => Err(JsonError::Syntax("expecting end of input".into())),
    }
}
