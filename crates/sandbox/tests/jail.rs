//! A thread inside of a sandbox, and what it tries: other files, connections, programs, processes. Landlock
//! and seccomp confine a thread and what it starts, so that each test confines one of its own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;

use blockmirror_sandbox::{Sandbox, SandboxError};

/// Runs `work` inside of `sandbox`, on a thread; `None` where the kernel has no sandbox, which is said.
fn inside<T: Send + 'static>(sandbox: Sandbox, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let thread = thread::spawn(move || match sandbox.confine_thread() {
        Ok(()) => Some(work()),
        Err(error @ (SandboxError::NoLandlock(_) | SandboxError::Seccomp(_))) => {
            blockmirror_testing::skip_unsupported(format_args!("{error}"));
            None
        }
        Err(error) => panic!("{error}"),
    });
    thread.join().unwrap()
}

fn refused<T>(result: io::Result<T>) -> bool {
    matches!(result.map(drop), Err(error) if error.kind() == ErrorKind::PermissionDenied)
}

#[test]
fn no_other_file_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let (image, other) = (dir.path().join("image"), dir.path().join("other"));
    fs::write(&image, b"image").unwrap();
    fs::write(&other, b"other").unwrap();
    let mut open_before = File::open(&other).unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&other, &link).unwrap();
    inside(Sandbox::new().read(&image), move || {
        assert_eq!(fs::read(&image).unwrap(), b"image");
        for path in [&other, &link, Path::new("/etc/passwd"), Path::new("/proc/self/maps"), Path::new("/")] {
            assert!(refused(File::open(path)), "{}", path.display());
        }
        assert!(refused(OpenOptions::new().write(true).open(&image)), "for reading only");
        assert!(refused(fs::write(dir.path().join("new"), b"")));
        assert!(refused(fs::remove_file(&other)));
        assert!(refused(fs::rename(&other, &image)));
        assert!(refused(fs::read_dir(dir.path())));
        // Neither by a descriptor's name, nor by an open directory.
        assert!(refused(
            OpenOptions::new().write(true).open(format!("/proc/self/fd/{}", open_before.as_raw_fd()))
        ));
        let mut text = String::new();
        open_before.read_to_string(&mut text).unwrap();
        assert_eq!(text, "other", "what was open stays so");
    });
}

#[test]
fn a_file_is_what_was_found_and_not_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("image"), b"image").unwrap();
    fs::write(path("secret"), b"secret").unwrap();
    let sandbox = Sandbox::new().read(path("image"));
    let (image, secret, old) = (path("image"), path("secret"), path("old"));
    let (confined, is_confined) = std::sync::mpsc::channel();
    let (replaced, is_replaced) = std::sync::mpsc::channel();
    let replacer = thread::spawn(move || {
        if is_confined.recv().is_ok() {
            fs::rename(&image, &old).unwrap();
            fs::rename(&secret, &image).unwrap();
            replaced.send(()).unwrap();
        }
    });
    let (image, old) = (path("image"), path("old"));
    inside(sandbox, move || {
        confined.send(()).unwrap();
        is_replaced.recv().unwrap();
        assert!(refused(File::open(&image)));
        assert_eq!(fs::read(&old).unwrap(), b"image");
    });
    replacer.join().unwrap();
}

#[test]
fn a_target_is_made_in_its_directory_and_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let (inner, outer) = (dir.path().join("inner"), dir.path().join("outer"));
    fs::create_dir(&inner).unwrap();
    fs::create_dir(&outer).unwrap();
    fs::write(inner.join("old"), b"old").unwrap();
    inside(Sandbox::new().create_in(&inner), move || {
        fs::write(inner.join("partial"), b"new").unwrap();
        fs::rename(inner.join("partial"), inner.join("old")).unwrap();
        File::open(&inner).unwrap().sync_all().unwrap();
        assert_eq!(fs::read(inner.join("old")).unwrap(), b"new");
        File::options().write(true).open(inner.join("old")).unwrap().set_len(1).unwrap();
        fs::remove_file(inner.join("old")).unwrap();
        assert!(refused(fs::write(outer.join("new"), b"")));
        assert!(refused(std::os::unix::fs::symlink("/etc", inner.join("link"))));
        assert!(refused(fs::create_dir(inner.join("dir"))));
    });
}

