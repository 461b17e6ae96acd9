//! `watch`: a line for each job, drawn again and again until all have ended.
//!
//! On a terminal the lines are drawn over; elsewhere a line is printed when it says something new, once a
//! second at most but for another state. With `--json` each line is an object ([`super::objects`]).

use std::path::Path;
use std::time::{Duration, Instant};

use blockmirror_block::size::human_size;
use blockmirror_qmp::Client;
use rustix::termios::tcgetwinsize;

use super::end::{End, Follow, next};
use super::job::{Job, list};
use super::objects::Objects;
use super::pick;
use super::rates::{Outlook, Pace, Rates};
use super::report::JobLog;
use crate::args::WatchArgs;
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;

/// How often figures are asked for.
pub(super) const ON_TERMINAL: Duration = Duration::from_millis(500);
const ELSEWHERE: Duration = Duration::from_secs(1);

pub(super) fn watch(
    console: &mut Console<'_>,
    client: &mut Client,
    socket: &Path,
    args: &WatchArgs,
) -> Outcome {
    // Errors are objects then, too.
    console.as_json |= args.json;
    let interrupt = Interrupt::watch()?;
    let jobs = list(client)?;
    let names = &args.jobs.jobs;
    let jobs = if names.is_empty() { jobs } else { pick(jobs, names)? };
    if jobs.is_empty() {
        console.note("there are no jobs");
        return Ok(Exit::Done);
    }
    let mut following: Vec<_> = jobs.into_iter().map(Follow::new).collect();
    let report = args.report.as_deref();
    let mut log = report.map(|path| JobLog::begin(path, following.len(), &interrupt)).transpose()?;
    let outcome = look(console, client, args, &mut following, &interrupt, log.as_mut());
    match (log, following.first()) {
        (Some(log), Some(follow)) => log.finish(console, socket, follow, outcome),
        _ => outcome,
    }
}

/// Shows the jobs until all of them are over.
fn look(
    console: &mut Console<'_>,
    client: &mut Client,
    args: &WatchArgs,
    following: &mut [Follow],
    interrupt: &Interrupt,
    mut log: Option<&mut JobLog>,
) -> Outcome {
    let mut view = View::new(console, args.json, following.len());
    let start = Instant::now();
    loop {
        if let (Some(log), Some(follow)) = (&mut log, following.first()) {
            log.take(follow);
        }
        view.show(console, following, start.elapsed())?;
        if following.iter().all(|follow| follow.over) {
            let good = following.iter().all(|follow| follow.end == Some(End::Completed));
            return Ok(if good { Exit::Done } else { Exit::Failed });
        }
        next(client, following, view.interval(), interrupt).map_err(|failure| match failure.exit {
            // Interrupting a view needs no message.
            Exit::Signal(_) => Failure { message: None, ..failure },
            _ => failure,
        })?;
    }
}

/// How the jobs are shown, and what was shown of each.
enum View {
    /// Lines that are drawn over.
    Drawn(Vec<Shown>, usize),
    /// Lines that follow each other.
    Printed(Vec<Shown>),
    /// Objects.
    Json(Vec<Objects>),
}

impl View {
    fn new(console: &Console<'_>, json: bool, jobs: usize) -> Self {
        let shown = || (0..jobs).map(|_| Shown::default()).collect();
        match (json, console.out_is_terminal) {
            (true, _) => Self::Json((0..jobs).map(|_| Objects::default()).collect()),
            (false, true) => Self::Drawn(shown(), 0),
            (false, false) => Self::Printed(shown()),
        }
    }

    fn interval(&self) -> Duration {
        match self {
            Self::Drawn(..) => ON_TERMINAL,
            Self::Printed(_) | Self::Json(_) => ELSEWHERE,
        }
    }

    fn show(&mut self, console: &mut Console<'_>, following: &[Follow], now: Duration) -> Outcome<()> {
        match self {
            Self::Drawn(shown, drawn) => {
                let lines = following.iter().zip(shown).map(|(follow, shown)| shown.line(follow, now).0);
                let lines: Vec<_> = lines.collect();
                draw(console, &lines.iter().map(String::as_str).collect::<Vec<_>>(), *drawn)?;
                *drawn = lines.len();
            }
            Self::Printed(shown) => {
                for (follow, shown) in following.iter().zip(shown) {
                    if let (line, true) = shown.line(follow, now) {
                        console.print(&format!("{line}\n"))?;
                    }
                }
            }
            Self::Json(objects) => {
                for (follow, objects) in following.iter().zip(objects) {
                    objects.next(follow, now).map_or(Ok(()), |line| console.print(&line))?;
                }
            }
        }
        Ok(())
    }
}

/// What was last shown of a job.
#[derive(Default)]
pub(super) struct Shown {
    rates: Rates,
    line: String,
}

impl Shown {
    /// The line of a job, and whether it says something new.
    pub(super) fn line(&mut self, follow: &Follow, now: Duration) -> (String, bool) {
        let line = match follow.end {
            Some(_) => follow.verdict(),
            None => line(&follow.job, self.rates.pace(&follow.job, now)),
        };
        let line = one_line(&line);
        let new = line != self.line;
        self.line.clone_from(&line);
        (line, new)
    }
}

