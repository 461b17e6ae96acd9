//! The qcow2 image format: an image in a [`Storage`](blockmirror_block::Storage) as a
//! [`BlockDevice`](blockmirror_block::BlockDevice).
//!
//! ```
//! use std::sync::Arc;
//! use blockmirror_block::{BlockDevice, testing::MemoryStorage};
//! use blockmirror_qcow2::{CreateOptions, OpenOptions};
//!
//! let storage = Arc::new(MemoryStorage::new());
//! CreateOptions::new(1 << 30).create(&*storage, None)?;
//! let disk = OpenOptions::new().writable(true).open(storage)?;
//! disk.write_at(b"hello", 1 << 20, Default::default())?;
//! disk.flush()?;
//! let mut read = [0; 5];
//! disk.read_at(&mut read, 1 << 20)?;
//! assert_eq!(&read, b"hello");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The crate opens no file and knows no path: it is handed a storage, and a device for the backing file.
//! Synchronous, any number of threads, all by `&self`.
//!
//! # The way of a write
//!
//! ```text
//!   write_at / write_zeroes / discard                                  flush, or much is dirty
//!        |                                                                      |
//!   1 resolve            2 move               3 commit                    4 write back
//!   ranges: exclusive    no lock of           meta: entries,              write_back: one at a time
//!   meta: find or        metadata             dropped references
//!   allocate clusters
//!        |                    |                    |                            |
//!   WriteGuard  ------>  fill edges (COW),  ---->  L2 entries in    ---->  data, refcounts -> refcount table
//!   (runs, fills,        then the data             the cache               -> L2 -> L1 -> lowered refcounts
//!    updates, grants)                                                      (-> is a flush of the storage)
//!        |
//!        +-- dropped without commit: the clusters go back to the allocator
//! ```
//!
//! Resolving may find something missing: a refcount block, a longer refcount table, an L2 table, the end of a
//! long search. It then returns what, the metadata lock is released, the missing thing is provided
//! (`provide`) and resolving starts anew. So nothing is written under the metadata lock.
//!
//! A read is steps 1 and 2: resolve a batch of runs, pin them by a shared range, move the bytes.
//!
//! | where | what it decides |
//! |---|---|
//! | [`mod@format`] | the structures: bytes in, typed values out |
//! | [`offset`] | the types of guest and host offsets and clusters |
//! | `image`, `image/open` | the open image with its locks; opening |
//! | `context` | storages, layout, length and backing layer, for all others |
//! | `meta`, `cache` | the L1 table and cached L2 slices: what a guest range is mapped to |
//! | `read`, `compressed`, `extents`, `holes`, `known_data`, `preallocated`, `zero_query` | reads and questions about the mapping |
//! | `write`: `plan`, `guard`, `l2_table` | writes: where bytes go, moving them, new L2 tables |
//! | `write/cloned` | writes that share blocks with another file |
//! | `write/compressed`, `compress`, `compressors`, `compress_filter` | writes of compressed clusters |
//! | `zero`, `copy_up`, `resize`, `empty`, `backing` | other changes of the mapping, and of the header |
//! | `refcounts`: `alloc`, `contiguous`, `packing`, `new_blocks`, `grow` | which host clusters are free |
//! | `bitmap_list`, `bitmaps`: `store`, `change` | persistent bitmaps: what writes do to them, their place on disk |
//! | `overlap`, `overlap_checks`, `cluster_set` | what is never written over or handed out |
//! | `verify`, `damage` | clusters whose refcounts are wrong; proof of damage |
//! | `provide`, `stop` | what planning needs first; cancelling long work |
//! | `writeback`, `dirty`, `failure` | the order on disk |
//! | `create`, `create_options`, [`options`], `measure` | new images; the table of options; their length |
//! | [`amend()`], `format/relist` | other options of an image that is there |
//! | `snapshots`, `inactive`, `table_run` | internal snapshots; their tables on disk; a place for new ones |
//! | [`check()`], [`repair()`] | what is wrong with an image, found and mended without opening it |
//! | `reopen`, `cut_short`, `unfinished` | after failures, cut files, interrupted copies |
//!
//! Locks, in order: `changing`, `ranges`, `write_back`, `tables`, `meta`; what each guards stands at its
//! field in `image`. docs/design/qcow2-write.md has the table and the states.
//!
//! # Persistent bitmaps
//!
//! ```
//! # use std::sync::Arc;
//! # use blockmirror_block::{BlockDevice, testing::MemoryStorage};
//! # use blockmirror_qcow2::{BitmapOptions, CreateOptions, OpenOptions};
//! # let storage = Arc::new(MemoryStorage::new());
//! # CreateOptions::new(1 << 30).create(&*storage, None)?;
//! let disk = OpenOptions::new().writable(true).open(storage.clone())?;
//! disk.add_bitmap("backup-1", &BitmapOptions::new().granularity(65536))?;
//! disk.write_at(b"hello", 1 << 20, Default::default())?;
//! // As at the end of a program: until then the bitmap is marked as in use.
//! disk.store_bitmaps()?;
//! drop(disk);
//!
//! let dirty = OpenOptions::new().open(storage)?.read_bitmap("backup-1")?;
//! assert_eq!(dirty.runs().collect::<Vec<_>>(), [1 << 20..(1 << 20) + 65536]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Where a new feature goes
//!
//! - **A new kind of L2 entry** (as compressed or extended ones were): `format/entry` decodes it; `meta`
//!   gives it a `Mapping` and says in `references` which host clusters it holds; `read` and `extents` serve
//!   it; `write/plan` and `zero` say what a change of it keeps. Write-back and refcounts need nothing.
//! - **An option of new images**: a field of [`CreateOptions`], its place in `create/layout`, a row in
//!   `options/table`, which the front ends read; QMP declares it too (CONTRIBUTING.md).
//! - **A header extension**: `format/extension` parses it, [`Header`] carries it, `format/rewrite` keeps it.
//! - **Another table that takes clusters** (as those of snapshots): it is claimed in the map of metadata at
//!   opening (`image/open`), counted by `reopen`, and its clusters come from `Meta::allocate` or, where it
//!   must not be cut, `table_run`; it becomes durable in the order of `writeback` before anything points
//!   at it.
//! - **Another operation that changes the mapping**: take `ranges` exclusively, plan under `meta` in a loop
//!   with `provide`, move data without it, publish under it. Ask a `StopCheck` between pieces whose number
//!   the image decides.
//!
//! [`error`] and [`limits`] say what is refused and why.