/// When all is open: what is made has its name already, and is renamed.
#[test]
fn a_sandbox_becomes_narrower() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (partial, target, other) = (path("partial"), path("target"), path("other"));
    fs::write(&other, b"other").unwrap();
    let here = dir.path().to_owned();
    inside(Sandbox::new().create_in(&here), move || {
        let mut file = File::create(&partial).unwrap();
        assert_eq!(fs::read(&other).unwrap(), b"other");
        Sandbox::new().write(&partial).rename_in(&here).narrow_thread().unwrap();
        assert!(refused(File::open(&other)), "beside the target");
        assert!(refused(File::create(here.join("new"))));
        file.write_all(b"new").unwrap();
        file.set_len(2).unwrap();
        fs::rename(&partial, &target).unwrap();
        File::open(&here).unwrap().sync_all().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"ne", "it is the file, whatever its name");
        assert!(thread::spawn(move || refused(File::open(&other))).join().unwrap());
        // What was not allowed before is not by more rules.
        Sandbox::new().read("/etc").write(&target).narrow_thread().unwrap();
        assert!(refused(File::open("/etc/passwd")));
        fs::read(&target).unwrap();
    });
}

#[test]
fn nothing_is_connected_to() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let (tcp, _unix) = (TcpListener::bind("127.0.0.1:0").unwrap(), UnixListener::bind(&socket).unwrap());
    let address = tcp.local_addr().unwrap();
    inside(Sandbox::new().create_in(dir.path()), move || {
        assert!(refused(TcpStream::connect(address)));
        assert!(refused(UnixStream::connect(&socket)));
        assert!(refused(TcpListener::bind("127.0.0.1:0")));
        assert!(refused(UdpSocket::bind("127.0.0.1:0")));
        // How a thread waits for signals.
        let (mut a, mut b) = UnixStream::pair().unwrap();
        a.write_all(b"x").unwrap();
        b.read_exact(&mut [0]).unwrap();
    });
}

#[test]
fn nothing_is_executed() {
    inside(Sandbox::new().read("/bin").read("/usr").read("/lib"), || {
        assert!(refused(Command::new("/bin/true").status()));
        assert!(refused(Command::new("/bin/sh").args(["-c", "true"]).output()));
    });
}

#[test]
fn threads_begin_inside() {
    let found = inside(Sandbox::new(), || {
        let inner = thread::Builder::new().name("inner".into()).spawn(|| refused(File::open("/etc/passwd")));
        // Memory, and the work of an allocator in several threads.
        let sum: usize = thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|i| scope.spawn(move || vec![i as u8; 8 << 20].len())).collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).sum()
        });
        assert_eq!(sum, 32 << 20);
        inner.unwrap().join().unwrap()
    });
    assert!(found.is_none_or(|refused| refused));
}

#[test]
fn what_is_not_there_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    inside(Sandbox::new().read(&missing).create_in(missing.join("deeper")), move || {
        assert_eq!(File::open(&missing).unwrap_err().kind(), ErrorKind::NotFound);
    });
}

/// The test runner has threads.
#[test]
fn a_process_with_threads_is_not_confined() {
    let other = thread::spawn(thread::park);
    let error = Sandbox::new().enter().unwrap_err();
    assert!(matches!(error, SandboxError::Threads(threads) if threads > 1), "{error}");
    other.thread().unpark();
    other.join().unwrap();
    assert!(File::open("/proc/self/maps").is_ok());
}

const F_SETSIG: i32 = 10;

#[allow(unsafe_code, reason = "no crate has these commands")]
fn fcntl(file: &impl AsRawFd, command: i32, value: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the commands that are tried here take a number, not a pointer.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, value) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The kernel sends the signal `F_SETSIG` to the process `F_SETOWN` when there is something to read.
#[test]
fn no_signal_is_sent_by_a_descriptor() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"x").unwrap();
    inside(Sandbox::new().write(&file), move || {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(refused(fcntl(&reader, libc::F_SETOWN, std::process::id().cast_signed())));
        assert!(refused(fcntl(&reader, F_SETSIG, libc::SIGWINCH)));
        reader.try_clone().unwrap();
        let file = File::options().read(true).write(true).open(&file).unwrap();
        file.lock().unwrap();
    });
}

#[test]
fn attributes_of_open_files_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, b"x").unwrap();
    let tried = |sandbox: Sandbox| {
        let path = path.clone();
        inside(sandbox.read(&path), move || {
            let file = File::open(&path).unwrap();
            for mode in [0o4755, 0o2755, 0o6755] {
                assert!(refused(file.set_permissions(Permissions::from_mode(mode))), "{mode:o}");
            }
            file.set_permissions(Permissions::from_mode(0o644)).unwrap();
            // Owner and group stay: that needs no privilege.
            std::os::unix::fs::fchown(&file, None, None)
        })
    };
    assert!(tried(Sandbox::new()).is_none_or(refused));
    assert!(tried(Sandbox::new().change_attributes()).is_none_or(|done| done.is_ok()));
}

/// Landlock takes no rule for it.
#[test]
fn a_pipe_has_no_rule() {
    let (reader, _writer) = io::pipe().unwrap();
    let name = format!("/proc/self/fd/{}", reader.as_raw_fd());
    inside(Sandbox::new().read(name), || assert!(refused(File::open("/etc/passwd"))));
}
