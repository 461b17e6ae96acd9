//! Disk images of any format: what a file is, what it stands on, making one, looking into one.
//!
//! | to | call |
//! |---|---|
//! | open an image with its backing chain | [`OpenOptions::open`], under a [`ReferencePolicy`] |
//! | make one | [`CreateSpec`], [`NewImage::create`], [`NewImage::persist`] |
//! | decide first how an existing target is written | [`Target::decide`], [`PreparedImage`] |
//! | replace a file by bytes of one's own | [`Target::prepare`], [`Target::persist`] |
//! | make policies from what a user allows | [`AllowedReferences`] |
//! | describe one without opening anything else | [`ImageInfo::read`] |
//! | judge one from a stranger without opening anything else | [`Inspection::read`] |
//! | list what lies where | [`map()`] |
//! | tell how long the file of a new image becomes | [`Measurement`] |
//! | find what is wrong with one, and mend it | [`check()`], [`repair()`] |
//! | change the options of one | [`AmendSettings::parse`], [`amend()`] |
//! | change persistent bitmaps, close an image | [`Image::change_bitmap`], [`Image::close`] |
//! | compare two | [`compare()`] |
//! | list, take, apply and delete internal snapshots | [`snapshots()`], [`create_snapshot`], [`apply_snapshot`], [`delete_snapshot`] |
//! | read `-o` texts | [`CreateSettings::parse`] |
//!
//! ```
//! use blockmirror_image::{CreateSettings, CreateSpec, Format, NewImage, OpenOptions, ReferencePolicy};
//!
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("disk.qcow2");
//! let mut settings = CreateSettings::default();
//! settings.parse(Format::Qcow2, "cluster_size=128K")?;
//! NewImage::create(&path, &CreateSpec::new(Format::Qcow2, 1 << 30, settings))?.persist()?;
//!
//! let policy = ReferencePolicy::beside(&path)?;
//! let image = OpenOptions::new().policy(policy).open(&path)?;
//! assert_eq!(image.format(), Format::Qcow2);
//! assert_eq!(image.device().geometry().cluster_size, Some(128 << 10));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! With the feature `nbd` a path may also be the URI of an export of an NBD server, `nbd://host/export` and
//! the like ([`is_uri`]), wherever the caller names an image. Names inside of images are paths all the same.
//!
//! What comes out is a [`BlockDevice`](blockmirror_block::BlockDevice); what an image names is opened only as
//! far as the caller's policy goes.

#![forbid(unsafe_code)]

mod allowed;
mod amend;
mod bitmap;
mod blank;
mod cache;
mod chain;
mod check;
mod commit_base;
mod compare;
mod create;
mod differences;
mod disk_image;
mod error;
mod format;
mod info;
mod inspect;
mod kept;
mod map;
mod measure;
mod name;
#[cfg(feature = "nbd")]
mod nbd;
#[cfg(feature = "nbd")]
mod nbd_context;
mod node_options;
mod open;
mod options;
mod probe;
mod protocol;
mod protocol_id;
mod protocol_layer;
mod reference;
mod relative;
mod resume;
mod snapshots;
mod stoppable;
mod storage_stamp;
mod target;

pub use allowed::AllowedReferences;
pub use amend::{AmendSettings, amend, amend_option_help};
pub use bitmap::BitmapAction;
pub use blockmirror_file::{
    Decision, DeviceStamp, FileHolder, FileId, FileStamp, FreeSpace, InPlace, Leftover, LockMode,
    Replacement, Surprise, TargetOptions,
};
pub use blockmirror_qcow2::{
    BitmapOptions, CheckObserver, CheckReport, CutShort, Error as Qcow2Error, Finding, Mending, NewSnapshot,
    OverlapChecks, Preallocation, Repair, Severity, Snapshot, SnapshotRef, Structure,
};
pub use blockmirror_raw::Part;
pub use cache::{CacheMode, UnknownCacheMode};
pub use chain::check_backing;
pub use check::{ImageCheck, check, repair};
pub use commit_base::CommitBase;
pub use compare::{CompareError, CompareOptions, Difference, compare};
pub use create::{CreateSpec, NewImage, PreparedImage};
pub use differences::differences;
pub use disk_image::{Backing, CommitLayer, Image, Note};
pub use error::{Error, Result};
pub use format::{BackingFormat, Detected, Format, PROBE_LEN, UnknownFormat, detect};
pub use info::{
    BITMAPS_BEFORE, BackingInfo, FileInfo, FileKind, ImageInfo, Qcow2Info, qcow2_fields, read_chain,
};
pub use inspect::{FindingKind, InspectFinding, Inspection, MAX_INSPECTED_SIZE, UnknownFinding};
pub use kept::Kept;
pub use map::{MapRow, map};
pub use measure::Measurement;
pub use name::{ImageName, NameError};
#[cfg(feature = "nbd")]
pub use nbd::NbdOptions;
pub use node_options::NodeOptions;
pub use open::{MAX_CHAIN_DEPTH, MAX_CHAIN_L1_BYTES, OpenOptions};
pub use options::{
    BackingSettingsError, CreateSettings, OptionError, OptionHelp, option_help, split_options,
};
pub use protocol_id::is_uri;
pub use reference::{
    ReferenceError, ReferencePolicy, ReferenceRefusal, Resolved, Role, directory_of, find_name, join_name,
};
pub use relative::relative_name;
pub use resume::{CopyPlace, PartialFile};
pub use snapshots::{apply_snapshot, create_snapshot, delete_snapshot, snapshots};
pub use storage_stamp::StorageStamp;
pub use target::Target;