/// Draws `lines` over the last `drawn` ones.
pub(super) fn draw(console: &mut Console<'_>, lines: &[&str], drawn: usize) -> Outcome<()> {
    let columns = tcgetwinsize(std::io::stdout()).map_or(0, |size| usize::from(size.ws_col));
    let mut text = String::new();
    if drawn > 0 {
        text += &format!("\u{1b}[{drawn}A");
    }
    for line in lines {
        // One that is longer than the terminal is wide would be two lines, and the next drawing would miss.
        let fitting = if columns > 0 { columns } else { usize::MAX };
        text.extend(line.chars().take(fitting));
        text += "\u{1b}[K\n";
    }
    console.print(&text)
}

/// Where a job stands.
fn line(job: &Job, pace: Pace) -> String {
    let rate = |rate: Option<u64>| rate.map_or("-".to_owned(), |rate| format!("{}/s", human_size(rate)));
    let outlook = match (job.stopped_by(), job.is_paused(), job.status(), pace.outlook) {
        (Some(why), true, ..) => format!("stopped: {why}; `resume` continues it"),
        (_, true, ..) => "paused".into(),
        (_, _, "pending", _) if job.flag("auto-finalize") == Some(false) => "waits for job-finalize".into(),
        (_, _, _, Outlook::Unknown) => "-".into(),
        (_, _, _, Outlook::Equal) => "nothing left".into(),
        (_, _, _, Outlook::NotConverging) => "not converging".into(),
        (_, _, _, Outlook::In(time)) => format!("ETA {}", clock(time)),
    };
    let through = match job.flag("writes-through") {
        Some(true) => ", writes go to both",
        _ => "",
    };
    format!(
        "{}: {:<8} {:>7}  copy {:>10}  guest {:>10}  left {:>8}  {outlook}{through}",
        job.id,
        job.status(),
        job.percent(),
        rate(pace.copied),
        rate(pace.written),
        human_size(job.left()),
    )
}

/// Hours, minutes and seconds; a part of a second counts as one.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0));
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match hours {
        0 => format!("{minutes}:{seconds:02}"),
        1..=999 => format!("{hours}:{minutes:02}:{seconds:02}"),
        _ => "in weeks".into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn job(fields: serde_json::Value) -> Job {
        Job { id: "mirror0".into(), fields: fields.as_object().cloned().unwrap_or_default() }
    }

    #[test]
    fn a_line_tells_state_rates_and_outlook() {
        let fields = |status: &str, done: u64, total: u64| json!({"status": status, "current-progress": done, "total-progress": total, "io-status": "ok"});
        let pace = |outlook| Pace { copied: Some(120 << 20), written: Some(10 << 20), outlook };
        let mut pending = job(fields("pending", 1 << 30, 1 << 30));
        pending.fields.insert("auto-finalize".into(), false.into());
        let text = [
            line(&job(fields("running", 1 << 29, 1 << 30)), pace(Outlook::In(Duration::from_millis(4655)))),
            line(&job(fields("running", (1 << 40) - 1, 1 << 40)), pace(Outlook::NotConverging)),
            line(&job(fields("ready", 1 << 30, 1 << 30)), pace(Outlook::Equal)),
            line(&job(fields("paused", 0, 1 << 30)), Pace::default()),
            line(&pending, Pace::default()),
        ];
        let want = "\
mirror0: running   50.0 %  copy  120 MiB/s  guest   10 MiB/s  left  512 MiB  ETA 0:05
mirror0: running   99.9 %  copy  120 MiB/s  guest   10 MiB/s  left      1 B  not converging
mirror0: ready    100.0 %  copy  120 MiB/s  guest   10 MiB/s  left      0 B  nothing left
mirror0: paused     0.0 %  copy          -  guest          -  left    1 GiB  paused
mirror0: pending  100.0 %  copy          -  guest          -  left      0 B  waits for job-finalize";
        assert_eq!(text.join("\n"), want);
        let mut stopped = job(fields("paused", 0, 1 << 30));
        stopped.fields.insert("io-status".into(), "nospace".into());
        assert!(line(&stopped, Pace::default()).ends_with("  stopped: no space left; `resume` continues it"));
        let mut through = job(fields("running", 0, 1 << 30));
        through.fields.insert("writes-through".into(), true.into());
        assert!(line(&through, Pace::default()).ends_with("  -, writes go to both"));
    }

    #[test]
    fn a_clock_has_no_zero_hours() {
        for (seconds, text) in [(0, "0:00"), (59, "0:59"), (3600, "1:00:00"), (u64::MAX, "in weeks")] {
            assert_eq!(clock(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn only_news_are_printed() {
        let mut shown = Shown::default();
        let mut follow =
            Follow::new(job(json!({"status": "ready", "current-progress": 1, "total-progress": 1})));
        assert!(shown.line(&follow, Duration::ZERO).1);
        assert!(shown.line(&follow, Duration::from_secs(1)).1, "there are rates now");
        assert!(!shown.line(&follow, Duration::from_secs(2)).1);
        follow.end = Some(End::Failed("x\ny".into()));
        assert_eq!(shown.line(&follow, Duration::from_secs(3)), ("mirror0: failed: x\\ny".into(), true));
    }
}
