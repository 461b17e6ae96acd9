//! A daemon whose sockets were opened before it started, as systemd does: it serves both of them, and takes
//! each once.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::common::ours_ok;
use blockmirror_qmp::Client;
use blockmirror_testing::content::{Fill, write_raw};
use blockmirror_testing::scratch::scratch;
use serde_json::json;

/// Set in the process that is to be the daemon: its arguments, one a line.
pub(crate) const CHILD: &str = "BLOCKMIRROR_TEST_DAEMON";
const SIZE: u64 = 1 << 20;

#[test]
fn child() {
    let Ok(args) = std::env::var(CHILD) else { return };
    let args = ["blockmirror", "daemon"].into_iter().chain(args.lines());
    let code = blockmirror_cli::run(args, &mut std::io::sink(), &mut std::io::stderr());
    std::process::exit(code.into());
}

/// A daemon that does not outlive a test that failed.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a daemon whose descriptors 3 and 4 are `nbd` and `qmp`.
fn start(nbd: UnixListener, qmp: impl Into<OwnedFd>, environment: &str, args: &[String]) -> Running {
    let child = Command::new("sh")
        .arg("-c")
        .arg(format!("{environment} exec \"$0\" --exact activation::child --nocapture 3<&0 4<&1 <&- >&-"))
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, args.join("\n"))
        .stdin(OwnedFd::from(nbd))
        .stdout(Stdio::from(qmp.into()))
        .stderr(Stdio::piped())
        .spawn();
    Running(child.unwrap())
}

fn arguments(dir: &std::path::Path, nbd: &str, chardev: &str) -> Vec<String> {
    let file = dir.join("disk").display().to_string();
    [
        "--blockdev".into(),
        format!("driver=raw,node-name=disk,read-only=on,file.driver=file,file.filename={file}"),
        "--nbd-server".into(),
        format!("addr.type=fd,addr.str={nbd}"),
        "--export".into(),
        "nbd,id=e,node-name=disk".into(),
        "--chardev".into(),
        format!("socket,id=c,{chardev}"),
        "--monitor".into(),
        "chardev=c".into(),
    ]
    .to_vec()
}

#[test]
fn sockets_by_the_names_of_the_service_manager() {
    let dir = scratch().unwrap();
    let dir = dir.path();
    write_raw(&dir.join("disk"), SIZE, &[(0, SIZE, Fill::Noise)]).unwrap();
    let listen = |name: &str| UnixListener::bind(dir.join(name)).unwrap();
    let mut daemon = start(
        listen("nbd.sock"),
        listen("qmp.sock"),
        "LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=nbd:control",
        &arguments(dir, "nbd", "fd=control,server=on,wait=off"),
    );
    // The sockets listen already: a client that connects now waits until the daemon is there.
    let mut client = Client::connect(dir.join("qmp.sock"), Duration::from_secs(60)).unwrap();
    let uri = format!("nbd+unix:///disk?socket={}", dir.join("nbd.sock").display());
    ours_ok(["compare", dir.join("disk").to_str().unwrap(), &uri]);
    let again = json!({"addr": {"type": "fd", "data": {"str": "nbd"}}});
    client.execute("nbd-server-stop", json!({})).unwrap();
    let refused = client.execute("nbd-server-start", again).unwrap_err();
    assert_eq!(refused.to_string(), "nbd-server-start: Inherited sockets are for the command line");
    client.execute("quit", json!({})).unwrap();
    assert!(daemon.0.wait().unwrap().success());
}

#[test]
fn sockets_by_number() {
    let dir = scratch().unwrap();
    let dir = dir.path();
    write_raw(&dir.join("disk"), SIZE, &[(0, SIZE, Fill::Noise)]).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let nbd = UnixListener::bind(dir.join("nbd.sock")).unwrap();
    // One client, connected already.
    let mut daemon = start(nbd, theirs, "", &arguments(dir, "3", "fd=4"));
    let mut client = Client::new(ours, Duration::from_secs(60)).unwrap();
    let uri = format!("nbd+unix:///disk?socket={}", dir.join("nbd.sock").display());
    ours_ok(["compare", dir.join("disk").to_str().unwrap(), &uri]);
    client.execute("quit", json!({})).unwrap();
    assert!(daemon.0.wait().unwrap().success());
}

/// Its limit of files was that of a shell: 1,000 mirrors did not fit.
#[test]
fn a_daemon_may_open_as_many_files_as_the_system_allows() {
    let dir = scratch().unwrap();
    let dir = dir.path();
    write_raw(&dir.join("disk"), SIZE, &[]).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let nbd = UnixListener::bind(dir.join("nbd.sock")).unwrap();
    let mut daemon = start(nbd, theirs, "ulimit -Sn 64;", &arguments(dir, "3", "fd=4"));
    let mut client = Client::new(ours, Duration::from_secs(60)).unwrap();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.0.id())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let mut limits = files.split_whitespace().filter_map(|word| word.parse::<u64>().ok());
    let (soft, hard) = (limits.next().unwrap(), limits.next().unwrap_or(u64::MAX));
    assert_eq!(soft, hard.min(1 << 20), "{files}");
    client.execute("quit", json!({})).unwrap();
    assert!(daemon.0.wait().unwrap().success());
}

