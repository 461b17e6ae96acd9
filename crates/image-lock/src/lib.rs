//! Image locks that QEMU's tools see and respect, and the other way round.
//!
//! An image is used by the processes that have opened it, and two users may conflict: two writers always, a
//! writer and a reader unless the reader bears with it. QEMU 2.10 and later say what they do with an image in
//! *open file description* locks (`F_OFD_SETLK`, Linux 3.15) on single bytes of the image file. The bytes
//! need not exist; nothing is ever written there. All locks are *read* locks, so that any number of users can
//! hold the same byte, and a user asks with `F_OFD_GETLK` for a *write* lock whether another user holds a
//! byte:
//!
//! | byte | who holds it |
//! |---|---|
//! | 100 + permission | a user that *has* the permission |
//! | 200 + permission | a user that *does not let others have* it |
//!
//! The permissions are 0 consistent read, 1 write, 2 write unchanged, 3 resize. Observed with QEMU 10.0: a
//! writable qcow2 holds 100, 101, 103, 201, 203; a read-only one 100, 201, 203; the same with `-U` only 100;
//! a writable raw image 100, 101 and a read-only one 100, unsharing nothing.
//!
//! [`ImageLock::acquire`] is called by whatever opens an image file, once, before the first byte is read.
//!
//! ```
//! use blockmirror_image_lock::{ImageLock, Permission, Permissions};
//!
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("disk.raw");
//! # std::fs::write(&path, [0; 512])?;
//! let wanted: Permissions = [Permission::ConsistentRead, Permission::Write].into_iter().collect();
//! let unshared: Permissions = [Permission::Write].into_iter().collect();
//! let open = || std::fs::File::options().read(true).write(true).open(&path);
//!
//! let ours = open()?;
//! let lock = ImageLock::acquire(&ours, &path, wanted, unshared)?;
//! // A second writer, in this process or another, is refused.
//! let theirs = open()?;
//! assert!(ImageLock::acquire(&theirs, &path, wanted, unshared).is_err());
//! lock.release(&ours);
//! ImageLock::acquire(&theirs, &path, wanted, unshared)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod error;
mod holder;
mod lock;
mod permissions;

pub use error::{LockConflict, LockError};
pub use holder::Holder;
pub use lock::ImageLock;
pub use permissions::{Permission, Permissions};
