//! `cargo xtask bench live`: a guest writes as fast as it can while its disk is mirrored.
//!
//! For each mode and granularity: does the job become ready, what is left of the guest's speed until then,
//! how long do its writes take, how much is copied again for what it writes. In each row the guest runs alone
//! and with the job in turns, and is compared with itself: what else goes on on the machine hits both. The
//! library runs in this process; a daemon (QEMU's, and any other that takes its arguments) is reached over
//! NBD, which costs guest and job alike.

pub(super) mod daemon;
mod guest;
mod library;
mod nbd;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::WriteFlags;
use blockmirror_image::{CreateSettings, CreateSpec, Format, NewImage, OpenOptions};
use blockmirror_mirror::CopyMode;
use blockmirror_testing::Outcome;
use blockmirror_testing::content::noise;
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;
use daemon::{Daemon, Program};
use guest::{Sample, Writer};
use serde::Serialize;

use super::median;

/// Time a guest that writes while its disk is mirrored
#[derive(clap::Args)]
pub(crate) struct Live {
    /// Rounds of each row, each the guest alone and the guest with the job
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Length of the disk in MiB
    #[arg(long, default_value_t = 1024)]
    mib: u64,
    /// Threads of the guest, each with one write of 4 KiB under way
    #[arg(long, default_value_t = 16)]
    depth: usize,
    /// Seconds after which a job that is not ready is given up
    #[arg(long, default_value_t = 10)]
    cap: u64,
    /// Only rows whose line contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Other programs that take qemu-storage-daemon's arguments
    #[arg(long)]
    daemon: Vec<PathBuf>,
    /// The folder for the images; by default in memory
    #[arg(long)]
    dir: Option<PathBuf>,
    /// A small disk and one round: says that it runs, nothing about speed
    #[arg(long)]
    smoke: bool,
    /// Write the rows as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Background,
    WriteBlocking,
    Auto,
}

const ALL_MODES: [Mode; 3] = [Mode::Background, Mode::WriteBlocking, Mode::Auto];

impl From<Mode> for CopyMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Background => Self::Background,
            Mode::WriteBlocking => Self::WriteBlocking,
            Mode::Auto => Self::Auto,
        }
    }
}

/// What job is wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    pub(super) mode: Mode,
    pub(super) granularity: u64,
    /// Bytes per second; 0 is no limit.
    pub(super) speed: u64,
    /// The job keeps a log; for our daemon only.
    pub(super) log: bool,
}

/// Where a job stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct State {
    pub(super) ready: bool,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Something that holds the disk and can mirror it.
pub(super) trait Subject {
    /// A way for one thread of the guest.
    fn writer(&self) -> Outcome<Box<dyn Writer>>;
    fn modes(&self) -> &'static [Mode];
    /// Starts a mirror onto a new image.
    fn start(&mut self, ask: Ask) -> Outcome;
    fn state(&mut self) -> Outcome<State>;
    /// Gives the job up, and removes its target.
    fn stop(&mut self) -> Outcome;
}

pub(super) const GRANULARITIES: [u64; 4] = [4 << 10, 64 << 10, 1 << 20, 64 << 20];
/// How long the guest runs alone.
const ALONE: Duration = Duration::from_millis(1000);

#[derive(Serialize)]
struct Row {
    name: String,
    /// Rounds in which the job became ready, of all.
    ready: usize,
    rounds: usize,
    /// Seconds to READY, or until it was given up; the median, as all that follow.
    seconds: f64,
    /// Writes per second with the job, by those without it.
    speed: f64,
    /// Microseconds: half of the writes, and 99 of 100; without the job and with it.
    alone: [f64; 2],
    mirrored: [f64; 2],
    /// Bytes that the job copied or has yet to copy again, by those that the guest wrote.
    again: f64,
}

impl Row {
    const HEAD: &str = "row                                      ready   after s   guest    p50 us            p99 us           again";

    fn line(&self) -> String {
        format!(
            "{:<40} {:>3}/{}   {:>7.2}   {:>4.0} %   {:>6.1} -> {:>6.1}  {:>6.0} -> {:>6.0}   {:>6.2}",
            self.name,
            self.ready,
            self.rounds,
            self.seconds,
            self.speed * 100.0,
            self.alone[0],
            self.mirrored[0],
            self.alone[1],
            self.mirrored[1],
            self.again,
        )
    }
}

