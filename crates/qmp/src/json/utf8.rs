//! Modified UTF-8: one code point at a time, with U+0000 also spelled `C0 80`. Used by the parser for strings
//! and for what it quotes in errors.

/// The code point at the start of `bytes` (which is not empty), or `None` if what stands there is not one;
/// and how many bytes it took. An invalid sequence takes its lead byte and the continuation bytes that belong
/// to it.
pub(super) fn next(bytes: &[u8]) -> (Option<char>, usize) {
    let Some(&lead) = bytes.first() else { return (None, 0) };
    let (want, bits, least) = match lead {
        0x00..=0x7f => return (Some(char::from(lead)), 1),
        0xc0..=0xdf => (1, lead & 0x1f, 0x80),
        0xe0..=0xef => (2, lead & 0x0f, 0x800),
        0xf0..=0xf7 => (3, lead & 0x07, 0x1_0000),
        _ => return (None, 1),
    };
    let mut code = u32::from(bits);
    let mut used = 1;
    while used <= want {
        match bytes.get(used) {
            Some(&next) if next & 0xc0 == 0x80 => code = code << 6 | u32::from(next & 0x3f),
            _ => return (None, used),
        }
        used += 1;
    }
    if code < least && !(code == 0 && want == 1) {
        return (None, used);
    }
    (char::from_u32(code).filter(|c| is_character(*c)), used)
}

/// Whether `c` is a character: U+FDD0..U+FDEF and the last two of each plane are not.
pub(super) fn is_character(c: char) -> bool {
    let code = u32::from(c);
    !(0xfdd0..=0xfdef).contains(&code) && code & 0xfffe != 0xfffe
}

/// `bytes` as text, up to a NUL byte; what is not UTF-8 becomes U+FFFD.
pub(super) fn lossy(bytes: &[u8]) -> String {
    let mut rest = bytes.split(|b| *b == 0).next().unwrap_or_default();
    let mut text = String::new();
    while !rest.is_empty() {
        let (c, used) = next(rest);
        text.push(c.unwrap_or('\u{fffd}'));
        rest = rest.get(used..).unwrap_or_default();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nul_has_a_second_spelling_and_nothing_else_has() {
        assert_eq!(next(b"\xc0\x80x"), (Some('\0'), 2));
        assert_eq!(next(b"\xc1\x81"), (None, 2));
        assert_eq!(next(b"\xe0\x80\x80"), (None, 3));
        assert_eq!(next(b"\xed\xa0\x80"), (None, 3), "surrogates");
        assert_eq!(next(b"\xef\xbf\xbf"), (None, 3), "U+FFFF is no character");
        assert_eq!(next(b"\xe2\x82\xac!"), (Some('€'), 3));
        assert_eq!(next(b"\xe2\x82!"), (None, 2));
    }
}
