//! A sandbox for a program that reads images from strangers: what it may open is said beforehand, and the
//! kernel refuses the rest, whatever an image makes the program do.
//!
//! | by | what is left |
//! |---|---|
//! | Landlock | the files and directories that were named; no execution, no TCP, no abstract sockets |
//! | seccomp | a list of system calls; no sockets but pairs, no new processes, no executable memory |
//! | resource limits | memory and processor time, where they are given; no core dumps |
//!
//! [`Sandbox::enter`] is for a process that has one thread yet, and lasts until it ends. Threads that are
//! started later are inside.
//!
//! ```no_run
//! use blockmirror_sandbox::Sandbox;
//!
//! Sandbox::new().read("/srv/uploads/disk.qcow2").create_in("/srv/images").memory(1 << 30).enter()?;
//! assert!(std::fs::read("/etc/passwd").is_err());
//! # Ok::<(), blockmirror_sandbox::SandboxError>(())
//! ```
//!
//! What the kernel lacks of it is an error: nothing is left out in silence. Newer parts of Landlock (TCP,
//! signals and abstract sockets) are used where they are there; seccomp refuses the same by other means: no
//! call that connects, that signals another process, or that lets the kernel do it (`F_SETOWN`).
//! Descriptors that are open when the sandbox is entered stay usable.

#![forbid(unsafe_code)]

mod error;
mod files;
mod resources;
mod syscalls;

use std::fs;
use std::path::PathBuf;

pub use error::SandboxError;

/// What a process, or a thread, may still do.
#[derive(Clone, Debug, Default)]
pub struct Sandbox {
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
    create: Vec<PathBuf>,
    rename: Vec<PathBuf>,
    memory: Option<u64>,
    cpu_seconds: Option<u64>,
    attributes: bool,
}

impl Sandbox {
    /// Nothing may be opened.
    pub fn new() -> Self {
        Self::default()
    }

    /// The file `path`, or what lies in or below the directory, may be opened for reading. It is looked up
    /// when the sandbox is entered; what is not there then cannot be opened later.
    #[must_use]
    pub fn read(mut self, path: impl Into<PathBuf>) -> Self {
        self.read.push(path.into());
        self
    }

    /// The same for writing, too.
    #[must_use]
    pub fn write(mut self, path: impl Into<PathBuf>) -> Self {
        self.write.push(path.into());
        self
    }

    /// In or below `directory` files may be made, opened, renamed within their directory and removed.
    #[must_use]
    pub fn create_in(mut self, directory: impl Into<PathBuf>) -> Self {
        self.create.push(directory.into());
        self
    }

    /// In or below `directory` files may be renamed within their directory and removed, and directories
    /// listed. No file is opened by that.
    #[must_use]
    pub fn rename_in(mut self, directory: impl Into<PathBuf>) -> Self {
        self.rename.push(directory.into());
        self
    }

    /// Owners, extended attributes and flags of open files may be changed, also of those that are open for
    /// reading: for a file that is to have those of one that it replaces. The mode of an open file may be
    /// changed in any case, but not to a set-user-ID or set-group-ID one.
    #[must_use]
    pub fn change_attributes(mut self) -> Self {
        self.attributes = true;
        self
    }

    /// Bytes of private writable memory that the process may have (`RLIMIT_DATA`). A request for more fails,
    /// which ends a program that has no other way.
    #[must_use]
    pub fn memory(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.memory = bytes.into();
        self
    }

    /// Seconds of processor time, of all threads together, after which the process gets SIGXCPU; it is killed
    /// [`GRACE_SECONDS`] later (`RLIMIT_CPU`).
    #[must_use]
    pub fn cpu_seconds(mut self, seconds: impl Into<Option<u64>>) -> Self {
        self.cpu_seconds = seconds.into();
        self
    }

    /// Confines the process until it ends.
    ///
    /// # Errors
    /// [`SandboxError::Threads`] if it has other threads, which would stay outside; what the kernel lacks or
    /// refuses. The process may be confined in part then.
    pub fn enter(&self) -> Result<(), SandboxError> {
        let threads = fs::read_dir("/proc/self/task").map_err(SandboxError::CountThreads)?.count();
        if threads != 1 {
            return Err(SandboxError::Threads(threads));
        }
        self.limit_resources()?;
        self.confine_thread()
    }

    /// Sets the limits of memory and processor time, and nothing else: for a kernel that has no sandbox.
    ///
    /// # Errors
    /// [`SandboxError::Resource`].
    pub fn limit_resources(&self) -> Result<(), SandboxError> {
        resources::limit(self.memory, self.cpu_seconds)
    }

    /// Confines the calling thread, and the threads that it starts from now on. Limits of memory and time are
    /// the process's, and are not set.
    ///
    /// # Errors
    /// What the kernel lacks or refuses.
    pub fn confine_thread(&self) -> Result<(), SandboxError> {
        files::restrict(self)?;
        syscalls::restrict(self.attributes)
    }

    /// Leaves the calling thread, and the threads that it starts from now on, the files that they may open by
    /// this and by the sandbox that they are in: when all is open that has to be.
    ///
    /// # Errors
    /// What the kernel lacks or refuses.
    pub fn narrow_thread(&self) -> Result<(), SandboxError> {
        files::restrict(self)
    }
}

pub use resources::GRACE_SECONDS;
