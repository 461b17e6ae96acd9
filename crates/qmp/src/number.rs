//! Scalars as they are written on a command line. Called by the check of values against the schema.

/// `on` and `off`, and the other words for them.
pub(crate) fn truth(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// A signed number: decimal, hexadecimal behind `0x`, octal behind `0`.
pub(crate) fn integer(text: &str) -> Option<i64> {
    let (negative, magnitude) = magnitude(text)?;
    match negative {
        true => 0_i64.checked_sub_unsigned(magnitude),
        false => i64::try_from(magnitude).ok(),
    }
}

/// An unsigned number; a negative one is what it is modulo 2^64.
pub(crate) fn unsigned(text: &str) -> Option<u64> {
    let (negative, magnitude) = magnitude(text)?;
    Some(if negative { magnitude.wrapping_neg() } else { magnitude })
}

fn magnitude(text: &str) -> Option<(bool, u64)> {
    let (negative, digits) = sign(text);
    let (radix, digits) = radix(digits);
    // The sign was taken off; a second one is none.
    if digits.starts_with('+') {
        return None;
    }
    u64::from_str_radix(digits, radix).ok().map(|magnitude| (negative, magnitude))
}

fn sign(text: &str) -> (bool, &str) {
    let text = text.trim_start_matches([' ', '\t', '\n', '\u{b}', '\u{c}', '\r']);
    match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    }
}

fn radix(digits: &str) -> (u32, &str) {
    match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => (16, hex),
        None if digits.len() > 1 && digits.starts_with('0') => (8, digits),
        None => (10, digits),
    }
}

/// A size in bytes: decimal digits, a fraction and a suffix (`b`, `k`, `m`, `g`, `t`, `p`, `e`), or
/// hexadecimal digits alone. A fraction needs a unit to be a fraction of; it is cut to whole bytes.
pub(crate) fn size(text: &str) -> Option<u64> {
    let (negative, text) = sign(text);
    if negative {
        return None;
    }
    if let (16, digits) = radix(text) {
        return u64::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'));
    }
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (whole, rest) = text.split_at(end);
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let fraction = fraction.trim_end_matches('0');
    if !fraction.is_empty() && shift == 0 {
        return None;
    }
    // 19 digits decide every byte below 2^60.
    let digits = fraction.get(..19).unwrap_or(fraction);
    let part = digits.bytes().rev().fold(0_u128, |part, digit| {
        // Fixed point with 64 bits behind the point.
        ((u128::from(digit - b'0') << 64) + part) / 10
    });
    let part = u64::try_from((part << shift) >> 64).ok()?;
    whole.checked_mul(1 << shift)?.checked_add(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_what_qemu_takes() {
        for (text, bytes) in [
            ("1k", Some(1024)),
            ("1.5K", Some(1536)),
            ("0x10", Some(16)),
            (".5k", Some(512)),
            ("1.", Some(1)),
            ("1.k", Some(1024)),
            ("010", Some(10)),
            ("+1", Some(1)),
            (" 12", Some(12)),
            ("1B", Some(1)),
            ("0.1M", Some(104_857)),
            ("16383P", Some(16383 << 50)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("16E", None),
            ("-1", None),
            ("12 ", None),
            ("1.5", None),
            ("0.1", None),
            ("0x1k", None),
            ("0x", None),
            ("1kk", None),
            ("1e3", None),
            ("", None),
            (".", None),
            ("bad", None),
            ("inf", None),
        ] {
            assert_eq!(size(text), bytes, "{text:?}");
        }
    }

    #[test]
    fn integers_have_three_radices() {
        assert_eq!(integer("0x10"), Some(16));
        assert_eq!(integer("010"), Some(8));
        assert_eq!(integer(" -0x8000000000000000"), Some(i64::MIN));
        assert_eq!(integer("9223372036854775808"), None);
        assert_eq!(integer("1k"), None);
        assert_eq!(integer("+-1"), None);
        assert_eq!(integer(""), None);
        assert_eq!(unsigned("-1"), Some(u64::MAX));
        assert_eq!(unsigned("18446744073709551616"), None);
    }
}
