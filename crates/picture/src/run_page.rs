//! The page about a run: how it ended, its rate, what was left and what happened, over time.

use std::time::Duration;

use blockmirror_block::size::human_size;

use crate::chart::{Line, PictureError, TimeAxis, Unit, chart};
use crate::page::{Mood, Page};
use crate::plan::duration;
use crate::run::{Ending, RunReport, Sample};
use crate::style::Color;
use crate::text::counted;

impl RunReport<'_> {
    /// The page.
    ///
    /// # Errors
    /// A chart cannot be drawn.
    pub fn page(&self) -> Result<String, PictureError> {
        page(self)
    }
}

fn page(report: &RunReport<'_>) -> Result<String, PictureError> {
    let samples = report.record.samples();
    let mood = match report.ending {
        Ending::Completed => Mood::Good,
        Ending::Running => Mood::Plain,
        Ending::Incomplete | Ending::Failed | Ending::Interrupted => Mood::Bad,
    };
    let mut page = Page::new(&sentence(report, &samples), mood);
    page.subtitle(report.subject);
    if let Some(message) = report.message {
        page.paragraph(message);
    }
    let time = TimeAxis::to(report.elapsed);
    let marks: Vec<_> = report.record.events().iter().map(|(at, _)| at.as_secs_f64()).collect();
    charts(&mut page, &samples, time, &marks)?;
    events(&mut page, report);
    let facts: Vec<_> =
        report.facts.iter().map(|(name, value)| vec![(*name).to_owned(), value.clone()]).collect();
    if !facts.is_empty() {
        page.heading("Figures");
        page.text_table(&["", ""], &facts);
    }
    Ok(page.finish())
}

/// What the page says, in a sentence.
fn sentence(report: &RunReport<'_>, samples: &[Sample]) -> String {
    let time = duration(report.elapsed);
    let last = samples.last().copied().unwrap_or_default();
    let seconds = report.elapsed.as_secs_f64();
    let what = capitalised(report.command);
    let left = human_size(last.left);
    match report.ending {
        Ending::Completed if seconds > 0.0 && last.done > 0 => {
            let rate = human_size((last.done as f64 / seconds) as u64);
            format!("{what} completed in {time}: {} at {rate}/s", human_size(last.done))
        }
        Ending::Completed => format!("{what} completed in {time}: nothing had to be copied"),
        Ending::Incomplete => format!("{what} ended after {time}, and not all is copied as it should be"),
        Ending::Failed => format!("{what} failed after {time} with {left} left"),
        Ending::Interrupted => format!("{what} interrupted after {time} with {left} left"),
        Ending::Running => format!("{what} was still running after {time} with {left} left"),
    }
}