impl Live {
    pub(super) fn run(mut self) -> Outcome<ExitCode> {
        if cfg!(debug_assertions) && !self.smoke {
            return Err("a build with debug assertions is not worth timing; use `cargo xtask bench`".into());
        }
        if self.smoke {
            (self.rounds, self.mib, self.cap) = (1, 32, 2);
        }
        let dir = match &self.dir {
            None => scratch()?,
            Some(dir) => tempfile::Builder::new().prefix("blockmirror-").tempdir_in(dir)?,
        };
        let source = dir.path().join("source.qcow2");
        let len = self.mib << 20;
        make_source(&source, len)?;
        println!("{}", Row::HEAD);
        let mut rows = Vec::new();
        self.rows("library", library::Library::open(&source, dir.path())?, &mut rows)?;
        if let Some(qemu) = Qemu::find("cargo xtask bench live") {
            let mut programs = vec![Program::ours()?, Program::qemu()];
            programs.extend(self.daemon.iter().map(|path| Program::other(path)));
            for program in programs {
                let daemon = Daemon::start(&program, qemu, &source, len, dir.path())?;
                self.rows(&program.name, daemon, &mut rows)?;
            }
        }
        if let Some(path) = &self.json {
            std::fs::write(path, serde_json::to_string_pretty(&rows)? + "\n")?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn rows(&self, name: &str, mut subject: impl Subject, rows: &mut Vec<Row>) -> Outcome {
        for &mode in subject.modes() {
            for granularity in GRANULARITIES {
                let name = format!("{name} {mode:?} {} KiB", granularity >> 10);
                if !name.contains(&self.only) {
                    continue;
                }
                let row = self.row(&name, &mut subject, Ask { mode, granularity, speed: 0, log: false });
                let row = row.map_err(|e| format!("{name}: {e}"))?;
                println!("{}", row.line());
                rows.push(row);
            }
        }
        Ok(())
    }

    fn row(&self, name: &str, subject: &mut dyn Subject, ask: Ask) -> Outcome<Row> {
        let (mut alone, mut with, mut figures) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..self.rounds as u64 {
            alone.push(guest::run_for(ALONE, self.writers(subject)?, self.mib << 20, 2 * round)?);
            let (sample, state, seconds) = self.mirrored(subject, ask, 2 * round + 1)?;
            figures.push((state, seconds));
            with.push(sample);
        }
        let of =
            |samples: &[Sample], what: &dyn Fn(&Sample) -> f64| median(samples.iter().map(what).collect());
        let latencies =
            |samples: &[Sample]| [0.5, 0.99].map(|part| of(samples, &|sample| sample.percentile(part)));
        let again = |(state, sample): (&State, &Sample)| {
            state.len.saturating_sub(self.mib << 20) as f64 / sample.bytes().max(1) as f64
        };
        let states = figures.iter().map(|(state, _)| state);
        Ok(Row {
            name: name.to_owned(),
            ready: states.clone().filter(|state| state.ready).count(),
            rounds: self.rounds,
            seconds: median(figures.iter().map(|(_, seconds)| *seconds).collect()),
            speed: median(with.iter().zip(&alone).map(|(with, alone)| with.rate() / alone.rate()).collect()),
            alone: latencies(&alone),
            mirrored: latencies(&with),
            again: median(states.zip(&with).map(again).collect()),
        })
    }

    fn writers(&self, subject: &dyn Subject) -> Outcome<Vec<Box<dyn Writer>>> {
        (0..self.depth.max(1)).map(|_| subject.writer()).collect()
    }

    /// The guest from the start of a job until it is ready, or given up.
    fn mirrored(&self, subject: &mut dyn Subject, ask: Ask, seed: u64) -> Outcome<(Sample, State, f64)> {
        let writers = self.writers(subject)?;
        let cap = Duration::from_secs(self.cap);
        let last = Cell::new((State { ready: false, offset: 0, len: 0 }, 0.0));
        let sample = guest::run(writers, self.mib << 20, seed, || {
            subject.start(ask)?;
            let start = Instant::now();
            loop {
                let state = subject.state()?;
                last.set((state, start.elapsed().as_secs_f64()));
                if state.ready || start.elapsed() > cap {
                    return Ok(());
                }
                thread::sleep(Duration::from_millis(5));
            }
        })?;
        let (state, seconds) = last.get();
        subject.stop()?;
        if state.offset == 0 {
            return Err("nothing was copied".into());
        }
        Ok((sample, state, seconds))
    }
}

/// A qcow2 image in which every cluster holds bytes that do not repeat.
pub(super) fn make_source(path: &Path, len: u64) -> Outcome {
    NewImage::create(path, &CreateSpec::new(Format::Qcow2, len, CreateSettings::default()))?.persist()?;
    let image = OpenOptions::new().format(Format::Qcow2).writable(true).open(path)?;
    let mut piece = vec![0; 1 << 20];
    noise(&mut piece, 1);
    for at in (0..len).step_by(piece.len()) {
        piece[..8].copy_from_slice(&at.to_be_bytes());
        image.device().write_at(&piece, at, WriteFlags::NONE)?;
    }
    Ok(image.device().flush()?)
}
