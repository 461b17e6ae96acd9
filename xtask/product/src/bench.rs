//! `cargo xtask bench`: fixed scenarios, side by side with `qemu-img` in one run.
//!
//! Every round times both programs on the same input in an order drawn anew, so that whatever drifts on the
//! machine hits both; what is reported is the median of the rounds' ratios. Targets are removed before and
//! judged after the clock ran: `qemu-img compare` and `check` on both programs' results. The row `checkpoint`
//! has this program without one in `qemu-img`'s place.

mod bitmap;
mod case;
mod check;
mod fio;
mod guest;
mod live;
mod measure;
mod parallel;
mod scenario;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;
use case::Case;
pub(crate) use measure::Measure;
use measure::Usage;
use scenario::Scale;
use serde::Serialize;

use crate::Task;

/// Time fixed scenarios side by side with qemu-img
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Bench {
    #[command(subcommand)]
    other: Option<Other>,
    /// Rounds of each scenario
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Only scenarios whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Small images and one round: says that results are right, nothing about speed
    #[arg(long)]
    smoke: bool,
    /// The blockmirror program to time; by default this very program, which holds the same command
    #[arg(long)]
    program: Option<PathBuf>,
    /// Write every sample as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What else can be timed.
#[derive(clap::Subcommand)]
enum Other {
    Guest(guest::Guest),
    Live(live::Live),
}

/// Both programs' figures of one scenario.
#[derive(Serialize)]
struct Row {
    scenario: String,
    ours: Vec<Usage>,
    peer: Vec<Usage>,
    /// Medians over the rounds of ours / peer.
    wall_ratio: f64,
    cpu_ratio: f64,
}

#[derive(Serialize)]
struct Report {
    rounds: usize,
    smoke: bool,
    rows: Vec<Row>,
    bitmap: Option<bitmap::Figures>,
    parallel: Option<parallel::Throughput>,
}

impl Task for Bench {
    fn run(self) -> Outcome<ExitCode> {
        match self.other {
            Some(Other::Guest(guest)) => return guest.run(),
            Some(Other::Live(live)) => return live.run(),
            None => {}
        }
        let qemu = Qemu::find("cargo xtask bench").ok_or("the peer is qemu-img, which cannot be run")?;
        if cfg!(debug_assertions) && !self.smoke {
            return Err("a build with debug assertions is not worth timing; use `cargo xtask bench`".into());
        }
        let rounds = if self.smoke { 1 } else { self.rounds.max(1) };
        let scale = if self.smoke { Scale::SMOKE } else { Scale::FULL };
        let ours = match &self.program {
            Some(program) => program.clone(),
            None => std::env::current_exe()?,
        };
        let dir = scratch()?;
        let mut report = Report { rounds, smoke: self.smoke, rows: Vec::new(), bitmap: None, parallel: None };
        println!("{}", Row::HEAD);
        let cases = scenario::copies(scale).into_iter().chain(check::checks(scale));
        for case in cases.filter(|case| case.name().contains(&self.only)) {
            let row = side_by_side(&*case, &ours, qemu, rounds, dir.path())
                .map_err(|e| format!("{}: {e}", case.name()))?;
            println!("{}", row.line());
            report.rows.push(row);
        }
        if bitmap::NAME.contains(&self.only) {
            let figures = bitmap::run()?;
            println!("{}", figures.line());
            report.bitmap = Some(figures);
        }
        if parallel::NAME.contains(&self.only) {
            let figures = parallel::run(rounds, self.smoke)?;
            println!("{}", figures.line());
            report.parallel = Some(figures);
        }
        if let Some(path) = &self.json {
            fs::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn side_by_side(case: &dyn Case, ours: &Path, qemu: Qemu, rounds: usize, dir: &Path) -> Outcome<Row> {
    let source = case.make_source(qemu, dir)?;
    let targets = [dir.join("ours"), dir.join("peer")];
    let mut samples = [Vec::new(), Vec::new()];
    let rounds = if rounds > 1 { rounds.max(case.rounds()) } else { rounds };
    for round in 0..rounds {
        let first =
            usize::from(blake3::hash(format!("{} {round}", case.name()).as_bytes()).as_bytes()[0] & 1);
        for which in [first, 1 - first] {
            let target = &targets[which];
            if target.exists() {
                fs::remove_file(target)?;
            }
            let words = if which == 0 {
                case.our_words(ours, &source, target)
            } else {
                case.peer_words(ours, &source, target)
            };
            samples[which].push(measure::measure(&words, dir)?);
        }
    }
    case.judge(qemu, &source, [&targets[0], &targets[1]])?;
    for target in targets.iter().filter(|target| target.exists()) {
        fs::remove_file(target)?;
    }
    fs::remove_file(&source)?;
    let [ours, peer] = samples;
    let ratios = |of: fn(&Usage) -> f64| {
        median(ours.iter().zip(&peer).map(|(a, b)| of(a) / of(b).max(1e-4)).collect())
    };
    let (wall_ratio, cpu_ratio) = (ratios(|u| u.wall), ratios(Usage::cpu));
    Ok(Row { scenario: case.name().to_owned(), wall_ratio, cpu_ratio, ours, peer })
}

impl Row {
    const HEAD: &str =
        "scenario            wall s  qemu-img   ratio    cpu s  qemu-img   ratio  rss MiB  qemu-img";

    fn line(&self) -> String {
        let of = |samples: &[Usage], what: fn(&Usage) -> f64| median(samples.iter().map(what).collect());
        let rss = |u: &Usage| u.peak_rss_kib as f64 / 1024.0;
        format!(
            "{:<18}  {:>6.3}    {:>6.3}  {:>6.2}   {:>6.3}    {:>6.3}  {:>6.2}  {:>7.1}   {:>7.1}",
            self.scenario,
            of(&self.ours, |u| u.wall),
            of(&self.peer, |u| u.wall),
            self.wall_ratio,
            of(&self.ours, Usage::cpu),
            of(&self.peer, Usage::cpu),
            self.cpu_ratio,
            of(&self.ours, rss),
            of(&self.peer, rss),
        )
    }
}

/// The middle value; the mean of the two middle ones of an even number.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(vec![]).is_nan());
    }
}
