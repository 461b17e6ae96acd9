//! `cargo xtask matrix`: features of qcow2 images times operations, beside QEMU.
//!
//! One program makes an image. A copy is changed by QEMU and one by us, in the same words. What QEMU accepts
//! ours accepts, and what it refuses ours refuses. Then `qemu-img check` finds nothing in ours, ours finds
//! nothing in QEMU's, and both read the same of both. Where QEMU is wrong, the table in `fault` says so.

mod fault;
mod judge;
mod shape;
mod start;
mod step;
mod tools;

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockmirror_block::testing::Rng;
use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;

use crate::Task;
use fault::{FAULTS, explain};
use judge::{Difference, Judge, Kind, comparable, first_difference};
use shape::{Shape, shapes};
use start::{copy, make};
use step::{Operation, Step, operations};
use tools::Tools;

/// Try operations on images with every feature, beside QEMU
#[derive(clap::Args)]
pub(crate) struct Matrix {
    /// One cell of so many, which the seed chooses
    #[arg(long, default_value_t = 1)]
    one_in: u64,
    /// What is chosen depends on it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only cells whose description contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Cells that are tried at once; by default as many as there are processors
    #[arg(long)]
    jobs: Option<usize>,
    /// List the cells and try none
    #[arg(long)]
    list: bool,
}

/// Run our own command under the name `qemu-img`, for `matrix`
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct QemuImg {
    /// What `qemu-img` takes
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

impl Task for QemuImg {
    fn run(self) -> Outcome<ExitCode> {
        Ok(blockmirror_cli::run_here([OsString::from("qemu-img")].into_iter().chain(self.args)))
    }
}

/// What has come of a cell.
enum Verdict {
    Same,
    RefusedByBoth,
    /// Differences that are faults of QEMU, by their places in the table.
    Faults(Vec<usize>),
    Wrong(String),
}

/// An image, and what is done to copies of it.
struct Row {
    shape: Shape,
    operations: Vec<Operation>,
}

impl Row {
    fn describe(&self, operation: &Operation) -> String {
        format!("{}: {}", self.shape, operation.name)
    }
}

impl Task for Matrix {
    fn run(self) -> Outcome<ExitCode> {
        let qemu = Qemu::find("cargo xtask matrix").ok_or("the peer is qemu-img, which cannot be run")?;
        let rows = self.rows();
        if self.list {
            rows.iter().for_each(|row| row.operations.iter().for_each(|op| println!("{}", row.describe(op))));
            return Ok(ExitCode::SUCCESS);
        }
        let jobs = self.jobs.or_else(|| Some(std::thread::available_parallelism().ok()?.get())).unwrap_or(1);
        let counts = try_all(qemu, &rows, jobs);
        counts.print(self.seed, rows.len());
        Ok(if counts.wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Matrix {
    /// What is tried. The choice of a cell depends on the seed and its place alone, not on `only`. What is
    /// slow is tried on one image, and only where everything is.
    fn rows(&self) -> Vec<Row> {
        let mut rng = Rng::new(self.seed, 0);
        let all = self.one_in == 1;
        let rows = shapes().into_iter().map(|shape| {
            let chosen: Vec<_> = operations().filter(|_| rng.one_in(self.one_in)).collect();
            let chosen = chosen.into_iter().filter(|op| !is_slow(&shape, op) || (all && shape.is_plain()));
            let mut row = Row { shape, operations: Vec::new() };
            row.operations = chosen.filter(|op| row.describe(op).contains(&self.only)).collect();
            row
        });
        rows.filter(|row| !row.operations.is_empty()).collect()
    }
}

/// Whether QEMU takes half a minute of processor time: it looks at each refcount that a block has room for.
fn is_slow(shape: &Shape, operation: &Operation) -> bool {
    let widens = |step: &Step| matches!(step, Step::Command(line) if line.contains("refcount_bits="));
    shape.cluster() == 2 << 20 && operation.steps.iter().any(widens)
}

/// Tries the cells on `jobs` threads.
fn try_all(qemu: Qemu, rows: &[Row], jobs: usize) -> Counts {
    let next = AtomicUsize::new(0);
    let counts = Mutex::new(Counts::default());
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let verdicts = try_row(qemu, row);
                    // A thread that has panicked ends the run when the scope does.
                    let mut counts = counts.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    verdicts.into_iter().for_each(|verdict| counts.add(verdict));
                }
            });
        }
    });
    counts.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What came of each cell of a row. What is wrong is printed.