#[test]
fn what_is_not_there_is_said() {
    let dir = scratch().unwrap();
    let dir = dir.path();
    write_raw(&dir.join("disk"), SIZE, &[]).unwrap();
    let mut number = 0;
    let mut complaint = |nbd: &str, environment: &str| {
        number += 1;
        let listen = |name: &str| UnixListener::bind(dir.join(format!("{name}{number}"))).unwrap();
        let args = arguments(dir, nbd, "fd=4,server=on,wait=off");
        let mut daemon = start(listen("nbd"), listen("qmp"), environment, &args);
        let mut text = String::new();
        daemon.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(daemon.0.wait().unwrap().code(), Some(1));
        let (_, reason) = text.trim_end().rsplit_once("addr.str=").unwrap();
        reason.to_owned()
    };
    let passed = "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=nbd:late";
    assert_eq!(
        complaint("late", passed),
        "late: file descriptor 'late' was not passed by the service manager"
    );
    let elsewhere = "LISTEN_PID=1 LISTEN_FDS=1 LISTEN_FDNAMES=nbd";
    assert_eq!(
        complaint("nbd", elsewhere),
        "nbd: file descriptor 'nbd' is no number, and the service manager has passed none"
    );
    assert_eq!(complaint("77", ""), "77: file descriptor '77' is not open");
    // The standard error.
    assert_eq!(complaint("2", ""), "2: file descriptor '2' is a standard stream");
}

/// The number once opened the disk's own file as a monitor's socket.
#[test]
fn what_is_no_inherited_socket_of_the_right_kind_is_refused() {
    let dir = scratch().unwrap();
    let dir = dir.path();
    write_raw(&dir.join("disk"), SIZE, &[(0, SIZE, Fill::Noise)]).unwrap();
    let before = std::fs::read(dir.join("disk")).unwrap();
    let mut number = 0;
    let mut complaint = |qmp: OwnedFd, chardev: &str| {
        number += 1;
        let nbd = UnixListener::bind(dir.join(format!("nbd{number}"))).unwrap();
        let mut daemon = start(nbd, qmp, "", &arguments(dir, "3", chardev));
        let mut text = String::new();
        daemon.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(daemon.0.wait().unwrap().code(), Some(1), "{text}");
        let (_, reason) = text.trim_end().rsplit_once("file descriptor ").unwrap();
        reason.to_owned()
    };
    let listening = || OwnedFd::from(UnixListener::bind(dir.join(format!("q{}", unique()))).unwrap());
    let connected = || OwnedFd::from(UnixStream::pair().unwrap().0);
    let datagram = || OwnedFd::from(std::os::unix::net::UnixDatagram::unbound().unwrap());
    let file = || {
        let file = std::fs::File::options().read(true).write(true).open(dir.join("disk"));
        OwnedFd::from(file.unwrap())
    };
    let (server, client) = ("fd=4,server=on,wait=off", "fd=4,server=off");
    for (socket, chardev, why) in [
        (listening(), client, "'4' is not a connected socket"),
        (connected(), server, "'4' is not a listening socket"),
        (datagram(), server, "'4' is not a stream socket"),
        (file(), server, "'4' is not a socket"),
        (file(), client, "'4' is not a socket"),
        // Numbers that the daemon gives to files of its own, or to its disk.
        (listening(), "fd=5,server=on,wait=off", ""),
        (listening(), "fd=6,server=off", ""),
        (listening(), "fd=9,server=off", ""),
        // Both options with one socket.
        (listening(), "fd=3,server=on,wait=off", "'3' is in use already"),
    ] {
        let reason = complaint(socket, chardev);
        if why.is_empty() {
            assert!(reason.ends_with("was not inherited") || reason.ends_with("is not open"), "{reason}");
        } else {
            assert_eq!(reason, why, "{chardev}");
        }
    }
    assert!(std::fs::read(dir.join("disk")).unwrap() == before);
}

/// A disk's file by mistake: it was emptied once the daemon had opened it.
#[test]
fn a_file_that_holds_no_process_id_is_no_pidfile() {
    let dir = scratch().unwrap();
    let dir = dir.path();
    write_raw(&dir.join("disk"), SIZE, &[(0, SIZE, Fill::Noise)]).unwrap();
    let before = std::fs::read(dir.join("disk")).unwrap();
    let nbd = UnixListener::bind(dir.join("nbd")).unwrap();
    let qmp = UnixListener::bind(dir.join("qmp")).unwrap();
    let mut args = arguments(dir, "3", "fd=4,server=on,wait=off");
    args.extend(["--pidfile".into(), dir.join("disk").display().to_string()]);
    let mut daemon = start(nbd, qmp, "", &args);
    let unchanged = || std::fs::read(dir.join("disk")).unwrap() == before;
    let status = loop {
        assert!(unchanged());
        if let Some(status) = daemon.0.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(status.code(), Some(1));
    assert!(unchanged());
    let mut text = String::new();
    daemon.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("disk: exists and is not a pid file"), "{text}");
}

/// A name that was not used before.
fn unique() -> usize {
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}