#![forbid(unsafe_code)]

mod amend;
mod backing;
mod bitmap_list;
mod bitmaps;
mod cache;
mod check;
mod cluster_set;
mod compress;
mod compress_filter;
mod compressed;
mod compressors;
mod context;
mod copy_up;
mod create;
mod create_options;
mod cut_short;
mod damage;
mod decompress;
mod dirty;
mod empty;
pub mod error;
mod extents;
mod failure;
pub mod format;
mod holes;
mod image;
mod inactive;
mod known_data;
pub mod limits;
mod measure;
mod meta;
pub mod offset;
pub mod options;
mod overlap;
mod overlap_checks;
mod preallocated;
mod provide;
mod read;
mod refcounts;
mod reopen;
mod repair;
mod resize;
mod snapshot_ref;
mod snapshots;
mod stop;
mod table_run;
mod unfinished;
mod verify;
mod write;
mod writeback;
mod zero;
mod zero_query;

pub use amend::{AmendOptions, amend};
pub use bitmaps::{BitmapBits, BitmapOptions};
pub use check::{CheckObserver, CheckReport, Finding, Mending, Severity, Structure, check};
pub use compress_filter::CompressFilter;
pub use create_options::{CreateOptions, Preallocation, Version};
pub use cut_short::CutShort;
pub use damage::Damage;
pub use error::{BitmapProblem, Error, Result, WriteRefusal};
pub use format::header::{BackingRef, Compression, DataFileRef, FileName, Header};
pub use format::snapshot::Snapshot;
pub use image::{DEFAULT_CACHE_BYTES, OpenOptions, Qcow2};
pub use measure::ImageSize;
pub use overlap_checks::{MetadataKind, OverlapChecks};
pub use read::{ReadGuard, ReadRun, ReadSource};
pub use repair::{Repair, repair};
pub use snapshot_ref::SnapshotRef;
pub use snapshots::NewSnapshot;
pub use unfinished::Unfinished;
pub use write::{WriteGuard, WriteRun};
