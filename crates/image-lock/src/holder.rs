//! Who holds a lock: open file description locks carry no process id, so the processes are searched for one
//! that has the file open with the lock on it.
//!
//! Runs only after a conflict. Processes of other users cannot be inspected; then no holder is found. The
//! answer is for people: the process may be gone by the time it is read.

use std::fmt;
use std::fs::{self, File};
use std::io::Read as _;
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
    /// Its command line, with what does not belong on a terminal escaped, at most 80 characters of it; empty
    /// if it may not be read.
    pub command_line: String,
}

/// Characters of a command line that are shown.
const SHOWN: usize = 80;

/// Bytes of a command line that are read: a process may have megabytes of arguments, and a character has at
/// most four bytes.
const READ: u64 = 4 * SHOWN as u64 + 1;

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pid == std::process::id() {
            return f.write_str("this process itself");
        }
        match self.command.is_empty() {
            true => write!(f, "pid {}", self.pid)?,
            false => write!(f, "{} (pid {})", self.command, self.pid)?,
        }
        match self.command_line.is_empty() {
            true => Ok(()),
            false => write!(f, " running \"{}\"", self.command_line),
        }
    }
}

impl Holder {
    pub(crate) fn of_pid(pid: u32) -> Self {
        let command = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
        // A process names itself as it likes; control characters do not belong on a terminal.
        let command =
            String::from_utf8_lossy(&command).trim_end().chars().filter(|c| !c.is_control()).collect();
        Self { pid, command, command_line: command_line(pid) }
    }
}

fn command_line(pid: u32) -> String {
    let mut words = Vec::new();
    // The process may be gone, or another user's.
    let read =
        File::open(format!("/proc/{pid}/cmdline")).and_then(|file| file.take(READ).read_to_end(&mut words));
    read.map_or_else(|_| String::new(), |_| shown(&words))
}

/// The words of a command line, each of which a zero byte ends, as text that cannot leave its line.
fn shown(words: &[u8]) -> String {
    let text = String::from_utf8_lossy(words);
    let mut shown = String::new();
    let mut left = SHOWN;
    for c in text.trim_end_matches(['\0', ' ']).chars() {
        let escaped = match c {
            '\0' => " ".to_owned(),
            '"' | '\\' => c.escape_default().to_string(),
            '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                c.escape_default().to_string()
            }
            c if c.is_control() => c.escape_default().to_string(),
            c => c.to_string(),
        };
        let Some(rest) = left.checked_sub(escaped.chars().count()) else { return shown + "..." };
        left = rest;
        shown += &escaped;
    }
    shown
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
        let mut other = Holder { pid: 1, command: "init".into(), command_line: String::new() };
        assert_eq!(other.to_string(), "init (pid 1)");
        other.command_line = shown(b"/sbin/init\0splash\0");
        assert_eq!(other.to_string(), "init (pid 1) running \"/sbin/init splash\"");
    }

    #[test]
    fn a_command_line_stays_on_its_line_and_is_cut() {
        assert_eq!(
            shown("a\0b\nc\u{1b}[2J\0\"d\"\0\u{202e}".as_bytes()),
            "a b\\nc\\u{1b}[2J \\\"d\\\" \\u{202e}"
        );
        assert_eq!(shown(&[b'x'; 80]), "x".repeat(80));
        assert_eq!(shown(&[b'x'; 81]), "x".repeat(80) + "...");
        // An escape is not cut into.
        assert_eq!(shown(&[[b'x'; 79].as_slice(), b"\n"].concat()), "x".repeat(79) + "...");
        assert_eq!(shown(b"\xff\0\0"), "\u{fffd}");
        assert!(!command_line(std::process::id()).is_empty());
        assert_eq!(command_line(u32::MAX), "");
    }
}
