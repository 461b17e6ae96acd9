//! Text that goes into a picture: escapes, shortened names, shares.
//!
//! What must hold: whatever the text, it cannot leave its place, and XML parsers take it.

use blockmirror_block::size::human_size;

/// `text` for the content of an element or for an attribute in double quotes. Control characters, which XML
/// does not have, and those that turn the direction of text are shown as escapes.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                out.extend(c.escape_default());
            }
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

/// `text` with at most `most` characters: of a longer one the end, which is what tells paths apart.
pub(crate) fn shortened(text: &str, most: usize) -> String {
    let count = text.chars().count();
    if count <= most {
        return text.to_owned();
    }
    let tail: String = text.chars().skip(count + 1 - most).collect();
    format!("…{tail}")
}

/// `part` of `whole` as percents, with a digit behind the point below ten.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if part == 0 || whole == 0 {
        return "0 %".into();
    }
    match part as f64 / whole as f64 * 100.0 {
        share if share < 0.05 => "<0.1 %".into(),
        share if share < 9.95 => format!("{} %", number((share * 10.0).round() / 10.0)),
        share if share < 99.5 => format!("{share:.0} %"),
        // Only all of it is all of it.
        _ if part < whole => ">99 %".into(),
        _ => "100 %".into(),
    }
}

/// `bytes` and which share of `whole` they are.
pub(crate) fn size_and_share(bytes: u64, whole: u64) -> String {
    format!("{} · {}", human_size(bytes), percent(bytes, whole))
}

/// `count` of what `one` names; more of them have an s.
pub(crate) fn counted(count: u64, one: &str) -> String {
    let mut digits = count.to_string();
    let mut at = digits.len();
    while at > 3 {
        at -= 3;
        digits.insert(at, ' ');
    }
    format!("{digits} {one}{}", if count == 1 { "" } else { "s" })
}

/// `value` with two digits behind the point at most.
pub(crate) fn number(value: f64) -> String {
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!([1.0, 0.5, 10.0, 1.0 / 3.0, -0.001].map(number), ["1", "0.5", "10", "0.33", "0"]);
    }

    #[test]
    fn hostile_names_stay_text() {
        assert_eq!(
            escaped("a<script>\"'&\n\u{1b}[2J\u{202e}\u{ffff}ü"),
            "a&lt;script&gt;&quot;&#39;&amp;\\n\\u{1b}[2J\\u{202e}\u{fffd}ü"
        );
    }

    #[test]
    fn a_long_name_keeps_its_end() {
        assert_eq!(shortened("disk.raw", 8), "disk.raw");
        assert_eq!(shortened("/srv/disk.raw", 9), "…disk.raw");
    }

    #[test]
    fn shares_are_honest_at_their_ends() {
        assert_eq!(percent(0, 10), "0 %");
        assert_eq!(percent(1, 1 << 40), "<0.1 %");
        assert_eq!(percent(1, 16), "6.3 %");
        assert_eq!(percent((1 << 40) - 1, 1 << 40), ">99 %");
        assert_eq!(percent(2, 100), "2 %");
        assert_eq!(percent(5, 5), "100 %");
        assert_eq!(counted(1, "piece"), "1 piece");
        assert_eq!(counted(1_234_567, "piece"), "1 234 567 pieces");
    }
}
