//! JSON as `qemu-img` prints it, so that the two outputs can be compared by `diff`.

use std::fmt::Write;

use serde_json::Value;

/// `value` over many lines: four spaces a level, and empty arrays and objects over two lines.
pub(crate) fn pretty(value: &Value) -> String {
    let mut out = String::new();
    write_pretty(value, 0, &mut out);
    out
}

fn write_pretty(value: &Value, level: usize, out: &mut String) {
    let indent = |level: usize| "    ".repeat(level);
    match value {
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i == 0 { "\n" } else { ",\n" });
                out.push_str(&indent(level + 1));
                write_pretty(item, level + 1, out);
            }
            let _ = write!(out, "\n{}]", indent(level));
        }
        Value::Object(members) => {
            out.push('{');
            for (i, (key, item)) in members.iter().enumerate() {
                out.push_str(if i == 0 { "\n" } else { ",\n" });
                let _ = write!(out, "{}{}: ", indent(level + 1), Value::from(key.as_str()));
                write_pretty(item, level + 1, out);
            }
            let _ = write!(out, "\n{}}}", indent(level));
        }
        plain => {
            let _ = write!(out, "{plain}");
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn many_lines_look_like_qemu_img() {
        let value = json!({ "children": [], "data": {}, "list": [1, "a\n"] });
        let want = "{\n    \"children\": [\n    ],\n    \"data\": {\n    },\n    \"list\": [\n        1,\n        \"a\\n\"\n    ]\n}";
        assert_eq!(pretty(&value), want);
    }
}
