//! Taking the locks.
//!
//! Ours are set first and the others' are looked for afterwards: of two that come at the same time at least
//! one sees the other. The one that finds a conflict releases what it took.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::holder::{self, Target};
use crate::{Holder, LockError, Permission, Permissions};

/// The lock byte of permission 0 for users that have it.
const HAVE: u64 = 100;
/// The lock byte of permission 0 for users that do not share it.
const UNSHARE: u64 = 200;

/// What was locked. The locks belong to the open file description: they last until its last descriptor is
/// closed, by this process or by one that inherited it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageLock {
    have: Permissions,
    unshared: Permissions,
    enforced: bool,
}

impl ImageLock {
    /// Locks the image open as `file`: announces that we do `wanted` and share nothing of `unshared`.
    ///
    /// `path` is for messages. The file may be open for reading only. A second call on the same open file
    /// description is not a second user: it adds to the first.
    ///
    /// # Errors
    /// [`LockError::Held`] or [`LockError::NotShared`] if another user stands in the way, in this process or
    /// in another; nothing is locked then. [`LockError::System`] for anything else.
    pub fn acquire(
        file: &File,
        path: &Path,
        wanted: Permissions,
        unshared: Permissions,
    ) -> Result<Self, LockError> {
        Self { have: Permissions::NONE, unshared: Permissions::NONE, enforced: true }
            .change(file, path, wanted, unshared)
    }

    /// Changes what was locked by `self` on `file`: what stays is held all the time.
    ///
    /// # Errors
    /// As for [`acquire`](Self::acquire); what `self` says is still locked then.
    pub fn change(
        &self,
        file: &File,
        path: &Path,
        wanted: Permissions,
        unshared: Permissions,
    ) -> Result<Self, LockError> {
        let system = |cause: io::Error| LockError::System { path: path.to_owned(), cause };
        let meta = file.metadata().map_err(system)?;
        let target = Target { device: meta.dev(), inode: meta.ino(), own_fd: file.as_raw_fd() };
        let fd = file.as_fd();
        match acquire(fd, wanted, unshared) {
            Ok(()) => {
                release(fd, without(self.have, wanted), without(self.unshared, unshared));
                Ok(Self { have: wanted, unshared, enforced: true })
            }
            Err(Refusal::System(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP)) => {
                Ok(Self { have: wanted, unshared, enforced: false })
            }
            Err(refusal) => {
                release(fd, without(wanted, self.have), without(unshared, self.unshared));
                Err(match refusal {
                    Refusal::System(errno) => system(errno.into()),
                    Refusal::Held(permission, pid) => LockError::Held {
                        path: path.to_owned(),
                        permission,
                        holder: holder(target, pid, HAVE, permission),
                    },
                    Refusal::NotShared(permission, pid) => LockError::NotShared {
                        path: path.to_owned(),
                        permission,
                        holder: holder(target, pid, UNSHARE, permission),
                    },
                })
            }
        }
    }

    /// Gives the lock back while `file` is still open. Closing it would do as well, unless a child that this
    /// process has forked for something else, and that has not called `exec` yet, still holds a copy of the
    /// descriptor.
    pub fn release(&self, file: &File) {
        release(file.as_fd(), self.have, self.unshared);
    }

    /// What we said that we do.
    pub fn permissions(&self) -> Permissions {
        self.have
    }

    /// What we do not share.
    pub fn unshared(&self) -> Permissions {
        self.unshared
    }

    /// False where the filesystem has no such locks: then no user is kept out, and none could have kept us
    /// out.
    pub fn is_enforced(&self) -> bool {
        self.enforced
    }
}

/// Why `acquire` failed; with the process id, if the lock in the way carries one.
enum Refusal {
    Held(Permission, Option<u32>),
    NotShared(Permission, Option<u32>),
    System(Errno),
}

