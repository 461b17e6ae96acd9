//! Small devices over a device.
//!
//! | filter | over a disk | over a storage |
//! |---|---|---|
//! | [`ThrottleGroup`] limits several members together | [`Throttle`] | [`ThrottleStorage`] |
//! | [`CopyOnRead`] keeps what it reads from below | itself | - |
//! | `blkdebug` fails requests by the rules of QEMU's driver | [`BlkdebugDisk`] | [`BlkdebugStorage`] |
//! | [`Blkverify`] compares a disk with another one | itself, over both | - |
//! | [`NullDisk`] holds nothing | itself, at the bottom | - |
//! | [`Concat`] is several disks behind each other | itself, over them | - |
//! | [`Window`] is a part of a disk | itself | - |
//! | [`WriteThrough`] makes each write durable | itself | - |
//! | [`WholeUnits`] answers extent queries in whole units | itself | - |
//!
//! A qcow2 image may lie in a filtered file, hence the filters over a storage. A filter passes length, name,
//! geometry and extents of its child on, but not where bytes lie in a host file: the kernel would move them
//! past the filter. (A window does.)
//!
//! ```
//! use std::sync::Arc;
//! use blockmirror_block::{BlockDevice, WriteFlags, testing::MemoryDisk};
//! use blockmirror_filter::{Concat, NullDisk, WriteThrough};
//!
//! let disk = Arc::new(MemoryDisk::new(1 << 20));
//! let durable = Arc::new(WriteThrough::new(Arc::clone(&disk) as _));
//! durable.write_at(b"boot", 0, WriteFlags::NONE)?;
//! let both = Concat::new([Arc::new(NullDisk::new(1 << 20)) as Arc<dyn BlockDevice>, durable])?;
//! assert_eq!(both.len(), 2 << 20);
//! let mut read = [0; 4];
//! both.read_at(&mut read, 1 << 20)?;
//! assert_eq!(&read, b"boot");
//! # Ok::<(), blockmirror_block::Error>(())
//! ```

#![forbid(unsafe_code)]

mod blkdebug;
mod blkverify;
mod concat;
mod copy_on_read;
mod null;
mod throttle;
mod whole_units;
mod window;
mod write_through;

pub use blkdebug::{
    BlkdebugDisk, BlkdebugError, BlkdebugOptions, BlkdebugStorage, Event, InjectError, IoType,
    MAX_CONFIG_BYTES, MAX_RULES, SetState,
};
pub use blkverify::Blkverify;
pub use concat::Concat;
pub use copy_on_read::CopyOnRead;
pub use null::{DEFAULT_NULL_SIZE, NullDisk, NullStorage};
pub use throttle::{
    Direction, MAX_THROTTLE_VALUE, Rate, Throttle, ThrottleError, ThrottleGroup, ThrottleLimits,
    ThrottleStorage,
};
pub use whole_units::WholeUnits;
pub use window::Window;
pub use write_through::WriteThrough;
