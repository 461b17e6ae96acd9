//! The command as its parent process sees it: signals, streams that cannot be written, and exit codes.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use blockmirror_testing::process::with_default_signals;

use crate::common::Place;

const OURS: &str = env!("CARGO_BIN_EXE_blockmirror");
/// Nothing here takes longer, on a machine that works at all.
const LIMIT: Duration = Duration::from_secs(60);

/// `blockmirror` with the words of `line`, started by a shell that does `first` before, in the folder of
/// `place`.
pub(crate) fn shell(place: &Place, first: &str, line: &str) -> Command {
    let mut command = with_default_signals("sh");
    command.args(["-c", &format!("{first}; exec \"$0\" \"$@\""), OURS]).args(line.split(' '));
    command.current_dir(place.path(".")).stdin(Stdio::null());
    command
}

/// A daemon with a monitor at the socket `qmp`; killed if the test fails.
struct Daemon(Child);

impl Daemon {
    fn start(place: &Place, first: &str) -> Self {
        let line =
            "daemon --pidfile pid --chardev socket,id=c,path=qmp,server=on,wait=off --monitor chardev=c";
        let daemon = Self(shell(place, first, line).spawn().unwrap());
        wait_until("the daemon does not start", || place.path("pid").exists());
        daemon
    }

    /// Sends it a signal that ends it; returns its exit code.
    fn end(mut self, name: &str) -> Option<i32> {
        signal(&self.0, name);
        self.0.wait().unwrap().code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status().unwrap();
    assert!(sent.success(), "kill -{name}");
}

/// Waits until `done` says so.
pub(crate) fn wait_until(what: &str, done: impl Fn() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A copy that stands still once its target is there.
fn standing_copy(place: &Place, first: &str) -> Child {
    fs::write(place.path("source"), vec![7; 4 << 20]).unwrap();
    let line = "convert -f raw --granularity 64K --buf-size 64K --speed 1 source target";
    let child = shell(place, first, line).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("the copy does not begin", || place.names().len() > 1);
    child
}

pub(crate) fn output(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_signal_that_ends_a_copy_is_in_its_exit_code() {
    for (name, code) in
        [("INT", 130), ("TERM", 143), ("HUP", 129), ("USR2", 140), ("XCPU", 152), ("ALRM", 142)]
    {
        let place = Place::new();
        let child = standing_copy(&place, ":");
        signal(&child, name);
        let (ended, said) = output(child);
        assert_eq!((ended, place.names()), (Some(code), vec!["source".to_owned()]), "{name}: {said}");
        assert_eq!(said, "blockmirror: copy: target: cancelled\n", "{name}");
    }
}

/// As `timeout`, systemd and closed terminals send them. The process is stopped until all have come.
#[test]
fn signals_that_come_together_are_one_request() {
    for (names, codes) in [("TERM HUP", [143, 129]), ("INT TERM", [130, 143]), ("HUP USR2", [129, 140])] {
        let place = Place::new();
        let child = standing_copy(&place, ":");
        for name in ["STOP"].into_iter().chain(names.split(' ')).chain(["CONT"]) {
            signal(&child, name);
        }
        let (ended, said) = output(child);
        assert_eq!(place.names(), ["source"], "{names}: {said}");
        assert_eq!(said, "blockmirror: copy: target: cancelled\n", "{names}");
        assert!(ended.is_some_and(|code| codes.contains(&code)), "{names}: {ended:?}");
    }
}

/// The copy cannot end: its progress goes into a pipe that is full.
#[test]
fn a_later_signal_ends_at_once_and_leaves_nothing() {
    let place = Place::new();
    fs::write(place.path("source"), vec![7; 4 << 20]).unwrap();
    let (reader, mut writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while writer.write(&[b' '; 4096]).is_ok() {}
    while writer.write(b" ").is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    let line = "convert -q --progress=json -f raw --granularity 64K --buf-size 64K --speed 1 source target";
    let mut child = shell(&place, ":", line).stdout(Stdio::null()).stderr(writer).spawn().unwrap();
    // Before the copy starts the partial file has its length.
    let len = |name: &String| fs::metadata(place.path(name)).map_or(0, |meta| meta.len());
    wait_until("the copy does not begin", || {
        place.names().iter().any(|name| name.ends_with(".partial") && len(name) == 4 << 20)
    });
    let since = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(since.elapsed() < LIMIT, "it does not end");
        signal(&child, "TERM");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert_eq!(place.names(), ["source"]);
    drop(reader);
}

#[test]
fn preallocation_is_interrupted() {
    for line in [
        "create -f raw -o preallocation=full big 1T",
        "create -f qcow2 -o preallocation=full big 1T",
        "convert -f raw -o preallocation=full source big",
        "convert -f raw -O qcow2 -o preallocation=full source big",
    ] {
        let place = Place::new();
        File::create(place.path("source")).unwrap().set_len(1 << 40).unwrap();
        // Were it not interrupted, it would fail.
        let mut command = shell(&place, "ulimit -f 4194304", line);
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let len = |name: &String| fs::metadata(place.path(name)).map_or(0, |meta| meta.len());
        wait_until("nothing is written", || {
            place.names().iter().any(|name| name.ends_with(".partial") && len(name) > 1 << 20)
        });
        signal(&child, "TERM");
        let (ended, said) = output(child);
        assert_eq!((ended, place.names()), (Some(143), vec!["source".to_owned()]), "{line}: {said}");
        assert_eq!(said, "blockmirror: create: big: interrupted\n", "{line}");
    }
}

#[test]
fn a_length_that_is_refused_leaves_the_target_as_it_is() {
    let place = Place::new();
    for line in [
        "create --in-place -f raw t 4M",
        "create --in-place -f raw -o preallocation=falloc t 4M",
        "create --in-place -f raw -o preallocation=full t 4M",
        "create --in-place --force -f qcow2 -o data_file=t image 4M",
        "create --in-place --force -f qcow2 -o preallocation=full t 4M",
    ] {
        fs::write(place.path("t"), "old").unwrap();
        fs::write(place.path("image"), "image").unwrap();
        let output = shell(&place, "ulimit -f 2048", line).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{line}: {said}");
        assert!(said.contains("File too large") && !said.contains("incomplete"), "{line}: {said}");
        assert_eq!(fs::read(place.path("t")).unwrap(), b"old", "{line}");
        assert_eq!(fs::read(place.path("image")).unwrap(), b"image", "{line}");
    }
}

/// By another name of the server's socket.
#[test]
fn an_export_that_is_copied_onto_itself_stays_as_it_is() {
    let place = Place::new();
    let data: Vec<u8> = (0..1_u32 << 20).map(|at| (at % 251) as u8).collect();
    fs::write(place.path("disk"), &data).unwrap();
    let daemon = "daemon --pidfile pid --nbd-server addr.type=unix,addr.path=nbd \
         --blockdev file,node-name=d,filename=disk --export nbd,id=d,node-name=d,writable=on";
    let daemon = Daemon(shell(&place, ":", daemon).spawn().unwrap());
    wait_until("the daemon does not start", || place.path("pid").exists());
    fs::hard_link(place.path("nbd"), place.path("other")).unwrap();
    let (one, two) = ("nbd+unix:///d?socket=@nbd", "nbd+unix:///d?socket=@other");
    for line in [
        format!("convert -q -f raw {one} {two}"),
        format!("mirror -q -f raw {one} {two}"),
        format!("convert -q -U -f raw @disk {two}"),
    ] {
        place.ours_ok(&line);
        assert!(fs::read(place.path("disk")).unwrap() == data, "{line}");
    }
    assert_eq!(daemon.end("TERM"), Some(0));
}

#[test]
fn signals_that_the_parent_ignores_stay_ignored_and_usr1_shows_progress() {
    let place = Place::new();
    let mut child = standing_copy(&place, "trap '' HUP INT");
    // Of several signals that wait, the kernel delivers the lower number first: these two before USR1.
    for name in ["HUP", "INT", "USR1"] {
        signal(&child, name);
    }
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.starts_with('[') && line.contains(" of 4 MiB done"), "{line:?}");
    assert_eq!(child.try_wait().unwrap(), None, "the copy goes on");
    signal(&child, "TERM");
    assert_eq!(output(child).0, Some(143));
    // A signal of the second kind that is ignored: nothing is printed, and nothing ends.
    let place = Place::new();
    let child = standing_copy(&place, "trap '' USR1 TERM");
    for name in ["USR1", "TERM", "HUP"] {
        signal(&child, name);
    }
    assert_eq!(output(child), (Some(129), "blockmirror: copy: target: cancelled\n".to_owned()));
}

#[test]
fn a_daemon_survives_what_is_ignored_and_ends_well_when_asked() {
    for (ignored, ends) in [("HUP INT", "TERM"), ("TERM", "INT"), ("INT", "HUP")] {
        let place = Place::new();
        let daemon = Daemon::start(&place, &format!("trap '' {ignored}"));
        for name in ignored.split(' ').chain(["USR1", "XFSZ"]) {
            signal(&daemon.0, name);
        }
        let socket = place.path("qmp");
        assert_eq!(place.ours_ok(&format!("ctl {} jobs", socket.display())), "no jobs\n", "{ignored}");
        assert_eq!(daemon.end(ends), Some(0), "{ends}");
        assert!(!place.path("pid").exists());
    }
}

#[test]
fn a_limit_for_file_sizes_is_an_error_of_the_target() {
    let place = Place::new();
    fs::write(place.path("source"), vec![7; 4 << 20]).unwrap();
    for line in ["convert -f raw source target", "mirror -O qcow2 -f raw source target", "create disk 4M"] {
        let output = shell(&place, "ulimit -f 2048", line).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{line}: {said}");
        assert!(said.contains("File too large") && said.lines().count() == 1, "{line}: {said}");
        assert_eq!(place.names(), ["source"], "{line}");
    }
}

/// What the standard output can be that takes nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Bad {
    /// A pipe that nothing reads.
    Pipe,
    Full,
    /// Both streams are closed.
    Closed,
}

fn run_into(place: &Place, bad: Bad, line: &str) -> Output {
    let mut command = shell(place, ":", line);
    match bad {
        Bad::Pipe => {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            command.stdout(writer);
        }
        Bad::Full => {
            command.stdout(File::options().write(true).open("/dev/full").unwrap());
        }
        Bad::Closed => command = shell(place, "exec >&- 2>&-", line),
    }
    command.stderr(Stdio::piped()).output().unwrap()
}

#[test]
fn a_copy_does_not_depend_on_the_standard_output() {
    let mut tried = 0;
    for bad in [Bad::Pipe, Bad::Full, Bad::Closed] {
        let place = Place::new();
        fs::write(place.path("source"), vec![7; 1 << 20]).unwrap();
        fs::write(place.path("there"), vec![0; 1 << 20]).unwrap();
        for (line, made) in [
            ("convert -f raw source t1", "t1"),
            ("convert -f raw --output=json source t2", "t2"),
            ("mirror -f raw -p source t3", "t3"),
            ("mirror -f raw --progress=json -n -O raw source there", "there"),
        ] {
            let output = run_into(&place, bad, line);
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(0), "{bad:?}: {line}: {said}");
            assert_eq!(fs::read(place.path(made)).unwrap(), vec![7; 1 << 20], "{bad:?}: {line}");
            assert_eq!(said.contains("standard output"), bad == Bad::Full, "{bad:?}: {line}: {said}");
            tried += 1;
        }
        for (line, len) in [("create new 1M", 1 << 20), ("resize -f raw new 2M", 2 << 20)] {
            let output = run_into(&place, bad, line);
            assert_eq!(output.status.code(), Some(0), "{bad:?}: {line}: {output:?}");
            assert_eq!(fs::metadata(place.path("new")).unwrap().len(), len);
            tried += 1;
        }
        assert_eq!(place.names(), ["new", "source", "t1", "t2", "t3", "there"]);
    }
    assert_eq!(tried, 18);
}

#[test]
fn a_result_that_cannot_be_printed_is_a_failure_that_is_said() {
    let place = Place::new();
    fs::write(place.path("a"), vec![7; 1 << 20]).unwrap();
    fs::copy(place.path("a"), place.path("b")).unwrap();
    let daemon = Daemon::start(&place, ":");
    for (line, failed) in [
        ("info -f raw a", 1),
        ("info -f raw --output=json a", 1),
        ("info -f raw --backing-chain a", 1),
        ("map -f raw a", 1),
        ("map -f raw --output=json a", 1),
        ("compare -f raw -F raw a b", 2),
        ("compare -f raw -F raw --output=json a b", 2),
        ("convert -f raw --dry-run a c", 1),
        ("mirror -f raw --dry-run --output=json a c", 1),
        ("create -f qcow2 -o help", 1),
        ("convert -O qcow2 -o help a c", 1),
        ("mirror -o help a c", 1),
        ("ctl qmp jobs", 1),
        ("ctl qmp jobs --output=json", 1),
        ("--help", 1),
        ("ctl --help", 1),
        ("--version", 1),
    ] {
        let full = run_into(&place, Bad::Full, line);
        let said = String::from_utf8(full.stderr).unwrap();
        assert_eq!(full.status.code(), Some(failed), "{line}: {said}");
        // The message is the whole line, or a string in it under `--output=json`.
        let end = if line.contains("--output=json") { "\",\"exit-code\":" } else { "\n" };
        let message = format!("standard output: No space left on device (os error 28){end}");
        assert!(said.contains(&message) && said.lines().count() == 1, "{line}: {said}");
        let pipe = run_into(&place, Bad::Pipe, line);
        let said = String::from_utf8(pipe.stderr).unwrap();
        assert_eq!((pipe.status.code(), said.as_str()), (Some(141), ""), "{line}");
    }
    assert_eq!(daemon.end("TERM"), Some(0));
    assert!(!Path::new(&place.path("c")).exists());
}

#[test]
fn a_copy_that_gave_ranges_up_has_an_exit_code_of_its_own() {
    let place = Place::new();
    fs::write(place.path("source"), vec![7; 1 << 20]).unwrap();
    let fault = "inject-error.0.event=read_aio,inject-error.0.sector=1024";
    let line = format!(
        "daemon --pidfile pid --nbd-server addr.type=unix,addr.path=nbd \
         --blockdev driver=blkdebug,node-name=bad,image.driver=file,image.filename=source,{fault} \
         --export nbd,id=bad,node-name=bad"
    );
    let daemon = Daemon(shell(&place, ":", &line).spawn().unwrap());
    wait_until("the daemon does not start", || place.path("pid").exists());
    let source = "nbd+unix:///bad?socket=@nbd";
    for policy in ["--on-source-error ignore", "--salvage"] {
        let ran = place.ours(&format!("convert {policy} -f raw {source} @target"));
        assert_eq!(ran.code, 3, "{policy}: {ran:?}");
        assert!(ran.err.contains("failed range: ") && ran.err.contains("bytes 524288 to "), "{ran:?}");
        let copied = fs::read(place.path("target")).unwrap();
        assert!(copied[..524_288].iter().all(|byte| *byte == 7) && copied[524_288] == 0, "{policy}");
    }
    assert_eq!(place.ours(&format!("convert -f raw {source} @other")).code, 1);
    let both = place.ours(&format!("convert --salvage --on-source-error ignore -f raw {source} @other"));
    assert_eq!(both.code, 2, "{both:?}");
    assert_eq!(daemon.end("TERM"), Some(0));
}

/// An NBD server of one export of zeros that knows READ and WRITE and nothing else, so no FLUSH; with `hangs`
/// it answers no request. Returns how many it has got to write.
pub(crate) fn plain_server(path: &Path, len: u64, hangs: bool) -> Arc<AtomicU32> {
    let listener = UnixListener::bind(path).unwrap();
    let writes = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&writes);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            // A client that goes in the middle is no fault of the test.
            let counted = Arc::clone(&counted);
            std::thread::spawn(move || serve_plainly(stream, len, hangs, &counted).unwrap_or(()));
        }
    });
    writes
}