fn try_row(qemu: Qemu, row: &Row) -> Vec<Verdict> {
    let started = || -> Outcome<tempfile::TempDir> {
        let dir = scratch()?;
        fs::create_dir(dir.path().join("start"))?;
        make(qemu, &row.shape, &dir.path().join("start"))?;
        Ok(dir)
    };
    let dir = match started() {
        Ok(dir) => dir,
        Err(why) => {
            println!("{}: cannot be made: {why}", row.shape);
            return vec![Verdict::Wrong(String::new())];
        }
    };
    let tried = row.operations.iter().map(|operation| {
        let verdict = try_cell(qemu, &row.shape, operation, dir.path());
        let verdict = verdict.unwrap_or_else(|why| Verdict::Wrong(why.to_string()));
        if let Verdict::Wrong(why) = &verdict {
            println!("{}: {why}", row.describe(operation));
        }
        verdict
    });
    tried.collect()
}

/// One operation on two copies of what `dir` has.
fn try_cell(qemu: Qemu, shape: &Shape, operation: &Operation, dir: &Path) -> Outcome<Verdict> {
    let cell = tempfile::tempdir_in(dir)?;
    let [ours, theirs, scratch] = ["ours", "theirs", "scratch"].map(|name| cell.path().join(name));
    fs::create_dir(&scratch)?;
    for copied in [&ours, &theirs] {
        copy(&dir.join("start"), copied)?;
    }
    let mut differences = Vec::new();
    let mut refused = false;
    for step in operation.steps {
        let results =
            (Tools::Ours.perform(shape, *step, &ours), Tools::Qemu(qemu).perform(shape, *step, &theirs));
        match results {
            (Ok(out), Ok(wanted)) => {
                if let Step::Look(_) = step {
                    let [out, wanted] = [out, wanted].map(|text| serde_json::from_str(&text).map(comparable));
                    let (out, wanted) = (out?, wanted?);
                    if out != wanted {
                        differences.push(Difference::new(Kind::Output, first_difference(&out, &wanted)));
                    }
                }
                continue;
            }
            (Err(_), Err(_)) => refused = true,
            (Ok(_), Err(why)) => differences.push(Difference::new(Kind::DoneHere, why)),
            (Err(why), Ok(_)) => differences.push(Difference::new(Kind::RefusedHere, why)),
        }
        break;
    }
    if differences.is_empty() {
        let judge = Judge { qemu, shape, ours: &ours, theirs: &theirs, scratch: &scratch };
        differences = judge.differences()?;
    }
    let unexplained: Vec<_> = differences
        .iter()
        .filter(|difference| explain(shape, operation, refused, difference).is_none())
        .collect();
    if !unexplained.is_empty() {
        let all: Vec<_> = unexplained
            .iter()
            .map(|difference| format!("{:?}: {}", difference.kind, difference.text))
            .collect();
        return Ok(Verdict::Wrong(all.join("; ")));
    }
    let mut faults: Vec<_> =
        differences.iter().filter_map(|found| explain(shape, operation, refused, found)).collect();
    faults.sort_unstable();
    faults.dedup();
    Ok(match (faults.is_empty(), refused) {
        (false, _) => Verdict::Faults(faults),
        (true, true) => Verdict::RefusedByBoth,
        (true, false) => Verdict::Same,
    })
}

#[derive(Default)]
struct Counts {
    same: u64,
    refused: u64,
    faulty: u64,
    wrong: u64,
    faults: [u64; FAULTS.len()],
}

impl Counts {
    fn add(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Same => self.same += 1,
            Verdict::RefusedByBoth => self.refused += 1,
            Verdict::Faults(faults) => {
                self.faulty += 1;
                faults.into_iter().for_each(|fault| self.faults[fault] += 1);
            }
            Verdict::Wrong(_) => self.wrong += 1,
        }
    }

    fn print(&self, seed: u64, images: usize) {
        for (fault, times) in FAULTS.iter().zip(self.faults) {
            println!("QEMU's fault, in {times} cells: {}\n    {}", fault.name, fault.how_to_see_it);
        }
        let Self { same, refused, faulty, wrong, .. } = self;
        let all = same + refused + faulty + wrong;
        println!(
            "seed {seed}: {images} images, {all} cells: {same} the same, {refused} refused by both, \
             {faulty} with faults of QEMU, {wrong} wrong"
        );
    }
}
