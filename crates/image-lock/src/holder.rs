//! Who holds a lock: open file description locks carry no process id, so the processes are searched for one
//! that has the file open with the lock on it.
//!
//! Runs only after a conflict. Processes of other users cannot be inspected; then no holder is found. The
//! answer is for people: the process may be gone by the time it is read.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A process that holds an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// The name of its command, as `ps` shows it; empty if unknown.
    pub command: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pid == std::process::id() {
            return f.write_str("this process itself");
        }
        if self.command.is_empty() {
            return write!(f, "pid {}", self.pid);
        }
        write!(f, "{} (pid {})", self.command, self.pid)
    }
}

impl Holder {
    pub(crate) fn of_pid(pid: u32) -> Self {
        let command = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
        // A process names itself as it likes; control characters do not belong on a terminal.
        let command =
            String::from_utf8_lossy(&command).trim_end().chars().filter(|c| !c.is_control()).collect();
        Self { pid, command }
    }
}

/// The file a lock is on, and the descriptor of ours that is not to be found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) own_fd: i32,
}

/// Looks for a process that holds a lock on `byte` of the file.
pub(crate) fn find(target: Target, byte: u64) -> Option<Holder> {
    let own = std::process::id();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = number::<u32>(&process.file_name()) else { continue };
        let Ok(descriptors) = fs::read_dir(process.path().join("fdinfo")) else { continue };
        for info in descriptors.flatten() {
            let Some(fd) = number::<i32>(&info.file_name()) else { continue };
            if pid == own && fd == target.own_fd {
                continue;
            }
            let Ok(text) = fs::read_to_string(info.path()) else { continue };
            if text.lines().any(|line| locks_byte(line, target.inode, byte))
                && is_file(&process.path().join("fd").join(fd.to_string()), target)
            {
                return Some(Holder::of_pid(pid));
            }
        }
    }
    None
}

fn number<T: std::str::FromStr>(name: &std::ffi::OsStr) -> Option<T> {
    name.to_str()?.parse().ok()
}

/// The device in the lock line is the filesystem's, which on btrfs is not the file's; so the file is asked.
fn is_file(path: &Path, target: Target) -> bool {
    fs::metadata(path).is_ok_and(|m| m.dev() == target.device && m.ino() == target.inode)
}

/// Whether a line of fdinfo says that the description holds a lock on `byte` of the file with `inode`:
/// `lock:  1: OFDLCK ADVISORY  READ -1 00:1b:30 100 101`, the end inclusive or `EOF`.
fn locks_byte(line: &str, inode: u64, byte: u64) -> bool {
    let mut words = line.split_ascii_whitespace();
    if words.next() != Some("lock:") {
        return false;
    }
    let mut words = words.skip_while(|w| !matches!(*w, "OFDLCK" | "POSIX"));
    let (Some(_), Some(_), Some(_), Some(_), Some(file), Some(start), Some(end)) =
        (words.next(), words.next(), words.next(), words.next(), words.next(), words.next(), words.next())
    else {
        return false;
    };
    let same_inode = file.rsplit(':').next().and_then(|i| i.parse().ok()) == Some(inode);
    let from_start = start.parse().is_ok_and(|start: u64| start <= byte);
    let to_end = end == "EOF" || end.parse().is_ok_and(|end: u64| byte <= end);
    same_inode && from_start && to_end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_lines_are_understood() {
        let line = "lock:\t1: OFDLCK ADVISORY  READ -1 00:1b:30 100 101";
        assert!(locks_byte(line, 30, 100));
        assert!(locks_byte(line, 30, 101));
        assert!(!locks_byte(line, 30, 102));
        assert!(!locks_byte(line, 31, 100));
        assert!(locks_byte("lock:\t2: POSIX  ADVISORY  WRITE 812 fe:00:7 0 EOF", 7, 203));
        assert!(!locks_byte("lock:\t1: FLOCK  ADVISORY  WRITE 812 fe:00:7 0 EOF", 7, 203));
        assert!(!locks_byte("pos:\t0", 30, 100));
        assert!(!locks_byte("lock:", 30, 100));
    }

    #[test]
    fn control_characters_in_a_name_are_dropped() {
        let me = Holder::of_pid(std::process::id());
        assert!(!me.command.is_empty() && !me.command.contains('\n'));
        assert_eq!(me.to_string(), "this process itself");
        let other = Holder { pid: 1, command: "init".into() };
        assert_eq!(other.to_string(), "init (pid 1)");
    }
}
