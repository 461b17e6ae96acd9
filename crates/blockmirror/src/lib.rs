//! Copy, convert and mirror virtual disks.
//!
//! QEMU's drive-mirror job and `qemu-img convert` as a library, synchronous, without a runtime. This crate
//! has no code of its own: it gives the crates of the project one name. Each of them can be used alone. The
//! command of the same name is in the package `blockmirror-cli`.
//!
//! ```text
//!                 ops       convert, stream, commit
//!               /     \
//!          image       mirror    the job: copies one BlockDevice to another while it is written
//!        /   |   \        |
//!   qcow2   nbd   filter  |      formats, protocols, small devices over a device
//!        \   |   /        |
//!             block ------+      BlockDevice, Storage, Extent, ByteRange, Error
//! ```
//!
//! | to | start at |
//! |---|---|
//! | convert an image, with progress and cancellation | [`Convert`] |
//! | open, create, describe, compare images | [`image`] |
//! | hash what a disk holds | [`hash::DiskHash`] |
//! | mirror a disk that is in use, from within a VMM | [`mirror::Tap`], [`mirror::MirrorJob`] |
//! | stream or commit a chain of images | [`ops`] |
//! | read and write qcow2 on a storage of your own | [`qcow2`] |
//! | serve a disk over NBD, or use one (feature `nbd`) | `nbd` |
//! | run the storage daemon inside a program (feature `daemon`) | `daemon` |
//!
//! ```
//! use std::sync::atomic::AtomicBool;
//! use blockmirror::{Convert, image::Format};
//!
//! # let dir = tempfile::tempdir()?;
//! # std::env::set_current_dir(&dir)?;
//! # std::fs::write("disk.raw", [1; 4096])?;
//! let cancel = AtomicBool::new(false);
//! let outcome = Convert::new("disk.raw", "disk.qcow2")
//!     .target_format(Format::Qcow2)
//!     .run(&cancel, |progress| eprintln!("{} of {} bytes", progress.offset, progress.len))?;
//! println!("{} bytes copied", outcome.copy.copied);
//! # assert_eq!(outcome.copy.copied, 4096);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

pub use blockmirror_block as block;
#[cfg(feature = "daemon")]
pub use blockmirror_daemon as daemon;
pub use blockmirror_filter as filter;
pub use blockmirror_hash as hash;
pub use blockmirror_image as image;
pub use blockmirror_mirror as mirror;
#[cfg(feature = "nbd")]
pub use blockmirror_nbd as nbd;
pub use blockmirror_ops as ops;
pub use blockmirror_qcow2 as qcow2;

pub use blockmirror_ops::{Convert, ConvertError, ConvertOutcome};
