//! Tables, and the jobs as one.

use blockmirror_block::size::human_size;

use super::job::Job;
use crate::failure::one_line;

const HEAD: [&str; 7] = ["JOB", "TYPE", "STATE", "DONE", "OF", "", "LIMIT"];

/// One line a job below a line of names; a line that says so if there is none.
pub(super) fn table(jobs: &[Job]) -> String {
    let rows = jobs.iter().map(|job| {
        let limit = match job.number("speed") {
            Some(0) | None => "-".into(),
            Some(speed) => format!("{}/s", human_size(speed)),
        };
        let mut row = vec![
            one_line(&job.id),
            one_line(job.kind()),
            one_line(job.status()),
            human_size(job.done()),
            human_size(job.total()),
            job.percent(),
            limit,
        ];
        let trouble = job.error().or_else(|| job.stopped_by());
        row.extend(trouble.map(one_line));
        row
    });
    // Sizes and percents end at the same place.
    columns(&HEAD, &[3, 4, 5], rows.collect(), "no jobs")
}

/// A line of names above `rows`, in columns of which those of the indices `right` end at the same place. What
/// a row has besides follows them. Without rows there is a line that says `none`.
pub(super) fn columns(head: &[&str], right: &[usize], rows: Vec<Vec<String>>, none: &str) -> String {
    if rows.is_empty() {
        return format!("{none}\n");
    }
    let head_row = head.iter().copied().map(str::to_owned).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head_row).chain(rows).collect();
    let widths: Vec<_> = (0..head.len())
        .map(|column| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max())
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths.get(column).copied().flatten().unwrap_or(0);
            line += &match right.contains(&column) {
                true => format!("{cell:>width$}  "),
                false => format!("{cell:<width$}  "),
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn job(id: &str, fields: serde_json::Value) -> Job {
        Job { id: id.into(), fields: fields.as_object().cloned().unwrap_or_default() }
    }

    #[test]
    fn columns_fit_and_hostile_names_stay_on_their_line() {
        let jobs = [
            job(
                "mirror0",
                json!({"type": "mirror", "status": "running", "current-progress": 511 << 20,
                       "total-progress": 1 << 30, "speed": 52_428_800, "io-status": "ok"}),
            ),
            job(
                "m\n\u{1b}[2J",
                json!({"type": "mirror", "status": "paused", "current-progress": 0, "total-progress": 0,
                       "speed": 0, "io-status": "nospace"}),
            ),
            job(
                "create",
                json!({"type": "create", "status": "concluded", "current-progress": 0, "total-progress": 1,
                       "error": "Cluster size\ttoo odd"}),
            ),
        ];
        let want = "\
JOB           TYPE    STATE         DONE     OF           LIMIT
mirror0       mirror  running    511 MiB  1 GiB   49.9 %  50 MiB/s
m\\n\\u{1b}[2J  mirror  paused         0 B    0 B  100.0 %  -         no space left
create        create  concluded      0 B    1 B    0.0 %  -         Cluster size\\ttoo odd
";
        assert_eq!(table(&jobs), want);
        assert_eq!(table(&[]), "no jobs\n");
    }
}
