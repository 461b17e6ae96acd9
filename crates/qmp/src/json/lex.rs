//! Bytes to tokens. Called by [`super::parser`] with one byte after the other; holds the bytes of the token
//! that is not finished, and nothing else.
//!
//! After a byte that fits nowhere the lexer skips what follows until a structural character, a control
//! character other than the tabulator, or FE or FF: a client that does not know what its predecessor left
//! half sent writes FF and is in step again.

/// What the bytes say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// One of `{}[],:`.
    Mark(u8),
    /// A string with its quotes and escapes.
    String(Vec<u8>),
    /// A number that is an integer by its spelling.
    Integer(Vec<u8>),
    /// A number with a fraction or an exponent.
    Float(Vec<u8>),
    /// Lower-case letters.
    Word(Vec<u8>),
    /// Bytes that are no token, the last of which is the one that does not fit.
    Stray(Vec<u8>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    Recover,
    Quoted(u8),
    Escape(u8),
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
    Word,
}

/// What [`Lexer::push`] did with a byte.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The byte was taken; no token is finished.
    Taken,
    /// The byte was taken and finishes this token.
    Token(Token),
    /// This token was finished before the byte, which is to be pushed again.
    Before(Token),
}

#[derive(Debug)]
pub(super) struct Lexer {
    state: State,
    token: Vec<u8>,
}

impl Lexer {
    pub(super) const fn new() -> Self {
        Self { state: State::Start, token: Vec::new() }
    }

    /// Length of the unfinished token in bytes.
    pub(super) fn pending(&self) -> usize {
        self.token.len()
    }

    /// Gives up the unfinished token and skips to where the stream makes sense again.
    pub(super) fn recover(&mut self) {
        self.token = Vec::new();
        self.state = State::Recover;
    }

    /// The end of the text: a number or word that only its successor would have finished is finished. Text
    /// that stops inside of a token is a stray one.
    pub(super) fn finish(&mut self) -> Option<Token> {
        let state = std::mem::replace(&mut self.state, State::Start);
        match state {
            State::Start | State::Recover => None,
            _ => Some(match Self::finished(state) {
                Some(kind) => kind(std::mem::take(&mut self.token)),
                None => Token::Stray(std::mem::take(&mut self.token)),
            }),
        }
    }

    /// What a token is that ends in `state` because of a byte that belongs to the next.
    fn finished(state: State) -> Option<fn(Vec<u8>) -> Token> {
        match state {
            State::Zero | State::Digits => Some(Token::Integer),
            State::Fraction | State::ExponentDigits => Some(Token::Float),
            State::Word => Some(Token::Word),
            _ => None,
        }
    }

    pub(super) fn push(&mut self, byte: u8) -> Step {
        if self.state == State::Recover {
            if !resynchronises(byte) {
                return Step::Taken;
            }
            self.state = State::Start;
        }
        match self.next(byte) {
            Some(State::Start) if self.state == State::Start => match byte {
                b'{' | b'}' | b'[' | b']' | b',' | b':' => Step::Token(Token::Mark(byte)),
                _ => Step::Taken,
            },
            Some(State::Start) => {
                self.token.push(byte);
                self.state = State::Start;
                Step::Token(Token::String(std::mem::take(&mut self.token)))
            }
            Some(next) => {
                self.token.push(byte);
                self.state = next;
                Step::Taken
            }
            None => match Self::finished(self.state) {
                Some(kind) if !(self.state == State::Zero && byte.is_ascii_digit()) => {
                    self.state = State::Start;
                    Step::Before(kind(std::mem::take(&mut self.token)))
                }
                _ => {
                    self.token.push(byte);
                    let stray = std::mem::take(&mut self.token);
                    self.state = State::Recover;
                    Step::Token(Token::Stray(stray))
                }
            },
        }
    }

    /// The state after `byte`; `None` if it does not belong to the token.
    fn next(&self, byte: u8) -> Option<State> {
        match (self.state, byte) {
            (State::Start, b' ' | b'\t' | b'\r' | b'\n') => Some(State::Start),
            (State::Start, b'{' | b'}' | b'[' | b']' | b',' | b':') => Some(State::Start),
            (State::Start, b'"' | b'\'') => Some(State::Quoted(byte)),
            (State::Start, b'-') => Some(State::Minus),
            (State::Start, b'a'..=b'z') | (State::Word, b'a'..=b'z') => Some(State::Word),
            (State::Start | State::Minus, b'0') => Some(State::Zero),
            (State::Start | State::Minus, b'1'..=b'9') | (State::Digits, b'0'..=b'9') => Some(State::Digits),
            (State::Zero | State::Digits, b'.') => Some(State::Point),
            (State::Point | State::Fraction, b'0'..=b'9') => Some(State::Fraction),
            (State::Zero | State::Digits | State::Fraction, b'e' | b'E') => Some(State::Exponent),
            (State::Exponent, b'+' | b'-') => Some(State::ExponentSign),
            (State::Exponent | State::ExponentSign | State::ExponentDigits, b'0'..=b'9') => {
                Some(State::ExponentDigits)
            }
            (State::Quoted(quote), _) if byte == quote => Some(State::Start),
            (State::Quoted(quote), b'\\') => Some(State::Escape(quote)),
            (State::Quoted(quote) | State::Escape(quote), b' '..=0xfd) => Some(State::Quoted(quote)),
            _ => None,
        }
    }
}

/// Whether skipping ends at `byte`.
fn resynchronises(byte: u8) -> bool {
    matches!(byte, b'{' | b'}' | b'[' | b']' | b',' | b':' | 0xfe | 0xff) || (byte < 0x20 && byte != b'\t')
}
