//! `cargo xtask bench guest`: what a mirror job leaves of its guest's disk, side by side with
//! `qemu-storage-daemon`; and what a log costs, side by side with the same job without one.
//!
//! The same fio writes 4 KiB at random over NBD to our daemon and to QEMU's in turns, each freshly started on
//! the same image, while it mirrors to a new qcow2 image. Three stretches of a job are looked at: the copy of
//! the bulk as fast as it goes, the same under a speed limit, and a job that is ready. A stretch ends when
//! the job gets ready: counted further, a program that kept the guest from writing while it copied would hide
//! that behind all the quick writes that come afterwards. What is reported is the median over the rounds of
//! each, and of the rounds' ratios.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;
use serde::Serialize;

use super::fio::{Fio, Writes};
use super::live::daemon::{Daemon, Program};
use super::live::{Ask, GRANULARITIES, Mode, Subject, make_source};
use super::median;

/// Time a guest's writes during a mirror, side by side with qemu-storage-daemon
#[derive(clap::Args)]
pub(crate) struct Guest {
    /// Rounds of each row
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of the disk in MiB; a quarter of that where the job is ready
    #[arg(long, default_value_t = 4096)]
    mib: u64,
    /// Milliseconds that the guest's writes are counted for at most
    #[arg(long, default_value_t = 2000)]
    millis: u64,
    /// The speed limit in MB per second
    #[arg(long, default_value_t = 200)]
    speed: u64,
    /// Only rows whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Our program to time, as a path; by default this very one, which holds the same daemon
    #[arg(long)]
    program: Option<PathBuf>,
    /// The program beside it
    #[arg(long)]
    peer: Option<PathBuf>,
    /// The folder for the images; by default in memory
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Write every sample as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stretch {
    /// No job.
    Alone,
    /// From the start of a job without a speed limit.
    Bulk,
    /// From the start of a job with one.
    Limited,
    /// The job is ready before the guest begins.
    Ready,
}

/// What is measured in one row.
#[derive(Clone, Copy, Debug)]
struct Scene {
    stretch: Stretch,
    mode: Mode,
    granularity: u64,
    /// Ours keeps a log, and beside it is ours without one.
    log: bool,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Sample {
    writes: Writes,
    /// Seconds from the start of the job until it was ready, if it was while the guest wrote.
    ready: Option<f64>,
}

#[derive(Serialize)]
struct Row {
    name: String,
    ours: Vec<Sample>,
    peer: Vec<Sample>,
}

/// Before its writes are counted the guest gets on its way, and then the job is started.
const RAMP: Duration = Duration::from_millis(500);
const JOB_AFTER: Duration = Duration::from_millis(700);
const POLL: Duration = Duration::from_millis(20);
/// Longest wait for a job without a guest to be ready.
const PATIENCE: Duration = Duration::from_secs(30);

impl Guest {
    pub(super) fn run(self) -> Outcome<ExitCode> {
        if cfg!(debug_assertions) {
            return Err("a build with debug assertions is not worth timing; use `cargo xtask bench`".into());
        }
        let qemu = Qemu::find("cargo xtask bench guest").ok_or("the peer is qemu-storage-daemon")?;
        if !Fio::is_there() {
            return Err("the guest is fio with its nbd engine, which cannot be run".into());
        }
        let dir = match &self.dir {
            None => scratch()?,
            Some(dir) => tempfile::Builder::new().prefix("blockmirror-").tempdir_in(dir)?,
        };
        let programs = [
            match &self.program {
                Some(path) => Program::ours_at(path),
                None => Program::ours()?,
            },
            match &self.peer {
                Some(path) => Program::ours_at(path),
                None => Program::qemu(),
            },
        ];
        println!("{}", Row::HEAD);
        let mut rows = Vec::new();
        for scene in Scene::all().filter(|scene| scene.name().contains(&self.only)) {
            let row = self.row(scene, &programs, qemu, dir.path());
            let row = row.map_err(|e| format!("{}: {e}", scene.name()))?;
            println!("{}", row.line());
            rows.push(row);
        }
        if let Some(path) = &self.json {
            std::fs::write(path, serde_json::to_string_pretty(&rows)? + "\n")?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn row(&self, scene: Scene, programs: &[Program; 2], qemu: Qemu, dir: &Path) -> Outcome<Row> {
        let mib = if scene.stretch == Stretch::Ready { self.mib / 4 } else { self.mib };
        let source = dir.join("source.qcow2");
        make_source(&source, mib << 20)?;
        let mut samples = [Vec::new(), Vec::new()];
        for round in 0..self.rounds {
            // Whatever drifts on the machine hits both.
            for which in [round & 1, 1 - (round & 1)] {
                let program = &programs[if scene.log { 0 } else { which }];
                let daemon = Daemon::start(program, qemu, &source, mib << 20, dir)?;
                let of_one = Scene { log: scene.log && which == 0, ..scene };
                samples[which].push(self.sample(daemon, of_one, program.modes, round as u64)?);
            }
        }
        std::fs::remove_file(&source)?;
        let [ours, peer] = samples;
        Ok(Row { name: scene.name(), ours, peer })
    }

    fn sample(&self, mut daemon: Daemon, scene: Scene, modes: &[Mode], seed: u64) -> Outcome<Sample> {
        // What has no auto mode is best off in background.
        let mode = if modes.contains(&scene.mode) { scene.mode } else { Mode::Background };
        let speed = if scene.stretch == Stretch::Limited { self.speed * 1_000_000 } else { 0 };
        let ask = Ask { mode, granularity: scene.granularity, speed, log: scene.log };
        let start = |daemon: &mut Daemon| -> Outcome<Instant> {
            daemon.start(ask)?;
            Ok(Instant::now())
        };
        let mut started = None;
        if scene.stretch == Stretch::Ready {
            let at = started.insert(start(&mut daemon)?);
            while !daemon.state()?.ready {
                if at.elapsed() > PATIENCE {
                    return Err("the job does not become ready".into());
                }
                thread::sleep(POLL);
            }
        }
        let mut fio = Fio::start(&daemon.uri(), seed, RAMP, Duration::from_millis(self.millis))?;
        let mut ready = None;
        if scene.stretch != Stretch::Alone && started.is_none() {
            thread::sleep(JOB_AFTER);
            let at = *started.insert(start(&mut daemon)?);
            while fio.writes()? {
                if ready.is_none() && daemon.state()?.ready {
                    ready = Some(at.elapsed().as_secs_f64());
                    fio.cut_short()?;
                }
                thread::sleep(POLL);
            }
        }
        let writes = fio.finish()?;
        if started.is_some() {
            daemon.state()?;
            daemon.stop()?;
        }
        Ok(Sample { writes, ready })
    }
}

impl Scene {
    fn all() -> impl Iterator<Item = Self> {
        let alone = Self { stretch: Stretch::Alone, mode: Mode::Background, granularity: 0, log: false };
        let logged = [Mode::Background, Mode::WriteBlocking].map(|mode| Self {
            stretch: Stretch::Ready,
            mode,
            granularity: 64 << 10,
            log: true,
        });
        let jobs = [Stretch::Bulk, Stretch::Limited, Stretch::Ready].into_iter().flat_map(|stretch| {
            [Mode::Background, Mode::WriteBlocking, Mode::Auto].into_iter().flat_map(move |mode| {
                GRANULARITIES.into_iter().map(move |granularity| Self {
                    stretch,
                    mode,
                    granularity,
                    log: false,
                })
            })
        });
        std::iter::once(alone).chain(jobs).chain(logged)
    }

    fn name(&self) -> String {
        match self.stretch {
            Stretch::Alone => "alone".into(),
            _ if self.log => format!("x-log {:?}", self.mode).to_lowercase(),
            stretch => format!("{stretch:?} {:?} {} KiB", self.mode, self.granularity >> 10).to_lowercase(),
        }
    }
}

impl Row {
    const HEAD: &str = "row                                   writes/s      peer   ratio    p99 us      peer   ratio   ready s      peer";

    fn line(&self) -> String {
        let of = |samples: &[Sample], what: fn(&Writes) -> f64| {
            median(samples.iter().map(|sample| what(&sample.writes)).collect())
        };
        let ratio = |what: fn(&Writes) -> f64| {
            let pairs = self.ours.iter().zip(&self.peer);
            median(pairs.map(|(ours, peer)| what(&ours.writes) / what(&peer.writes)).collect())
        };
        let ready = |samples: &[Sample]| {
            let times: Vec<f64> = samples.iter().filter_map(|sample| sample.ready).collect();
            let part = format!("{}/{}", times.len(), samples.len());
            if times.is_empty() { part } else { format!("{:.2} {part}", median(times)) }
        };
        format!(
            "{:<34}  {:>10.0} {:>9.0}  {:>6.2}  {:>8.0}  {:>8.0}  {:>6.2}  {:>9} {:>9}",
            self.name,
            of(&self.ours, |w| w.rate),
            of(&self.peer, |w| w.rate),
            ratio(|w| w.rate),
            of(&self.ours, |w| w.p99),
            of(&self.peer, |w| w.p99),
            ratio(|w| w.p99),
            ready(&self.ours),
            ready(&self.peer),
        )
    }
}
