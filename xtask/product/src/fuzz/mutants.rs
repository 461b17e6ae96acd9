//! Damaged images beside `qemu-img`: refused, or read byte for byte as QEMU reads them.

use std::fs;

use blockmirror_block::testing::Rng;
use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;
use blockmirror_tests::mutant::{Reading, read, read_by_qemu};
use xtask_fuzz::corpus::Corpus;

use super::{Heard, Listener};

/// The images, and QEMU.
pub(super) struct MutantListener {
    corpus: Corpus,
    qemu: Qemu,
}

impl MutantListener {
    pub(super) fn new() -> Outcome<Self> {
        let qemu =
            Qemu::find("cargo xtask fuzz mutants").ok_or("the judge is qemu-img, which cannot be run")?;
        Ok(Self { corpus: Corpus::load()?, qemu })
    }
}

impl Listener for MutantListener {
    /// What QEMU does not read counts as refused.
    fn speak(&self, seed: u64, count: u64) -> Outcome<Heard> {
        let dir = scratch()?;
        let (path, out) = (dir.path().join("mutant.qcow2"), dir.path().join("read.raw"));
        let mut rng = Rng::new(seed, 4);
        let mut heard = Heard::default();
        for _ in 0..count {
            let mutant = self.corpus.mutant(&mut rng);
            fs::write(&path, &mutant.bytes)?;
            let Reading::Content(ours) = read(&path)? else {
                heard.refused += 1;
                continue;
            };
            match read_by_qemu(self.qemu, &path, ours.len(), &out) {
                Ok(theirs) if theirs == ours => {
                    heard.done += 1;
                    heard.honest += u64::from(mutant.sound);
                }
                Ok(_) => return Err(format!("{}: QEMU reads something else", mutant.label).into()),
                Err(_) => heard.refused += 1,
            }
        }
        Ok(heard)
    }

    fn left(&self) -> Outcome {
        Ok(())
    }
}
