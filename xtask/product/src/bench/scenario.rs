//! The copies that are timed: what the source holds, both programs' words, and who judges the result.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use blockmirror_testing::Outcome;
use blockmirror_testing::content::{self, Fill};
use blockmirror_testing::qemu::Qemu;

use super::case::Case;

/// Sizes: the real ones, or just enough to tell right from wrong.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    /// Length of the disks with mixed data.
    pub(super) mixed: u64,
    /// Length of the nearly empty disk.
    pub(super) huge: u64,
}

impl Scale {
    pub(super) const FULL: Self = Self { mixed: 1 << 30, huge: 8 << 40 };
    pub(super) const SMOKE: Self = Self { mixed: 24 << 20, huge: 1 << 40 };
}

/// What the source of a copy holds.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// Runs of 64 KiB to 4 MiB: five in eight incompressible data, one written zeros, two holes.
    Mixed,
    /// The same with words in place of the incompressible data, but for one run in four.
    Words,
    /// 256 runs of 1 MiB, evenly spread.
    Spread,
}

/// One copy.
#[derive(Debug)]
struct Copy {
    name: &'static str,
    source: Source,
    len: u64,
    from: &'static str,
    to: &'static str,
    /// The target is compressed, by this type.
    compress: Option<&'static str>,
}

/// Every copy, in the order of the table.
pub(super) fn copies(scale: Scale) -> Vec<Box<dyn Case>> {
    let mixed =
        |name, from, to| Copy { name, source: Source::Mixed, len: scale.mixed, from, to, compress: None };
    let compressed = |name, compression| Copy {
        source: Source::Words,
        compress: Some(compression),
        ..mixed(name, "raw", "qcow2")
    };
    let copies = [
        mixed("raw->raw", "raw", "raw"),
        mixed("raw->qcow2", "raw", "qcow2"),
        mixed("qcow2->raw", "qcow2", "raw"),
        mixed("qcow2->qcow2", "qcow2", "qcow2"),
        compressed("raw->qcow2 -c zlib", "zlib"),
        compressed("raw->qcow2 -c zstd", "zstd"),
        Copy {
            name: "8TiB qcow2->qcow2",
            source: Source::Spread,
            len: scale.huge,
            from: "qcow2",
            to: "qcow2",
            compress: None,
        },
    ];
    let checkpoint = Checkpoint(mixed("checkpoint", "raw", "raw"));
    let copies = copies.into_iter().map(|copy| Box::new(copy) as Box<dyn Case>);
    copies.chain([Box::new(checkpoint) as Box<dyn Case>]).collect()
}

/// A copy with a checkpoint, side by side with itself without one.
#[derive(Debug)]
struct Checkpoint(Copy);

impl Case for Checkpoint {
    fn name(&self) -> &'static str {
        self.0.name
    }

    fn make_source(&self, qemu: Qemu, dir: &Path) -> Outcome<PathBuf> {
        self.0.make_source(qemu, dir)
    }

    fn our_words(&self, program: &Path, source: &Path, target: &Path) -> Vec<OsString> {
        let mut words = self.0.our_words(program, source, target);
        // It goes with the end of the copy.
        words.extend(["--checkpoint".into(), target.with_extension("log").into()]);
        words
    }

    fn peer_words(&self, program: &Path, source: &Path, target: &Path) -> Vec<OsString> {
        self.0.our_words(program, source, target)
    }

    fn judge(&self, qemu: Qemu, source: &Path, targets: [&Path; 2]) -> Outcome {
        self.0.judge(qemu, source, targets)
    }

    fn rounds(&self) -> usize {
        11
    }
}

impl Copy {
    /// The words of both programs for a compressed target.
    fn compression(&self) -> Vec<OsString> {
        let words = |by| vec!["-c".into(), "-o".into(), format!("compression_type={by}").into()];
        self.compress.map_or_else(Vec::new, words)
    }
}

impl Case for Copy {
    fn name(&self) -> &'static str {
        self.name
    }

    fn make_source(&self, qemu: Qemu, dir: &Path) -> Outcome<PathBuf> {
        let source = dir.join("source");
        match self.source {
            Source::Mixed | Source::Words => {
                let raw = if self.from == "raw" { source.clone() } else { dir.join("source.raw") };
                let mut runs = mixed_runs(self.len);
                if matches!(self.source, Source::Words) {
                    let noise = runs.iter_mut().filter(|run| run.2 == Fill::Noise);
                    noise.enumerate().filter(|(i, _)| i % 4 != 3).for_each(|(_, run)| run.2 = Fill::Words);
                }
                content::write_raw(&raw, self.len, &runs)?;
                if self.from != "raw" {
                    qemu.img_in(dir, ["convert", "-f", "raw", "-O", self.from, "source.raw", "source"])?;
                    fs::remove_file(raw)?;
                }
            }
            Source::Spread => {
                qemu.img_in(dir, ["create", "-q", "-f", self.from, "source", &self.len.to_string()])?;
                let writes: Vec<_> = (0..256u64)
                    .map(|i| format!("write -q -P {} {} 1M", 1 + i % 255, self.len / 256 * i))
                    .collect();
                let script: Vec<_> = writes.iter().map(String::as_str).collect();
                qemu.io(self.from, &source, &script)?;
            }
        }
        Ok(source)
    }

    /// Our words. This program knows `mirror` and `convert` as well as the command itself does.
    fn our_words(&self, program: &Path, source: &Path, target: &Path) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec![program.into()];
        let command = if self.compress.is_some() { "convert" } else { "mirror" };
        words.extend([command, "--progress=none", "-q", "-f", self.from, "-O", self.to].map(OsString::from));
        words.extend(self.compression());
        words.extend([source.into(), target.into()]);
        words
    }

    /// `qemu-img convert` with its defaults.
    fn peer_words(&self, _program: &Path, source: &Path, target: &Path) -> Vec<OsString> {
        let words = ["qemu-img", "convert", "-f", self.from, "-O", self.to].map(OsString::from);
        words.into_iter().chain(self.compression()).chain([source.into(), target.into()]).collect()
    }

    /// The targets are clean and hold what the source does.
    fn judge(&self, qemu: Qemu, source: &Path, targets: [&Path; 2]) -> Outcome {
        for target in targets {
            qemu.compare(self.from, source, self.to, target)?;
            if self.to == "qcow2" {
                qemu.check(target)?;
            }
        }
        Ok(())
    }
}

/// The runs of a mixed disk, drawn from a fixed seed.
fn mixed_runs(len: u64) -> Vec<(u64, u64, Fill)> {
    let mut dice = blake3::Hasher::new().update(b"mixed").finalize_xof();
    let mut runs = Vec::new();
    let mut at = 0;
    while at < len {
        let mut drawn = [0u8; 2];
        dice.fill(&mut drawn);
        let run = (64 << 10) * (1 + u64::from(drawn[0]) % 64);
        match drawn[1] % 8 {
            0..5 => runs.push((at, run, Fill::Noise)),
            5 => runs.push((at, run, Fill::Zeros)),
            _ => {}
        }
        at += run;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixed_disk_is_mixed() {
        let runs = mixed_runs(1 << 30);
        let sum = |fill| runs.iter().filter(|r| r.2 == fill).map(|r| r.1).sum::<u64>() >> 20;
        assert!((550..750).contains(&sum(Fill::Noise)), "{} MiB of data", sum(Fill::Noise));
        assert!((80..180).contains(&sum(Fill::Zeros)), "{} MiB of zeros", sum(Fill::Zeros));
    }
}
