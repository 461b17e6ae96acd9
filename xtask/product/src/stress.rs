//! `cargo xtask stress`: writers on a disk that is mirrored again and again, judged in between. See
//! `blockmirror_tests::live` for what is done and what is checked.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use blockmirror_testing::Outcome;
use blockmirror_tests::live::Stress;

use crate::Task;

/// More memory than this after many lives than after the first is a leak.
const MOST_GROWTH: u64 = 32 << 20;

/// Write to a disk while it is mirrored in real time, steer the jobs at random, judge the disks
#[derive(clap::Args)]
pub(crate) struct StressTask {
    /// How long
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// What is drawn depends on it; by default another one each time
    #[arg(long)]
    seed: Option<u64>,
    /// The folder for the images; by default in memory
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Length of the disk in MiB
    #[arg(long, default_value_t = 24)]
    mib: u64,
    /// Say nothing before the end
    #[arg(short, long)]
    quiet: bool,
}

impl Task for StressTask {
    fn run(self) -> Outcome<ExitCode> {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
        let seed = self.seed.unwrap_or_else(now);
        println!("seed {seed}");
        let stress = Stress {
            seed,
            time: Duration::from_secs(self.seconds),
            // Neither clusters nor granules end with the disk.
            len: (self.mib << 20) + 1536,
            dir: self.dir,
        };
        let start = Instant::now();
        let mut reported = start;
        let report = stress.run(|report| {
            if !self.quiet && reported.elapsed() > Duration::from_secs(10) {
                reported = Instant::now();
                println!("{:>4} s  {report}", start.elapsed().as_secs());
            }
        })?;
        println!("{report}");
        match report.growth() {
            Some(growth) if growth > MOST_GROWTH => {
                Err(format!("{} MiB more memory in the end: {:?}", growth >> 20, report.resident).into())
            }
            _ => Ok(ExitCode::SUCCESS),
        }
    }
}
