//! The matrix of qcow2 images that reading and writing are tried on: versions, cluster sizes, features.
//!
//! Some combinations cannot be made, version 2 with zstd for one; [`Combination::possible`] says which ones,
//! and the tests check that against `qemu-img` itself.

use std::path::{Path, PathBuf};

use crate::Outcome;
use crate::content::{Fill, write_raw};
use crate::qemu::Qemu;

/// What is special about an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Nothing.
    Plain,
    /// Deflate clusters.
    Deflate,
    /// Zstd clusters.
    Zstd,
    /// Two more images below.
    Chain,
    /// Clusters that read as zeros though there is data below them.
    Zeroes,
    /// `preallocation=` this.
    Preallocation(&'static str),
    /// `refcount_bits=` this.
    RefcountBits(u32),
    /// Subclusters.
    ExtendedL2,
    /// Guest data in a file of its own.
    DataFile,
    /// Refcounts that may lag behind.
    LazyRefcounts,
}

/// Every feature of the matrix.
pub const FEATURES: [Feature; 15] = [
    Feature::Plain,
    Feature::Deflate,
    Feature::Zstd,
    Feature::Chain,
    Feature::Zeroes,
    Feature::Preallocation("metadata"),
    Feature::Preallocation("falloc"),
    Feature::Preallocation("full"),
    Feature::RefcountBits(1),
    Feature::RefcountBits(8),
    Feature::RefcountBits(16),
    Feature::RefcountBits(64),
    Feature::ExtendedL2,
    Feature::DataFile,
    Feature::LazyRefcounts,
];

/// The cluster sizes of the matrix.
pub const CLUSTERS: [u64; 4] = [512, 4 << 10, 64 << 10, 2 << 20];

/// One place in the matrix.
#[derive(Clone, Copy, Debug)]
pub struct Combination {
    /// Version 3 (`1.1`) or 2 (`0.10`).
    pub v3: bool,
    /// Bytes per cluster.
    pub cluster: u64,
    /// What is special.
    pub feature: Feature,
}

/// Every combination with this cluster size, possible or not.
pub fn combinations(cluster: u64) -> impl Iterator<Item = Combination> {
    [false, true]
        .into_iter()
        .flat_map(move |v3| FEATURES.into_iter().map(move |feature| Combination { v3, cluster, feature }))
}

impl Combination {
    /// Whether such an image can exist.
    pub fn possible(&self) -> bool {
        match self.feature {
            Feature::Plain
            | Feature::Deflate
            | Feature::Chain
            | Feature::Zeroes
            | Feature::Preallocation(_)
            | Feature::RefcountBits(16) => true,
            Feature::Zstd | Feature::DataFile | Feature::LazyRefcounts | Feature::RefcountBits(_) => self.v3,
            Feature::ExtendedL2 => self.v3 && self.cluster >= 16 << 10,
        }
    }

    /// The words after `-o`, with files named after `stem`.
    pub fn options(&self, stem: &str) -> String {
        let compat = if self.v3 { "1.1" } else { "0.10" };
        let common = format!("compat={compat},cluster_size={}", self.cluster);
        match self.feature {
            Feature::Plain | Feature::Deflate | Feature::Chain | Feature::Zeroes => common,
            Feature::Zstd => common + ",compression_type=zstd",
            Feature::Preallocation(mode) => format!("{common},preallocation={mode}"),
            Feature::RefcountBits(bits) => format!("{common},refcount_bits={bits}"),
            Feature::ExtendedL2 => common + ",extended_l2=on",
            Feature::DataFile => format!("{common},data_file={stem}.data"),
            Feature::LazyRefcounts => common + ",lazy_refcounts=on",
        }
    }

    /// Length of the disks tried with this cluster size: small, several L2 tables where that is cheap, never
    /// whole clusters.
    pub fn disk(&self) -> u64 {
        match self.cluster {
            512 => (300 << 10) + 512,
            4096 => (5 << 20) + 1024,
            65536 => (4 << 20) + 1536,
            _ => (19 << 20) + 512,
        }
    }

    /// Runs of data that touch the start, the end, and the borders of clusters.
    pub fn runs(&self, salt: u32) -> Vec<(u64, u64, Fill)> {
        let (c, disk) = (self.cluster, self.disk());
        let shift = u64::from(salt) * c;
        let unit = c.min(64 << 10);
        vec![
            (0, unit, Fill::Stamp(salt)),
            (shift + 3 * c + 512, 1024, Fill::Stamp(salt)),
            (shift + 7 * c, 2 * unit, Fill::Noise),
            (disk / 2 - 512, unit + 700, Fill::Stamp(salt)),
            (disk / 2 + shift + 4 * c, unit, Fill::Zeros),
            (disk - 512, 512, Fill::Stamp(salt)),
        ]
    }

    /// Lets QEMU make such an image in `dir`; its name starts with `stem`.
    pub fn make(&self, qemu: Qemu, dir: &Path, stem: &str) -> Outcome<PathBuf> {
        let image = dir.join(format!("{stem}.qcow2"));
        let raw = format!("{stem}.raw");
        write_raw(&dir.join(&raw), self.disk(), &self.runs(0))?;
        let options = self.options(stem);
        let (name, size) = (format!("{stem}.qcow2"), self.disk().to_string());
        let convert = |compress: bool, target: &str| {
            let mut words = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", &options];
            words.extend(compress.then_some("-c"));
            words.extend([&raw, target]);
            qemu.img_in(dir, words)
        };
        match self.feature {
            Feature::Deflate | Feature::Zstd => {
                convert(true, &name)?;
            }
            Feature::Chain | Feature::Zeroes => {
                let (base, middle) = (format!("{stem}-base.qcow2"), format!("{stem}-middle.qcow2"));
                convert(false, &base)?;
                let on = |below: &str, image: &str| {
                    let words = [
                        "create", "-q", "-f", "qcow2", "-o", &options, "-F", "qcow2", "-b", below, image,
                        &size,
                    ];
                    qemu.img_in(dir, words)
                };
                let c = self.cluster;
                if self.feature == Feature::Chain {
                    on(&base, &middle)?;
                    qemu.io(
                        "qcow2",
                        &dir.join(&middle),
                        &[
                            &format!("write -q -P 17 {} {}", c + 512, c),
                            &format!("write -q -P 18 {} 1024", self.disk() - 1024),
                        ],
                    )?;
                    on(&middle, &name)?;
                    qemu.io("qcow2", &image, &[&format!("write -q -P 19 {} 512", 2 * c)])?;
                } else {
                    on(&base, &name)?;
                    qemu.io(
                        "qcow2",
                        &image,
                        &[
                            &format!("write -q -z {} {}", 7 * c, c),
                            &format!("write -q -z -u 0 {c}"),
                            &format!("write -q -P 20 {} {}", 8 * c, c),
                            &format!("write -q -z {} 512", 8 * c + ((c / 2) & !511)),
                        ],
                    )?;
                }
            }
            _ => {
                convert(false, &name)?;
            }
        }
        Ok(image)
    }
}
