//! What one run of a program costs: time, CPU, memory.
//!
//! The kernel adds up what *all* children of a process used, so each run gets a parent of its own: this
//! program started as `cargo xtask measure OUT PROGRAM ARGS..`, which starts the program and reports what its
//! only child used.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use blockmirror_testing::Outcome;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};

use crate::Task;

/// What a program used, start to end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Usage {
    /// Seconds on the clock.
    pub(super) wall: f64,
    /// CPU seconds in the program.
    pub(super) user: f64,
    /// CPU seconds in the kernel for it.
    pub(super) system: f64,
    /// Most memory resident at once, in KiB.
    pub(super) peak_rss_kib: i64,
}

impl Usage {
    /// CPU seconds in total.
    pub(super) fn cpu(&self) -> f64 {
        self.user + self.system
    }
}

/// Runs `words` to its end, quietly, and says what it used. Anything but exit code 0 is an error.
pub(super) fn measure(words: &[OsString], dir: &Path) -> Outcome<Usage> {
    let report = dir.join("usage.json");
    let status = Command::new(std::env::current_exe()?)
        .arg("measure")
        .arg(&report)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()?;
    if !status.success() {
        return Err(format!("{words:?}: {status}").into());
    }
    let usage = serde_json::from_slice(&fs::read(&report)?)?;
    fs::remove_file(&report)?;
    Ok(usage)
}

/// The parent of one measured program
#[derive(clap::Args)]
pub(crate) struct Measure {
    report: PathBuf,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    words: Vec<OsString>,
}

impl Task for Measure {
    fn run(self) -> Outcome<ExitCode> {
        let (program, args) = self.words.split_first().ok_or("no program")?;
        let start = Instant::now();
        let status = Command::new(program).args(args).status()?;
        let wall = start.elapsed().as_secs_f64();
        if !status.success() {
            return Ok(ExitCode::FAILURE);
        }
        let used = getrusage(UsageWho::RUSAGE_CHILDREN)?;
        let seconds = |t: nix::sys::time::TimeVal| t.num_microseconds() as f64 / 1e6;
        let usage = Usage {
            wall,
            user: seconds(used.user_time()),
            system: seconds(used.system_time()),
            peak_rss_kib: used.max_rss(),
        };
        fs::write(&self.report, serde_json::to_vec(&usage)?)?;
        Ok(ExitCode::SUCCESS)
    }
}
