//! Output without what differs from run to run: space on the host, dates, steps of progress.

use serde_json::Value;

/// `text` made steady; JSON by its fields, anything else by its lines.
pub(crate) fn steady(text: &str) -> String {
    if let Ok(value) = serde_json::from_str::<Value>(text) {
        return steady_json(value).to_string();
    }
    let text = without_progress(text);
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("disk size:"));
    let lines = lines.filter(|line| !line.trim_start().starts_with("file length:"));
    lines.map(|line| without_time(line) + "\n").collect()
}

/// Without the space that files take and the dates of snapshots.
pub(crate) fn steady_json(value: Value) -> Value {
    const UNSTEADY: [&str; 4] = ["actual-size", "date-sec", "date-nsec", "children"];
    match value {
        Value::Object(members) => members
            .into_iter()
            .filter(|(key, _)| !UNSTEADY.contains(&key.as_str()))
            .map(|(key, value)| (key, steady_json(value)))
            .collect(),
        Value::Array(values) => values.into_iter().map(steady_json).collect(),
        other => other,
    }
}

/// Without `    (12.34/100%)` and its carriage return, and the end of that line.
fn without_progress(text: &str) -> String {
    let Some(end) = text.rfind("/100%)\r") else { return text.to_owned() };
    let start = text.find("    (").unwrap_or(0);
    let rest = &text[end + "/100%)\r".len()..];
    format!("{}{}", &text[..start], rest.trim_matches('\n'))
}

/// A line with its date, if it has one, as zeros.
fn without_time(line: &str) -> String {
    let is_date = |word: &str| word.len() == 10 && word.matches('-').count() == 2;
    let is_time = |word: &str| word.len() == 8 && word.matches(':').count() == 2;
    let mut out = line.to_owned();
    for word in line.split(' ').filter(|word| is_date(word) || is_time(word)) {
        out = out.replace(word, &"0".repeat(word.len()));
    }
    out
}
