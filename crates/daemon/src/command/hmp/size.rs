//! Sizes as people type them: `64k`, `1.5M`, `0x1000`. Called by what reads a monitor's line; pure.

/// What a size begins with, in bytes, and the rest of the text; `unit` is what one without a suffix counts.
///
/// `None` if there is no number, one that is no whole number of bytes below 2^64, or one past that.
pub(super) fn leading(text: &str, unit: u64) -> Option<(u64, &str)> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let end = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
        let (digits, rest) = digits.split_at(end);
        return Some((u64::from_str_radix(digits, 16).ok()?.checked_mul(unit)?, rest));
    }
    let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (whole, mut rest) = text.split_at(digits(text));
    let mut fraction = "";
    if let Some(after) = rest.strip_prefix('.') {
        (fraction, rest) = after.split_at(digits(after));
    }
    let mut letters = rest.chars();
    let unit = match letters.next().map(|c| c.to_ascii_lowercase()) {
        Some('b') => 1,
        Some('k') => 1 << 10,
        Some('m') => 1 << 20,
        Some('g') => 1 << 30,
        Some('t') => 1 << 40,
        Some('p') => 1 << 50,
        Some('e') => 1_u64 << 60,
        _ => {
            letters = rest.chars();
            unit
        }
    };
    let bytes = whole.parse::<u64>().ok()?.checked_mul(unit)?.checked_add(share(fraction, unit)?)?;
    Some((bytes, letters.as_str()))
}

/// The decimals `digits` of `unit`, rounded. None of a byte.
fn share(digits: &str, unit: u64) -> Option<u64> {
    let digits = digits.trim_end_matches('0');
    if digits.is_empty() {
        return Some(0);
    }
    if unit == 1 {
        return None;
    }
    // Further ones would not matter: a unit is 2^60 at most.
    let digits = &digits[..digits.len().min(18)];
    let scale = 10_u128.pow(u32::try_from(digits.len()).ok()?);
    let share = (digits.parse::<u128>().ok()? * u128::from(unit) + scale / 2) / scale;
    u64::try_from(share).ok()
}

/// All of `text` as a size in bytes.
pub(super) fn whole(text: &str) -> Option<u64> {
    leading(text, 1).and_then(|(bytes, rest)| rest.is_empty().then_some(bytes))
}

#[cfg(test)]
mod tests {
    use super::{leading, whole};

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("65536", 65536),
            ("64k", 65536),
            ("64K", 65536),
            ("1.5k", 1536),
            ("1.2345k", 1264),
            ("5.M", 5 << 20),
            ("0x1000", 4096),
            ("7.9E", 9_108_079_886_394_091_110),
            ("18446744073709551615", u64::MAX),
            ("18446744073709551615b", u64::MAX),
        ] {
            assert_eq!(whole(text), Some(bytes), "{text}");
        }
        for text in ["", "a", ".5k", "-1", "1Mi", "1.5", "1.5b", "16E", "0x", "18446744073709551616", "1e2k"]
        {
            assert_eq!(whole(text), None, "{text}");
        }
        assert_eq!(leading("10", 1 << 20), Some((10 << 20, "")));
        assert_eq!(leading("0x10", 1 << 20), Some((16 << 20, "")));
        assert_eq!(leading("1kb", 1 << 20), Some((1024, "b")));
    }
}
