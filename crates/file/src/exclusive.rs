//! New files that must not meet another of their name: what `O_EXCL` is to a file that is made at once.
//!
//! Used by [`crate::target`]. A new file has a temporary name until it is whole, so of two runs that make the
//! same file both would see the name free. A run that wants to be the only one takes its turn: it holds the
//! lock of the directory (`flock`) while it looks for the name, and for a temporary file of the name that
//! another run has open, and until it has its own, which the next run sees.
//!
//! What must hold: the lock only makes the second run learn early. Without it (a directory that may not be
//! read, a file system without such locks, another program that keeps it) the name is still given to one file
//! only, at the end.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::{Error, ErrorKind, Result};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::leftover;
use crate::location::Location;

/// How long other runs may take their turns. A turn takes no longer than a look into the directory.
const LIMIT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(5);

/// A turn to look and to make a file; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Turn(#[expect(dead_code, reason = "held for its lock")] Option<OwnedFd>);

/// Fails if `given` exists, as a link that leads nowhere does, too.
pub(crate) fn check_name(given: &Path) -> Result<()> {
    match given.symlink_metadata() {
        Ok(_) => Err(exists()),
        // The name is looked at again, in its directory.
        Err(_) => Ok(()),
    }
}

/// The refusal of a name that is taken.
pub(crate) fn exists() -> Error {
    Error::new(ErrorKind::AlreadyExists, "create").because("it exists")
}

impl Turn {
    /// Waits for the turn, and takes it if neither the name at `location` nor a temporary file for it is
    /// there that another run makes; `resumed` is the number of the one that this run goes on with.
    pub(crate) fn take(location: &Location, given: &Path, resumed: Option<u32>) -> Result<Self> {
        let turn = Self(lock(location));
        check_name(given)?;
        match leftover::in_use(location, resumed) {
            Some(other) => Err(Error::new(ErrorKind::AlreadyExists, "create")
                .because(format!("another run is making it: {}", other.display()))),
            None => Ok(turn),
        }
    }
}

fn lock(location: &Location) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(location.directory(), ".", flags, Mode::empty()).ok()?;
    let until = Instant::now() + LIMIT;
    loop {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < until => thread::sleep(PAUSE),
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::open::FileOptions;
    use crate::target::{Replacement, TargetFile, TargetOptions, TargetPlan};

    fn exclusive() -> TargetOptions {
        TargetOptions::new().no_clobber(true)
    }

    #[test]
    fn what_exists_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        std::fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        for path in [file.as_path(), link.as_path(), dir.path(), Path::new("/dev/null")] {
            let error = TargetPlan::new(path, exclusive()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
        }
        // One that appears after the decision, too.
        let late = dir.path().join("late");
        let plan = TargetPlan::new(&late, exclusive()).unwrap();
        std::fs::write(&late, "new").unwrap();
        assert_eq!(plan.open().unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    /// Without the lock of a new file, it is found all the same: it is open.
    #[test]
    fn one_run_makes_the_file_and_the_others_learn_it_early() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for options in [FileOptions::new(), FileOptions::new().lock(crate::LockMode::Off)] {
            let start = Barrier::new(8);
            let run = || {
                start.wait();
                TargetPlan::new(&path, exclusive().file(options)).and_then(TargetPlan::open)
            };
            let tried: Vec<_> = std::thread::scope(|scope| {
                let runs: Vec<_> = (0..8).map(|_| scope.spawn(run)).collect();
                runs.into_iter().map(|run| run.join().unwrap()).collect()
            });
            let (made, refused): (Vec<_>, Vec<_>) = tried.into_iter().partition(Result::is_ok);
            assert_eq!((made.len(), refused.len()), (1, 7), "{refused:?}");
            for refused in refused {
                let error = refused.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
            }
        }
        // A run that does not ask for it is not kept off.
        let Ok((TargetFile::New(first), _)) = TargetPlan::new(&path, exclusive()).unwrap().open() else {
            panic!()
        };
        let plan = TargetPlan::new(&path, TargetOptions::new().replacement(Replacement::Auto)).unwrap();
        assert!(plan.open().is_ok());
        first.persist().unwrap();
    }

    /// What a killed run left is in the way of no other.
    #[test]
    fn an_old_temporary_file_is_no_reason_to_refuse() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(".disk.0000abcd.partial"), "old").unwrap();
        std::fs::write(dir.path().join(".disk.0000abcd.resume"), "old").unwrap();
        assert!(TargetPlan::new(&dir.path().join("disk"), exclusive()).unwrap().open().is_ok());
    }
}
