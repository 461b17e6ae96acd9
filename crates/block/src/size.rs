//! Sizes as people write and read them: `64K`, `1.5G`, `0x200`; and back.
//!
//! Called for options of images, by the command line and for messages. Every unit is a power of 1024; a
//! suffix that could mean powers of 1000 (`KB`) is refused rather than guessed.

use std::fmt;

use thiserror::Error;

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SizeError {
    /// It does not start with a decimal or `0x` number, or goes on after the unit.
    #[error(
        "\"{0}\" is not a size: expected a number with an optional unit K, M, G, T, P or E (powers of 1024)"
    )]
    NotASize(String),
    /// A unit in powers of 1000.
    #[error("\"{0}\" is ambiguous: units are powers of 1024 and written K or KiB, M or MiB and so on")]
    Decimal(String),
    /// More than 2^64 - 1 bytes.
    #[error("\"{0}\" is larger than 16 EiB")]
    TooLarge(String),
}

const UNITS: [char; 6] = ['k', 'm', 'g', 't', 'p', 'e'];

/// Reads a size as QEMU's tools do: digits with or without a point, perhaps a unit (`b k m g t p e` in either
/// case, the latter also as `KiB`), or a `0x` number without a unit; space and a plus may come first. A
/// fraction needs a unit above the byte, and is rounded to a byte.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let not_a_size = || SizeError::NotASize(text.to_owned());
    let too_large = || SizeError::TooLarge(text.to_owned());
    let number = text.trim_start_matches([' ', '\t']);
    let number = number.strip_prefix('+').unwrap_or(number);
    if let Some(hex) = number.strip_prefix("0x").or_else(|| number.strip_prefix("0X")) {
        if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(not_a_size());
        }
        return u64::from_str_radix(hex, 16).map_err(|_| too_large());
    }
    let whole_len = number.bytes().take_while(u8::is_ascii_digit).count();
    let (whole, rest) = number.split_at(whole_len);
    let (fraction, unit) = match rest.strip_prefix('.') {
        None => ("", rest),
        Some(rest) => {
            let len = rest.bytes().take_while(u8::is_ascii_digit).count();
            rest.split_at(len)
        }
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(not_a_size());
    }
    let shift = unit_shift(unit, text)?;
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| too_large())? };
    let mut bytes = u128::from(whole) << shift;
    if fraction.bytes().any(|digit| digit != b'0') {
        if shift == 0 {
            return Err(not_a_size());
        }
        // What comes after eighteen digits is less than a byte of any size.
        let (digits, _) = fraction.split_at(fraction.len().min(18));
        let scale = 10u128.pow(u32::try_from(digits.len()).unwrap_or(18));
        let digits: u64 = digits.parse().map_err(|_| not_a_size())?;
        bytes += ((u128::from(digits) << shift) + scale / 2) / scale;
    }
    u64::try_from(bytes).map_err(|_| too_large())
}

fn unit_shift(unit: &str, text: &str) -> Result<u32, SizeError> {
    let mut chars = unit.chars();
    let Some(first) = chars.next() else { return Ok(0) };
    let tail = chars.as_str();
    let first = first.to_ascii_lowercase();
    if first == 'b' && tail.is_empty() {
        return Ok(0);
    }
    let Some(power) = (1..).zip(UNITS).find_map(|(power, unit)| (unit == first).then_some(power)) else {
        return Err(SizeError::NotASize(text.to_owned()));
    };
    match tail {
        "" | "iB" | "ib" | "i" => Ok(10 * power),
        "B" | "b" => Err(SizeError::Decimal(text.to_owned())),
        _ => Err(SizeError::NotASize(text.to_owned())),
    }
}

/// A size for people, with three significant digits as `qemu-img` prints it: `196 KiB`, `1.25 MiB`.
pub fn human_size(bytes: u64) -> String {
    const NAMES: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    // The unit changes at 1000, not at 1024, so that there are never four digits before the point.
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < NAMES.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 || value >= 99.95 => 0,
        _ if value >= 9.995 => 1,
        _ if value >= 0.9995 => 2,
        _ => 3,
    };
    let mut number = format!("{value:.digits$}");
    if number.contains('.') {
        number.truncate(number.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{number} {}", NAMES[unit])
}

/// A number of bytes, printed exactly: with the largest unit that divides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExactSize(pub u64);

impl fmt::Display for ExactSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("511", 511),
            ("64K", 65536),
            ("64k", 65536),
            ("64KiB", 65536),
            ("64kib", 65536),
            ("1M", 1 << 20),
            ("1.5G", 3 << 29),
            ("0.5K", 512),
            ("8T", 8 << 40),
            ("2P", 2 << 50),
            ("15E", 15 << 60),
            ("512b", 512),
            ("512B", 512),
            ("0x200", 512),
            (".5G", 1 << 29),
            ("5.", 5),
            ("5.G", 5 << 30),
            ("5.0", 5),
            (" 1M", 1 << 20),
            ("+1M", 1 << 20),
            ("1.1K", 1126),
            ("1.99999G", 2_147_472_911),
            ("1.0000000000000000000001G", 1 << 30),
            ("00512", 512),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "", "-1", "+-1", "++1", "K", "0x", "0xg", ".", ".G", "1.5", ".5", "1.5b", "64KiBs", "1 K", "1e3",
            "4X", "٣", "1 ", "0x10k", "0x1.8k", "1M5", "1K1K", "inf", "1,5G",
        ] {
            assert!(matches!(parse_size(text), Err(SizeError::NotASize(_))), "{text:?}");
        }
        assert!(matches!(parse_size("64KB"), Err(SizeError::Decimal(_))));
        for text in ["16E", "18446744073709551616", "0x10000000000000000", "99999999999999999999999E"] {
            assert!(matches!(parse_size(text), Err(SizeError::TooLarge(_))), "{text:?}");
        }
    }

    #[test]
    fn sizes_print_with_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (200_704, "196 KiB"),
            (1_314_816, "1.25 MiB"),
            (1_376_256, "1.31 MiB"),
            (10 << 20, "10 MiB"),
            (12_900_000, "12.3 MiB"),
            (8 << 40, "8 TiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human_size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn exact_sizes_lose_nothing() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (513, "513 bytes"),
            (1536, "1536 bytes"),
            (65536, "64 KiB"),
            (3 << 19, "1536 KiB"),
            (5 << 40, "5 TiB"),
        ] {
            assert_eq!(ExactSize(bytes).to_string(), text);
        }
    }
}
