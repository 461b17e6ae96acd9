//! `blockmirror serve` as a process: its notice, its clients, its ends.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, ChildStdout, Command, Stdio};

use blockmirror_testing::qemu::have;

use crate::common::{Place, Ran, have_qemu};
use crate::process::{shell, signal};

/// A server; killed if the test fails.
struct Serving {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
    /// The URIs that it has printed.
    uris: Vec<String>,
}

impl Serving {
    /// Starts `blockmirror serve` with the words of `line`, and waits until it says that clients can connect
    /// to its `exports`.
    fn start(place: &Place, line: &str, exports: usize) -> Self {
        let mut child = shell(place, "export XDG_RUNTIME_DIR=\"$PWD\"", &format!("serve {line}"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let uris: Vec<_> = lines.by_ref().take(exports).map(Result::unwrap).collect();
        if uris.len() < exports {
            panic!("{line}: {:?}", child.wait_with_output().unwrap());
        }
        Self { child, lines, uris }
    }

    /// Waits for its end. It says nothing but the URIs.
    fn ended(mut self) -> Option<i32> {
        assert!(self.lines.next().is_none());
        let status = self.child.wait().unwrap();
        let said = std::io::read_to_string(self.child.stderr.take().unwrap()).unwrap();
        assert_eq!(said, "");
        status.code()
    }

    /// Ends it by a signal.
    fn end(self, name: &str) -> Option<i32> {
        signal(&self.child, name);
        self.ended()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A raw disk of 1 MiB, in which each block of 64 KiB has a byte of its own.
fn blocks(place: &Place, name: &str) -> Vec<u8> {
    let bytes: Vec<u8> = (0..16).flat_map(|block| [block + 1; 65536]).collect();
    fs::write(place.path(name), &bytes).unwrap();
    bytes
}

/// Writes 64 KiB of `byte` at `block`, as a client.
fn write(place: &Place, uri: &str, block: u64, byte: u8) -> Ran {
    let offset = block << 16;
    place.ours(&format!("bench -q -w -f raw -c 1 -d 1 -s 64k -o {offset} --pattern {byte} {uri}"))
}

#[test]
fn a_disk_is_read_and_not_written() {
    let place = Place::new();
    let bytes = blocks(&place, "disk");
    for (end, option) in [("TERM", "--socket s"), ("INT", "--port 0"), ("TERM", "")] {
        let serving = Serving::start(&place, format!("{option} --pid-file pid disk").trim_start(), 1);
        let uri = serving.uris[0].clone();
        match option {
            "--port 0" => assert!(uri.starts_with("nbd://127.0.0.1:"), "{uri}"),
            _ => {
                let here = fs::canonicalize(place.path(".")).unwrap();
                let prefix = format!("nbd+unix:///?socket={}/", here.display());
                let socket = uri.strip_prefix(&prefix).unwrap_or_else(|| panic!("{uri}"));
                match option {
                    "" => assert_eq!(socket, format!("blockmirror-{}.sock", serving.child.id())),
                    _ => assert_eq!(socket, "s"),
                }
                let mode = fs::metadata(place.path(socket)).unwrap().permissions().mode();
                assert_eq!(mode & 0o777, 0o600);
            }
        }
        let pid: u32 = fs::read_to_string(place.path("pid")).unwrap().trim().parse().unwrap();
        assert_eq!(pid, serving.child.id());
        place.ours_ok(&format!("convert -q --sync full {uri} @copy"));
        assert!(fs::read(place.path("copy")).unwrap() == bytes);
        let refused = write(&place, &uri, 0, 9);
        assert_eq!(refused.code, 1, "{refused:?}");
        assert_eq!(serving.end(end), Some(0));
        fs::remove_file(place.path("copy")).unwrap();
        // Socket and process id went.
        assert_eq!(place.names(), ["disk"]);
    }
    assert!(fs::read(place.path("disk")).unwrap() == bytes);
}

/// What clients have written is in the image at the end, in a persistent bitmap too.
#[test]
fn a_disk_is_written() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @disk.qcow2 1M");
    place.ours_ok("bitmap --add @disk.qcow2 b");
    blocks(&place, "disk.raw");
    for (line, name) in [("disk.qcow2", "disk.qcow2"), ("-f raw disk.raw", "disk.raw")] {
        let serving = Serving::start(&place, &format!("--writable --socket s {line}"), 1);
        let written = write(&place, &serving.uris[0], 3, 7);
        assert_eq!(written.code, 0, "{written:?}");
        assert_eq!(serving.end("TERM"), Some(0));
        place.ours_ok(&format!("convert -q -O raw @{name} @{name}.copy"));
        let copy = fs::read(place.path(&format!("{name}.copy"))).unwrap();
        assert!(copy[3 << 16..4 << 16].iter().all(|byte| *byte == 7), "{name}");
    }
    place.ours_ok("check -q @disk.qcow2");
    let serving = Serving::start(&place, "--bitmap b --socket s disk.qcow2", 1);
    if have("a_disk_is_written", &["qemu-img"]) {
        let map = place.img(&format!(
            "map --output=json --image-opts driver=nbd,path={},x-dirty-bitmap=qemu:dirty-bitmap:b",
            place.path("s").display()
        ));
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        // It shows what is dirty as what has no data.
        let dirty = map.as_array().unwrap().iter().find(|run| run["data"] == false).unwrap();
        assert_eq!((&dirty["start"], &dirty["length"]), (&(3 << 16).into(), &65536.into()), "{map}");
    }
    assert_eq!(serving.end("TERM"), Some(0));
}

#[test]
fn two_images_until_the_last_client_has_gone() {
    let place = Place::new();
    let bytes = blocks(&place, "b.raw");
    place.ours_ok("create -q -f qcow2 @a.qcow2 1M");
    let serving = Serving::start(&place, "--once --socket s a.qcow2 b.raw", 2);
    let here = fs::canonicalize(place.path(".")).unwrap();
    let uri = |name: &str| format!("nbd+unix:///{name}?socket={}/s", here.display());
    assert_eq!(serving.uris, [uri("a.qcow2"), uri("b.raw")]);
    // A connection that does not come to an export is no client.
    drop(UnixStream::connect(place.path("s")).unwrap());
    place.ours_ok(&format!("convert -q {} @copy", serving.uris[1]));
    assert_eq!(serving.ended(), Some(0));
    assert!(fs::read(place.path("copy")).unwrap() == bytes);

    let serving = Serving::start(&place, "--name one --name two --socket s a.qcow2 b.raw", 2);
    assert_eq!(serving.uris, [uri("one"), uri("two")]);
    assert_eq!(place.ours_ok(&format!("compare {} @b.raw", serving.uris[1])), "Images are identical.\n");
    assert_eq!(serving.end("TERM"), Some(0));
}

#[test]
fn a_snapshot_is_served() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @disk 1M");
    let pattern = |byte: u8| {
        place.ours_ok(&format!("bench -q -w -c 1 -d 1 -s 64k --pattern {byte} @disk"));
    };
    pattern(1);
    place.ours_ok("snapshot -q -c monday @disk");
    pattern(2);
    let serving = Serving::start(&place, "--snapshot monday --socket s disk", 1);
    place.ours_ok(&format!("convert -q {} @copy", serving.uris[0]));
    assert!(fs::read(place.path("copy")).unwrap()[..65536].iter().all(|byte| *byte == 1));
    assert_eq!(serving.end("TERM"), Some(0));
}

/// A raw disk that a client can write to needs its format: what it wrote would be believed the next time.
#[test]
fn what_is_refused() {
    let place = Place::new();
    blocks(&place, "disk");
    place.ours_ok("create -q -f qcow2 @q 1M");
    place.ours_ok("bitmap --add @q b");
    fs::write(place.path("file"), b"text\n").unwrap();
    let _other = UnixListener::bind(place.path("used")).unwrap();
    for (line, code, want) in [
        ("--writable @disk", 2, "@disk: it looks raw; to let clients write, give -f raw"),
        ("--writable -U -f raw @disk", 2, "serve: -U is for reading; it cannot be combined with --writable"),
        (
            "--writable --bitmap b @q",
            1,
            "@q: the bitmap 'b' records writes; `bitmap --disable` ends that, or serve it without --writable",
        ),
        ("--bitmap no @q", 1, "bitmap \"no\""),
        ("--bitmap b @disk", 1, "@disk: a raw image has no bitmaps"),
        ("--snapshot no @q", 1, "no"),
        ("@disk @disk", 2, "serve: two exports would be called 'disk'; --name gives other names"),
        ("--name a @disk @q", 2, "serve: 1 names (--name) for 2 images"),
        ("--name a --name a @disk @q", 2, "serve: two exports would be called 'a'; --name gives other names"),
        ("@none", 1, "@none: No such file or directory"),
        ("--socket @used @disk", 1, "@used"),
        ("--socket @file @disk", 1, "@file"),
        ("--pid-file @file --socket @s @disk", 1, "@file: exists and is not a pid file"),
        (
            "--port 0 --bind 0.0.0.0 @disk",
            2,
            "--bind 0.0.0.0: other hosts reach it; --tls-certificates encrypts, --no-tls serves without",
        ),
        ("--port 0 --tls-certificates @none @disk", 1, "@none"),
        ("--port 0 --socket @s @disk", 2, "cannot be used with"),
        ("--bind 127.0.0.1 @disk", 2, "--port"),
        ("--limits=untrusted @disk", 2, "--limits: no server listens in the sandbox; untrusted,no-sandbox"),
        ("--snapshot a --writable @q", 2, "cannot be used with"),
        ("--force @q", 2, "--writable"),
        ("", 2, "<IMAGE>"),
    ] {
        let said = place.ours_error(format!("serve {line}").trim_end(), code);
        let said = said.replace(&format!("{}/", place.path("").display()), "@");
        let said = said.replace(&place.path("").display().to_string(), "@");
        assert!(said.contains(want), "{line}: {said}");
    }
    assert_eq!(place.names(), ["disk", "file", "q", "used"]);
}

#[test]
fn clients_of_others() {
    if !have_qemu("clients_of_others") || !have("clients_of_others", &["nbdcopy", "nbdinfo"]) {
        return;
    }
    let place = Place::new();
    let bytes = blocks(&place, "disk");
    let serving = Serving::start(&place, "--socket s -f raw --writable disk", 1);
    let uri = &serving.uris[0];
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).current_dir(place.path(".")).output().unwrap();
        assert!(output.status.success(), "{program} {args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(run("nbdinfo", &["--size", uri]), "1048576\n");
    run("nbdcopy", &["--connections=4", uri, "copy"]);
    assert!(fs::read(place.path("copy")).unwrap() == bytes);
    run("qemu-io", &["-f", "raw", "-c", "write -P 9 64k 64k", "-c", "flush", uri]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", "-U", uri, "disk"]);
    assert_eq!(serving.end("TERM"), Some(0));
    assert!(fs::read(place.path("disk")).unwrap()[65536..131_072].iter().all(|byte| *byte == 9));

    // A socket that the client has opened for it, as a service manager does.
    let ours = env!("CARGO_BIN_EXE_blockmirror");
    run("nbdcopy", &["--", "[", ours, "serve", "disk", "]", "captive"]);
    assert!(fs::read(place.path("captive")).unwrap() == fs::read(place.path("disk")).unwrap());
}

#[test]
fn a_signal_disconnects_clients() {
    let place = Place::new();
    blocks(&place, "disk");
    let serving = Serving::start(&place, "--socket s disk", 1);
    // A client that is slow, and would be connected for hours.
    let line = format!("convert -q --granularity 64K --speed 1 {} target", serving.uris[0]);
    let mut copy = shell(&place, ":", &line).spawn().unwrap();
    crate::process::wait_until("the copy does not begin", || place.names().len() > 2);
    let ended = serving.end("TERM");
    copy.kill().unwrap();
    copy.wait().unwrap();
    assert_eq!(ended, Some(0));
    assert!(!place.path("s").exists());
}

/// It was served without TLS: only an address of the command line was looked at.
#[test]
fn an_inherited_socket_of_the_network_needs_tls() {
    let place = Place::new();
    blocks(&place, "disk");
    let socket = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let first = "export LISTEN_FDS=1 LISTEN_PID=$$; exec 3<&0 0</dev/null";
    let mut command = shell(&place, first, "serve disk");
    let child = command.stdin(OwnedFd::from(socket)).stderr(Stdio::piped()).spawn().unwrap();
    let want = "blockmirror: a socket of the service manager: other hosts reach it; \
                --tls-certificates encrypts, --no-tls serves without\n";
    assert_eq!(crate::process::output(child), (Some(2), want.to_owned()));
}

/// A daemon in the background works in `/`, and its nodes were named from where it was started.
#[test]
fn a_daemon_in_the_background_finds_a_server_that_was_away() {
    let place = Place::new();
    let bytes = blocks(&place, "disk");
    let serving = Serving::start(&place, "--socket s -x disk disk", 1);
    let node = "driver=nbd,node-name=peer,server.type=unix,server.path=s,export=disk,read-only=on,\
                reconnect-delay=60,open-timeout=60";
    let line = format!(
        "daemon --daemonize --pidfile pid --blockdev {node} --nbd-server addr.type=unix,addr.path=own \
         --export nbd,id=disk,name=disk,node-name=peer"
    );
    let started = shell(&place, ":", &line).stdout(Stdio::null()).status().unwrap();
    assert_eq!(started.code(), Some(0));
    assert_eq!(serving.end("TERM"), Some(0));
    let serving = Serving::start(&place, "--socket s -x disk disk", 1);
    let uri = format!("nbd+unix:///disk?socket={}", place.path("own").display());
    let copied = place.ours(&format!("convert -q {uri} @copy"));
    let pid = fs::read_to_string(place.path("pid")).unwrap();
    assert!(Command::new("kill").arg(pid.trim()).status().unwrap().success());
    assert_eq!((copied.code, copied.err.as_str()), (0, ""));
    assert!(fs::read(place.path("copy")).unwrap() == bytes);
    drop(serving);
}