fn serve_plainly(mut stream: UnixStream, len: u64, hangs: bool, writes: &AtomicU32) -> std::io::Result<()> {
    fn take<const N: usize>(stream: &mut UnixStream) -> std::io::Result<[u8; N]> {
        let mut bytes = [0; N];
        stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    let client_flags = u32::from_be_bytes(take(&mut stream)?);
    loop {
        take::<8>(&mut stream)?;
        let option: [u8; 4] = take(&mut stream)?;
        let size = u32::from_be_bytes(take(&mut stream)?);
        std::io::copy(&mut (&stream).take(size.into()), &mut std::io::sink())?;
        if u32::from_be_bytes(option) == 1 {
            break;
        }
        let refusal = [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &option, &[0x80, 0, 0, 1], &[0; 4]];
        stream.write_all(&refusal.concat())?;
    }
    stream.write_all(&[&len.to_be_bytes()[..], &[0, 1]].concat())?;
    if client_flags & 2 == 0 {
        stream.write_all(&[0; 124])?;
    }
    loop {
        take::<6>(&mut stream)?;
        let command = u16::from_be_bytes(take(&mut stream)?);
        let cookie: [u8; 8] = take(&mut stream)?;
        take::<8>(&mut stream)?;
        let size = u32::from_be_bytes(take(&mut stream)?);
        if command == 1 {
            writes.fetch_add(1, Ordering::SeqCst);
            std::io::copy(&mut (&stream).take(size.into()), &mut std::io::sink())?;
        }
        if hangs {
            continue;
        }
        assert!(command <= 2, "{command}");
        let data = if command == 0 { vec![0; size as usize] } else { Vec::new() };
        stream.write_all(&[&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &cookie, &data].concat())?;
    }
}

#[test]
fn a_target_that_cannot_flush_is_named_or_refused() {
    let place = Place::new();
    fs::write(place.path("source"), vec![7; 1 << 20]).unwrap();
    let writes = plain_server(&place.path("nbd"), 1 << 20, false);
    // Before the first byte.
    for line in ["convert -f raw", "convert -f raw -O qcow2", "mirror -f raw"] {
        let ran = place.ours(&format!("{line} --require-flush @source nbd+unix:///?socket=@nbd"));
        assert_eq!((ran.code, ran.err.lines().count()), (1, 1), "{ran:?}");
        assert!(ran.err.contains("no flush command, which --require-flush requires"), "{ran:?}");
        assert_eq!(writes.load(Ordering::SeqCst), 0, "{line}");
    }
    let line = "-n -O raw -f raw @source nbd+unix:///?socket=@nbd";
    for command in ["convert", "mirror"] {
        let ran = place.ours(&format!("{command} {line}"));
        assert_eq!(ran.code, 0, "{ran:?}");
        assert!(ran.err.contains("no flush command: the copy may not be durable"), "{ran:?}");
        let ran = place.ours(&format!("{command} --require-flush {line}"));
        assert_eq!((ran.code, ran.err.lines().count()), (1, 1), "{ran:?}");
        assert!(ran.err.contains("no flush command, which --require-flush requires"), "{ran:?}");
    }
    place.ours_ok("convert -q --require-flush -f raw @source @target");
}

#[test]
fn a_server_that_does_not_answer_is_given_up_after_the_time_that_is_asked_for() {
    let place = Place::new();
    plain_server(&place.path("nbd"), 1 << 20, true);
    let since = Instant::now();
    let ran = place.ours("convert --io-timeout 1 -f raw nbd+unix:///?socket=@nbd @target");
    assert_eq!((ran.code, ran.err.lines().count()), (1, 1), "{ran:?}");
    assert!(since.elapsed() < LIMIT);
    assert!(place.names().iter().all(|name| name != "target"));
    assert_eq!(place.ours("convert --io-timeout 0 -f raw nbd+unix:///?socket=@nbd @target").code, 2);
}

#[test]
fn nothing_is_printed_into_the_target() {
    let place = Place::new();
    let data: Vec<u8> = (0..1_u32 << 20).map(|at| (at % 251) as u8).collect();
    fs::write(place.path("source"), &data).unwrap();
    place.ours_ok("convert -O qcow2 -f raw @source @source.qcow2");
    let created = "create -q -f raw @empty 1M";
    place.ours_ok(created);
    let mut tried = 0;
    // What the shell does with its streams before, the command, the raw image that must come out, what it
    // holds.
    for (first, line, made, wanted) in [
        ("exec > t", "convert -f raw source /dev/stdout", "t", "source"),
        ("exec > t", "convert -f raw source /proc/self/fd/1", "t", "source"),
        ("exec > t", "convert -f raw source t", "t", "source"),
        ("exec > t", "convert -f raw --output=json source t", "t", "source"),
        ("exec > t", "convert -f raw -O qcow2 source /dev/stdout", "t", "source.qcow2"),
        ("exec > t", "mirror --output=json source.qcow2 /dev/stdout", "t", "source.qcow2"),
        ("exec > t 2>&1", "mirror -p -f raw source /dev/stderr", "t", "source"),
        ("exec 2> t", "convert -p -f raw source /dev/stderr", "t", "source"),
        ("exec 2> t", "convert --progress=json -f raw source t", "t", "source"),
        ("export RUST_LOG=debug; exec 2> t", "convert -f raw source t", "t", "source"),
        ("head -c 1M /dev/zero > t; exec 1<>t", "convert -n -f raw source t", "t", "source"),
        ("head -c 1M /dev/zero > t; exec 2<>t", "convert -n -p -f raw source t", "t", "source"),
        ("exec > t", "create -f raw /dev/stdout 1M", "t", "empty"),
        ("exec > t", "create -f raw t 1M", "t", "empty"),
        ("exec > t", "create -f qcow2 -o data_file=t --force t.q 1M", "t", "empty"),
        ("cp source t; exec 1<>t", "resize -f raw t 1M", "t", "source"),
        ("cp source t; exec 2<>t", "resize -f raw /dev/stderr 1M", "t", "source"),
    ] {
        let _ = fs::remove_file(place.path("t.q"));
        let output = shell(&place, first, line).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{first}; {line}: {output:?}");
        let format = if wanted == "source.qcow2" { "qcow2" } else { "raw" };
        let same = place.ours(&format!("compare -s -f {format} -F {format} @{wanted} @{made}"));
        let head = fs::read(place.path(made)).unwrap();
        let head = String::from_utf8_lossy(&head[..80]).into_owned();
        assert_eq!(
            (same.code, same.out.as_str()),
            (0, "Images are identical.\n"),
            "{first}; {line}: {head:?}"
        );
        tried += 1;
    }
    assert_eq!(tried, 17);
    // An error neither, nor what would be the result.
    for (first, line, code) in [
        ("exec 2<>t", "resize -f raw t -1M", 2),
        ("exec 2<>t", "convert -n -f raw missing t", 1),
        ("exec 2<>t", "convert -n -f raw t t", 1),
        ("exec 1<>t", "convert --dry-run -f raw source t", 1),
    ] {
        let output = shell(&place, &format!("cp source t; {first}"), line).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{first}; {line}: {output:?}");
        assert_eq!(fs::read(place.path("t")).unwrap(), data, "{first}; {line}");
    }
    // Into other files it is, as ever.
    let output = shell(&place, "exec > said", "convert -f raw source t").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = fs::read_to_string(place.path("said")).unwrap();
    assert!(said.contains("source -> t (raw): 1 MiB"), "{said}");
}
