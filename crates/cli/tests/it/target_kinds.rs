//! What a copy is made to, or from, in tests: a file, a block device, an export of QEMU's server or of ours.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use blockmirror_testing::LoopDevice;
use blockmirror_testing::qemu::listens;

use crate::common::Place;
use crate::process::wait_until;

/// Bytes that a qcow2 image may take besides its data.
const METADATA: u64 = 16 << 20;

/// A kind of target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Device,
    QemuExport,
    OurExport,
}

/// A target in a place.
pub(crate) struct Target {
    /// As a command line in any directory has it.
    pub(crate) name: String,
    socket: Option<PathBuf>,
    /// In this order: the server ends before what it serves goes.
    _server: Option<Server>,
    _device: Option<LoopDevice>,
}

/// A server, killed when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Target {
    /// A target for an image in `format` of a disk of `len` bytes: the file `target`, or one on that file,
    /// which may be there. `None` if the machine cannot have it, which is reported.
    pub(crate) fn new(place: &Place, kind: Kind, format: &str, len: u64) -> Option<Self> {
        let target = place.path("target");
        if kind != Kind::File {
            let room = if format == "raw" { 0 } else { METADATA };
            let file = File::options().write(true).create(true).truncate(false).open(&target).unwrap();
            file.set_len(len + room).unwrap();
        }
        let (mut server, mut device, mut listening) = (None, None, None);
        let name = match kind {
            Kind::File => target.display().to_string(),
            Kind::Device => {
                let attached = LoopDevice::on(&target)?;
                let name = attached.path().display().to_string();
                device = Some(attached);
                name
            }
            Kind::QemuExport | Kind::OurExport => {
                let socket = place.path("nbd");
                server = Some(Server(serve(place, kind)));
                wait_until("the server does not start", || listens(&socket));
                let name = format!("nbd+unix:///e?socket={}", socket.display());
                listening = Some(socket);
                name
            }
        };
        Some(Self { name, socket: listening, _server: server, _device: device })
    }

    /// Waits until a server has carried out what clients sent that are gone: then it closes their
    /// connections.
    pub(crate) fn wait_for_the_server(&self) {
        if let Some(socket) = &self.socket {
            wait_until("the server keeps a connection", || !has_clients(socket));
        }
    }
}

/// Whether a server at `socket` has connections, or will accept one. Their ends at the server have the path
/// of the socket that listens.
fn has_clients(socket: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    sockets.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.nth(3).is_some_and(|flags| flags != ACCEPTS)
            && words.nth(3).is_some_and(|path| Path::new(path) == socket)
    })
}

fn serve(place: &Place, kind: Kind) -> Child {
    let (socket, target) = (place.path("nbd"), place.path("target"));
    let mut command = match kind {
        Kind::QemuExport => Command::new("qemu-nbd"),
        _ => Command::new(env!("CARGO_BIN_EXE_blockmirror")),
    };
    match kind {
        Kind::QemuExport => {
            command.args(["-t", "-e", "8", "-f", "raw", "-x", "e", "-k"]).arg(&socket).arg(&target)
        }
        _ => command
            .args(["daemon", "--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())])
            .args(["--blockdev", &format!("file,node-name=e,filename={}", target.display())])
            .args(["--export", "nbd,id=e,node-name=e,writable=on"]),
    };
    command.stdin(Stdio::null()).spawn().unwrap()
}