fn acquire(fd: BorrowedFd<'_>, wanted: Permissions, unshared: Permissions) -> Result<(), Refusal> {
    for permission in wanted.iter() {
        set(fd, HAVE, permission, libc::F_RDLCK).map_err(|e| refusal(e, Refusal::Held(permission, None)))?;
    }
    for permission in unshared.iter() {
        set(fd, UNSHARE, permission, libc::F_RDLCK)
            .map_err(|e| refusal(e, Refusal::NotShared(permission, None)))?;
    }
    for permission in wanted.iter() {
        if let Some(pid) = others(fd, UNSHARE, permission)? {
            return Err(Refusal::NotShared(permission, pid));
        }
    }
    for permission in unshared.iter() {
        if let Some(pid) = others(fd, HAVE, permission)? {
            return Err(Refusal::Held(permission, pid));
        }
    }
    Ok(())
}

/// What `errno` of setting a read lock means. It conflicts only with a write lock on the byte, which QEMU and
/// we never set, and Linux says `EAGAIN` then. `EACCES` is a security module or a server that allows no
/// locks.
fn refusal(errno: Errno, conflict: Refusal) -> Refusal {
    match errno {
        Errno::EAGAIN => conflict,
        errno => Refusal::System(errno),
    }
}

fn without(permissions: Permissions, others: Permissions) -> Permissions {
    permissions.iter().filter(|permission| !others.contains(*permission)).collect()
}

/// Gives everything back; a failure would leave a lock that goes with the descriptor anyway.
fn release(fd: BorrowedFd<'_>, wanted: Permissions, unshared: Permissions) {
    for permission in wanted.iter() {
        let _ = set(fd, HAVE, permission, libc::F_UNLCK);
    }
    for permission in unshared.iter() {
        let _ = set(fd, UNSHARE, permission, libc::F_UNLCK);
    }
}

fn byte(base: u64, permission: Permission) -> u64 {
    base + permission as u64
}

fn request(base: u64, permission: Permission, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte(base, permission).cast_signed(),
        l_len: 1,
        l_pid: 0,
    }
}

fn set(fd: BorrowedFd<'_>, base: u64, permission: Permission, kind: libc::c_int) -> Result<(), Errno> {
    let lock = request(base, permission, kind);
    uninterrupted(|| fcntl(fd, FcntlArg::F_OFD_SETLK(&lock))).map(drop)
}

/// Repeats a call that a signal has interrupted, as it does on file systems behind a network.
fn uninterrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// Whether another open file description holds the byte; with the process id, which only classic POSIX locks
/// carry.
fn others(fd: BorrowedFd<'_>, base: u64, permission: Permission) -> Result<Option<Option<u32>>, Refusal> {
    let mut lock = request(base, permission, libc::F_WRLCK);
    uninterrupted(|| fcntl(fd, FcntlArg::F_OFD_GETLK(&mut lock))).map_err(Refusal::System)?;
    if lock.l_type == libc::F_UNLCK as libc::c_short {
        return Ok(None);
    }
    Ok(Some(u32::try_from(lock.l_pid).ok().filter(|pid| *pid > 0)))
}

fn holder(target: Target, pid: Option<u32>, base: u64, permission: Permission) -> Option<Holder> {
    match pid {
        Some(pid) => Some(Holder::of_pid(pid)),
        None => holder::find(target, byte(base, permission)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A question about a lock that a signal interrupted failed the opening.
    #[test]
    fn an_interrupted_call_is_repeated() {
        let mut answers = [Err(Errno::EINTR), Err(Errno::EINTR), Ok(1), Ok(2)].into_iter();
        assert_eq!(uninterrupted(|| answers.next().unwrap()), Ok(1));
        let mut answers = [Err(Errno::EINTR), Err(Errno::EAGAIN)].into_iter();
        assert_eq!(uninterrupted(|| answers.next().unwrap()), Err::<(), _>(Errno::EAGAIN));
    }

    /// A file system without a lock manager, and a policy that allows no locks, were another user of the
    /// image.
    #[test]
    fn only_a_conflict_is_another_user() {
        let refused = |errno| refusal(errno, Refusal::Held(Permission::Write, None));
        assert!(matches!(refused(Errno::EAGAIN), Refusal::Held(..)));
        for errno in [Errno::EACCES, Errno::ENOLCK, Errno::EPERM] {
            assert!(matches!(refused(errno), Refusal::System(e) if e == errno));
        }
    }
}
