//! The service manager's socket: what the daemon and a copy send to it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::{Child, Stdio};
use std::time::Duration;

use blockmirror_qmp::Client;
use serde_json::json;

use crate::common::Place;
use crate::process::{shell, signal};

/// Nothing here takes longer, on a machine that works at all.
const LIMIT: Duration = Duration::from_secs(60);

/// The socket of a service manager.
struct Manager(UnixDatagram);

impl Manager {
    fn at(place: &Place) -> Self {
        Self::on(&SocketAddr::from_pathname(place.path("notify")).unwrap())
    }

    fn on(address: &SocketAddr) -> Self {
        let socket = UnixDatagram::bind_addr(address).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Self(socket)
    }

    /// Waits for a datagram with `text` in it.
    fn hears(&self, text: &str) -> String {
        let mut all = Vec::new();
        loop {
            let mut datagram = [0; 4096];
            let len = self.0.recv(&mut datagram).unwrap_or_else(|error| panic!("{text}: {error}: {all:?}"));
            let said = String::from_utf8(datagram[..len].to_vec()).unwrap();
            if said.contains(text) {
                return said;
            }
            all.push(said);
        }
    }
}

/// Killed if the test fails.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_daemon_says_that_it_is_ready_what_it_does_and_that_it_ends() {
    let place = Place::new();
    let manager = Manager::at(&place);
    for name in ["disk", "copy"] {
        fs::write(place.path(name), vec![7; 1 << 20]).unwrap();
    }
    let node =
        |name: &str| format!("--blockdev driver=raw,node-name={name},file.driver=file,file.filename={name}");
    let line = format!(
        "daemon {} {} --chardev socket,id=c,path=qmp,server=on,wait=off --monitor chardev=c",
        node("disk"),
        node("copy")
    );
    let mut daemon =
        Daemon(shell(&place, ":", &line).env("NOTIFY_SOCKET", place.path("notify")).spawn().unwrap());
    assert_eq!(manager.hears("READY"), "READY=1");
    assert_eq!(manager.hears("STATUS"), "STATUS=no jobs");
    // Ready: the monitor takes connections.
    let mut client = Client::connect(place.path("qmp"), LIMIT).unwrap();
    let mirror = json!({"job-id": "m", "device": "disk", "target": "copy", "sync": "full", "speed": 1});
    client.execute("blockdev-mirror", mirror).unwrap();
    assert!(manager.hears("m: mirror").starts_with("STATUS=m: mirror running "));
    signal(&daemon.0, "TERM");
    manager.hears("STOPPING=1");
    assert_eq!(daemon.0.wait().unwrap().code(), Some(0));
}

#[test]
fn a_daemon_in_the_background_says_which_process_it_is() {
    let place = Place::new();
    let manager = Manager::at(&place);
    let line = "daemon --daemonize --pidfile pid";
    let mut command = shell(&place, ":", line);
    let status = command.env("NOTIFY_SOCKET", place.path("notify")).stdout(Stdio::null()).status().unwrap();
    assert_eq!(status.code(), Some(0));
    let pid = fs::read_to_string(place.path("pid")).unwrap();
    assert_eq!(manager.hears("READY"), format!("READY=1\nMAINPID={}", pid.trim()));
    let killed = std::process::Command::new("kill").arg(pid.trim()).status().unwrap();
    assert!(killed.success());
    manager.hears("STOPPING=1");
}

#[test]
fn serve_says_that_it_is_ready_who_is_connected_and_that_it_ends() {
    let place = Place::new();
    let manager = Manager::at(&place);
    fs::write(place.path("disk"), vec![7; 1 << 20]).unwrap();
    let mut command = shell(&place, ":", "serve --socket s -f raw disk");
    let mut server =
        Daemon(command.env("NOTIFY_SOCKET", place.path("notify")).stdout(Stdio::null()).spawn().unwrap());
    assert_eq!(manager.hears("READY"), "READY=1");
    assert_eq!(manager.hears("STATUS"), "STATUS=1 export, 0 clients");
    // Ready: clients can connect.
    let socket = fs::canonicalize(place.path("s")).unwrap();
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let client = blockmirror_nbd::ClientOptions::new(uri.parse().unwrap()).open().unwrap();
    assert_eq!(manager.hears("1 client"), "STATUS=1 export, 1 client");
    drop(client);
    assert_eq!(manager.hears("0 clients"), "STATUS=1 export, 0 clients");
    signal(&server.0, "TERM");
    manager.hears("STOPPING=1");
    assert_eq!(server.0.wait().unwrap().code(), Some(0));
}

/// Also by a name without a file.
#[test]
fn a_copy_says_where_it_stands() {
    let place = Place::new();
    fs::write(place.path("source"), vec![7; 1 << 20]).unwrap();
    let name = format!("blockmirror-test-{}", std::process::id());
    let manager = Manager::on(&SocketAddr::from_abstract_name(&name).unwrap());
    let run = |line: &str| {
        let mut command = shell(&place, ":", line);
        command.env("NOTIFY_SOCKET", format!("@{name}")).stderr(Stdio::null()).stdout(Stdio::null());
        command.status().unwrap().code()
    };
    assert_eq!(run("convert -q -f raw source copy"), Some(0));
    assert!(manager.hears("STATUS=copy: ").ends_with(" left"));
    assert_eq!(run("mirror -q -f raw missing copy"), Some(1));
    assert!(manager.hears("STATUS=open: ").contains("missing"));
    // Without a listener the copy goes on.
    drop(manager);
    assert_eq!(run("convert -q -f raw source copy"), Some(0));
}
