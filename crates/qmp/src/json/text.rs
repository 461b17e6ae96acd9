//! Values to text, spelled as QEMU spells them: `{"a": 1, "b": [true, null]}`, ASCII only, doubles with
//! seventeen digits. Scripts compare such lines.

use serde_json::{Number, Value};

/// `value` as text.
///
/// ```
/// let value = serde_json::json!({"id": 0.5, "name": "é\n"});
/// assert_eq!(blockmirror_qmp::json::to_string(&value), r#"{"id": 0.5, "name": "\u00E9\n"}"#);
/// ```
pub fn to_string(value: &Value) -> String {
    let mut out = String::new();
    write(&mut out, value);
    out
}

/// Appends `value` to `out`.
pub fn write(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(n) => number(out, n),
        Value::String(s) => string(out, s),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write(out, item);
            }
            out.push(']');
        }
        Value::Object(members) => {
            out.push('{');
            for (i, (key, member)) in members.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                string(out, key);
                out.push_str(": ");
                write(out, member);
            }
            out.push('}');
        }
    }
}

fn string(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04X}"));
                }
            }
        }
    }
    out.push('"');
}

fn number(out: &mut String, n: &Number) {
    match n.as_f64() {
        Some(double) if n.is_f64() => out.push_str(&general17(double)),
        _ => out.push_str(&n.to_string()),
    }
}

/// C's `%.17g`: seventeen significant digits without trailing zeros, with an exponent if that is below -4 or
/// above 16.
fn general17(double: f64) -> String {
    let scientific = format!("{double:.16e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    let Ok(exponent) = exponent.parse::<i32>() else { return scientific };
    if !(-4..17).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{}e{sign}{:02}", trimmed(digits), exponent.unsigned_abs());
    }
    // 17 significant digits leave this many behind the point.
    let decimals = usize::try_from(16 - exponent).unwrap_or(0);
    trimmed(&format!("{double:.decimals$}")).into()
}

fn trimmed(digits: &str) -> &str {
    if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_are_spelled_as_qemu_spells_them() {
        // Each pair is what qemu-storage-daemon 10.0 echoes as an id.
        for (double, text) in [
            (1.0, "1"),
            (1e3, "1000"),
            (0.1, "0.10000000000000001"),
            (-0.0, "-0"),
            (1.234_567_890_123_456_8e29, "1.2345678901234568e+29"),
            (1e-300, "1e-300"),
            (1e22, "1e+22"),
            (std::f64::consts::PI, "3.1415926535897931"),
            (18_446_744_073_709_551_616.0, "1.8446744073709552e+19"),
            (-9.223_372_036_854_776e18, "-9.2233720368547758e+18"),
        ] {
            assert_eq!(to_string(&serde_json::json!(double)), text);
        }
    }

    #[test]
    fn text_is_ascii() {
        assert_eq!(to_string(&"😀é\u{7f}\u{1}\"\\/".into()), r#""\uD83D\uDE00\u00E9\u007F\u0001\"\\/""#);
    }
}