fn capitalised(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

fn charts(page: &mut Page, samples: &[Sample], time: TimeAxis, marks: &[f64]) -> Result<(), PictureError> {
    let mut rates = vec![Line { name: "copied", color: Color::Data, points: rates(samples), filled: true }];
    let dirty = series(samples, |sample| sample.dirty_rate.map(|rate| rate as f64));
    if !dirty.is_empty() {
        rates.push(Line {
            name: "written by the guest",
            color: Color::Compressed,
            points: dirty,
            filled: false,
        });
    }
    page.heading("Rate");
    page.figure(&chart(Unit::BytesPerSecond, time, &rates, marks)?, &caption(&rates, marks));
    let points = series(samples, |sample| Some(sample.left as f64));
    let left = [Line { name: "left", color: Color::Backing, points, filled: true }];
    page.heading("Left to do");
    page.figure(
        &chart(Unit::Bytes, time, &left, marks)?,
        "What the scan of the source has not reached is estimated by what it has.",
    );
    Ok(())
}

/// What colours and marks mean.
fn caption(lines: &[Line], marks: &[f64]) -> String {
    let named = |line: &Line| match line.color {
        Color::Data => format!("Blue: {}", line.name),
        _ => format!("orange: {}", line.name),
    };
    let mut text = lines.iter().map(named).collect::<Vec<_>>().join("; ");
    if !marks.is_empty() {
        text.push_str("; numbered lines: events, listed below");
    }
    text + "."
}

/// Points of a rate at most, but for the last one: what lies closer is noise.
const RATES: f64 = 100.0;

/// A rate is one over this many seconds at least.
const RATE_SPAN: f64 = 0.2;

/// Bytes per second, each over a span of the run.
fn rates(samples: &[Sample]) -> Vec<(f64, f64)> {
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else { return Vec::new() };
    let span = (last.at.as_secs_f64() / RATES).max(RATE_SPAN);
    let mut points = Vec::new();
    let mut from = *first;
    for sample in samples {
        let seconds = sample.at.saturating_sub(from.at).as_secs_f64();
        // A run that is shorter than a span has one rate.
        let is_last = sample.at == last.at && points.is_empty();
        if seconds >= span || is_last && seconds > 0.0 {
            let rate = sample.done.saturating_sub(from.done) as f64 / seconds;
            points.push((sample.at.as_secs_f64(), rate));
            from = *sample;
        }
    }
    // The first rate is that from the start on.
    if let Some((_, rate)) = points.first().copied() {
        points.insert(0, (first.at.as_secs_f64(), rate));
    }
    points
}

fn series(samples: &[Sample], value: impl Fn(&Sample) -> Option<f64>) -> Vec<(f64, f64)> {
    samples.iter().filter_map(|sample| Some((sample.at.as_secs_f64(), value(sample)?))).collect()
}

fn events(page: &mut Page, report: &RunReport<'_>) {
    let events = report.record.events();
    if events.is_empty() {
        return;
    }
    page.heading("Events");
    let seconds = |at: &Duration| format!("{:.2} s", at.as_secs_f64());
    let rows = (1..).zip(events).map(|(number, (at, what))| {
        let number: u64 = number;
        vec![number.to_string(), seconds(at), what.clone()]
    });
    page.text_table(&["", "after", "event"], &rows.collect::<Vec<_>>());
    if report.record.more_events() > 0 {
        page.paragraph(&format!("{} are not listed.", counted(report.record.more_events(), "more event")));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;
    use crate::RunRecord;

    fn run(ending: Ending, message: Option<&str>) -> String {
        let mut record = RunRecord::new();
        for tick in 0..=40 {
            record.sample(Sample {
                at: Duration::from_millis(tick * 50),
                done: tick << 20,
                left: (40 - tick) << 20,
                dirty_rate: Some(1 << 20),
            });
        }
        record.event(Duration::from_secs(1), "a <b> & \n c");
        let facts = [("granularity", "64 KiB".to_owned())];
        RunReport {
            command: "copy",
            subject: "<script> & t",
            ending,
            message,
            elapsed: Duration::from_secs(2),
            facts: &facts,
            record: &record,
        }
        .page()
        .unwrap()
    }

    #[test]
    fn a_page_is_drawn_whole() {
        insta::assert_snapshot!(run(Ending::Completed, None));
    }

    #[test]
    fn the_end_is_in_the_heading() {
        let heading = |ending, message| {
            let page = run(ending, message);
            let heading = page.split("<h1 class=").nth(1).unwrap().split("</h1>").next().unwrap();
            heading.replace('\u{a0}', " ")
        };
        assert_eq!(heading(Ending::Completed, None), "\"good\">Copy completed in 2 s: 40 MiB at 20 MiB/s");
        assert_eq!(heading(Ending::Failed, Some("why")), "\"bad\">Copy failed after 2 s with 0 B left");
        assert!(run(Ending::Failed, Some("a<b")).contains("<p>a&lt;b</p>"));
        assert!(heading(Ending::Interrupted, None).contains("interrupted after 2 s"));
        assert!(run(Ending::Running, None).contains("<h1>Copy was still running after"));
        assert!(heading(Ending::Incomplete, None).contains("ended after 2 s"));
    }

    /// A colour that the style sheet does not know stays light on a dark page.
    #[test]
    fn charts_have_colours_of_the_palette_alone() {
        let page = run(Ending::Completed, None);
        let body = page.split("</style>").nth(1).unwrap();
        let style = crate::style::of_drawing();
        for attribute in ["fill=\"#", "stroke=\"#"] {
            for part in body.split(attribute).skip(1) {
                let color = &part[..6];
                assert!(style.contains(&format!("{attribute}{color}\"")), "{attribute}{color}");
            }
        }
    }

    #[test]
    fn a_run_without_samples_has_a_page() {
        let record = RunRecord::default();
        let report = RunReport {
            command: "copy",
            subject: "a",
            ending: Ending::Failed,
            message: None,
            elapsed: Duration::ZERO,
            facts: &[],
            record: &record,
        };
        assert!(report.page().unwrap().contains("Copy failed after"));
    }

    #[test]
    fn rates_are_those_between_samples() {
        let sample = |seconds, done| Sample { at: Duration::from_secs(seconds), done, ..Sample::default() };
        let rates = rates(&[sample(0, 0), sample(1, 100), sample(3, 200)]);
        assert_eq!(rates, [(0.0, 100.0), (1.0, 100.0), (3.0, 50.0)]);
    }
}
