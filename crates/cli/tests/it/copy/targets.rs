//! What a target file is: each row of the table in LIMITS. Some rows need root, mounts or another user, and
//! are skipped visibly without.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::common::Place;
use crate::copy::source;

/// Runs a tool of the system; `None`, and says so, if that is not possible.
pub(crate) fn system(words: &str) -> Option<Output> {
    let mut parts = words.split_whitespace();
    match Command::new(parts.next()?).args(parts).output() {
        Ok(out) if out.status.success() => Some(out),
        Ok(out) => {
            blockmirror_testing::skip_unsupported(format_args!(
                "{words}: {}",
                String::from_utf8_lossy(&out.stderr).trim()
            ));
            None
        }
        Err(e) => {
            blockmirror_testing::skip_unsupported(format_args!("{words}: {e}"));
            None
        }
    }
}

/// A mount, undone when dropped.
pub(crate) struct Mount(String);

impl Mount {
    pub(crate) fn new(options: &str, what: &Path, on: &Path) -> Option<Self> {
        system(&format!("mount {options} {} {}", what.display(), on.display()))?;
        Some(Self(on.display().to_string()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A loop device, detached when dropped.
pub(crate) struct Loop(pub(crate) String);

impl Loop {
    pub(crate) fn new(file: &Path) -> Option<Self> {
        Self::with("", file)
    }

    pub(crate) fn with(options: &str, file: &Path) -> Option<Self> {
        let out = system(&format!("losetup --find --show {options} {}", file.display()))?;
        Some(Self(String::from_utf8(out.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// The binary as a process of its own.
fn spawn(place: &Place, line: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blockmirror"));
    command.current_dir(place.path("")).args(line.split_whitespace()).stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

pub(super) fn is_copied(place: &Place, to: &Path) {
    assert!(fs::read(place.path("source")).unwrap() == fs::read(to).unwrap(), "{}", to.display());
}

#[test]
fn a_file_that_is_held_open_is_written_in_place_and_its_holder_sees_it() {
    let place = Place::new();
    source(&place);
    fs::write(place.path("t"), "old and longer than nothing").unwrap();
    let mut held = File::open(place.path("t")).unwrap();
    let ran = place.ours("convert -f raw @source @t");
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(
        ran.err.contains("t: written in place (")
            && ran.err.contains(" has it open): a failure leaves it unusable"),
        "{ran:?}"
    );
    let mut seen = Vec::new();
    held.read_to_end(&mut seen).unwrap();
    assert!(seen == fs::read(place.path("source")).unwrap());
    drop(held);
    let inode = fs::metadata(place.path("t")).unwrap().ino();
    let ran = place.ours("convert -f raw @source @t");
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "without a holder it is replaced");
    assert_ne!(fs::metadata(place.path("t")).unwrap().ino(), inode);
}

#[test]
fn hard_links_want_a_choice() {
    let place = Place::new();
    source(&place);
    let link = || {
        let _ = fs::remove_file(place.path("other"));
        fs::write(place.path("t"), "old").unwrap();
        fs::hard_link(place.path("t"), place.path("other")).unwrap();
    };
    link();
    let said = place.ours_fails("convert -f raw @source @t", 1);
    assert!(said.contains("it has 2 hard links; --in-place writes into it, --atomic replaces it"), "{said}");
    let said = place.ours_fails("create @t 1M", 1);
    assert!(said.contains("2 hard links"), "{said}");
    assert_eq!(place.ours_fails("convert --dry-run -f raw @source @t", 1).matches("--atomic").count(), 1);
    assert_eq!(fs::read(place.path("other")).unwrap(), b"old");
    place.ours_ok("convert -f raw --in-place @source @t");
    is_copied(&place, &place.path("other"));
    link();
    place.ours_ok("convert -f raw --atomic @source @t");
    is_copied(&place, &place.path("t"));
    assert_eq!(fs::read(place.path("other")).unwrap(), b"old");
}

#[test]
fn a_descriptor_is_written_in_place() {
    let place = Place::new();
    source(&place);
    fs::write(place.path("t"), vec![1; 8 << 20]).unwrap();
    let file = File::options().read(true).write(true).open(place.path("t")).unwrap();
    for name in ["/dev/fd/", "/proc/self/fd/"] {
        let target = format!("{name}{}", file.as_raw_fd());
        let ran = place.ours(&format!("convert -f raw @source {target}"));
        assert_eq!(ran.code, 0, "{ran:?}");
        assert!(ran.err.contains("in place (it is an open descriptor)"), "{ran:?}");
        is_copied(&place, &place.path("t"));
        let said = place.ours_fails(&format!("convert -f raw --atomic @source {target}"), 1);
        assert!(said.contains("cannot be replaced atomically: it is an open descriptor"), "{said}");
    }
    // As a memfd, it has no name at all.
    fs::remove_file(place.path("t")).unwrap();
    let target = format!("/proc/self/fd/{}", file.as_raw_fd());
    for format in ["raw", "qcow2"] {
        place.ours_ok(&format!("convert -f raw -O {format} @source {target}"));
        let same = place.ours_ok(&format!("compare -f raw -F {format} @source {target}"));
        assert_eq!(same, "Images are identical.\n");
    }
    assert_eq!(place.names(), ["source"]);
}

#[test]
fn links_lead_to_where_a_new_file_goes() {
    let place = Place::new();
    source(&place);
    fs::create_dir(place.path("d")).unwrap();
    symlink("d/real", place.path("link")).unwrap();
    symlink("link", place.path("link2")).unwrap();
    symlink("nowhere/real", place.path("lost")).unwrap();
    symlink("loop", place.path("loop")).unwrap();
    place.ours_ok("convert -f raw @source @link2");
    assert!(fs::symlink_metadata(place.path("link")).unwrap().is_symlink());
    is_copied(&place, &place.path("d/real"));
    assert_eq!(fs::read_dir(place.path("d")).unwrap().count(), 1);
    for (target, why) in [
        ("d/new/", "it names a directory"),
        ("d/new/.", "it names a directory"),
        ("d/", "it is a directory"),
        ("lost", "No such file"),
        ("loop", "symbolic links"),
        ("d/real/", "Not a directory"),
    ] {
        let said = place.ours_fails(&format!("convert -f raw @source @{target}"), 1);
        assert!(said.contains(why) || said.contains("names a directory"), "{target}: {said}");
    }
    assert!(!place.path("d/new").exists());
}

#[test]
fn a_mount_point_is_written_in_place() {
    let place = Place::new();
    source(&place);
    for name in ["below", "t"] {
        fs::write(place.path(name), "old").unwrap();
    }
    let Some(_mount) = Mount::new("--bind", &place.path("below"), &place.path("t")) else { return };
    let ran = place.ours("convert -f raw @source @t");
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(
        ran.err.contains("written in place (it is a mount point): a failure leaves it unusable"),
        "{ran:?}"
    );
    is_copied(&place, &place.path("below"));
    let ran = place.ours("convert -f raw -O qcow2 @source @t");
    assert!(ran.code == 0 && ran.err.contains("it cannot be opened until it is complete"), "{ran:?}");
    assert_eq!(place.ours_ok("compare -f raw @source @below"), "Images are identical.\n");
    let said = place.ours_fails("convert -f raw --atomic @source @t", 1);
    assert!(said.contains("it is a mount point"), "{said}");
}

#[test]
fn a_loop_device_on_the_target_shows_the_copy() {
    let place = Place::new();
    source(&place);
    fs::write(place.path("t"), vec![1; 4 << 20]).unwrap();
    let Some(device) = Loop::new(&place.path("t")) else { return };
    let ran = place.ours("convert -f raw @source @t");
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.err.contains(&format!("the loop device {} stands on it", device.0)), "{ran:?}");
    is_copied(&place, Path::new(&device.0));
}

/// A filesystem on a loop device is the contents of a disk in use.
#[test]
fn a_mounted_device_is_not_written_unless_forced() {
    let place = Place::new();
    let disk = place.path("disk");
    File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    fs::write(place.path("source"), vec![7; 4 << 20]).unwrap();
    fs::create_dir(place.path("mnt")).unwrap();
    if system(&format!("mkfs.ext4 -q -F {}", disk.display())).is_none() {
        return;
    }
    let Some(device) = Loop::new(&disk) else { return };
    let Some(mount) = Mount::new("-o ro", Path::new(&device.0), &place.path("mnt")) else { return };
    let before = fs::read(&disk).unwrap();
    for line in [
        "convert -f raw @source DEVICE",
        "convert -f raw -n @source DEVICE",
        "convert -f raw -n --dry-run @source DEVICE",
        "mirror -f raw -n @source DEVICE",
        "convert -f raw -O qcow2 @source DEVICE",
        "create -f qcow2 DEVICE 1M",
        "resize -f raw DEVICE 4M",
    ] {
        let said = place.ours_fails(&line.replace("DEVICE", &device.0), 1);
        assert!(
            said.contains(&device.0) && said.contains("mounted on") && said.contains("--force"),
            "{line}: {said}"
        );
    }
    let said = place.ours_fails("convert -f raw @source @disk", 1);
    assert!(said.contains("which is in use") && said.contains("--in-place"), "the file below it: {said}");
    assert!(fs::read(&disk).unwrap() == before);
    // The kernel refuses `fallocate` there: zeros are written.
    fs::write(place.path("source"), [vec![7; 2 << 20], vec![0; 2 << 20]].concat()).unwrap();
    place.ours_ok(&format!("convert -f raw -n --force @source {}", device.0));
    assert_eq!(
        place.ours_ok(&format!("compare -f raw -F raw @source {}", device.0)),
        "Images are identical.\n"
    );
    drop(mount);
}

#[test]
fn no_room_for_old_and_new_wants_a_choice() {
    let place = Place::new();
    fs::create_dir(place.path("small")).unwrap();
    let Some(_mount) = Mount::new("-t tmpfs -o size=8M", Path::new("none"), &place.path("small")) else {
        return;
    };
    fs::write(place.path("source"), vec![7; 5 << 20]).unwrap();
    fs::write(place.path("small/t"), vec![1; 5 << 20]).unwrap();
    let said = place.ours_fails("convert -f raw @source @small/t", 1);
    assert!(said.contains("do not fit at once") && said.contains("--in-place"), "{said}");
    assert_eq!(place.ours("convert -f raw --atomic @source @small/t").code, 1);
    assert_eq!(fs::read(place.path("small/t")).unwrap(), vec![1; 5 << 20]);
    assert_eq!(fs::read_dir(place.path("small")).unwrap().count(), 1);
    place.ours_ok("convert -f raw --in-place @source @small/t");
    is_copied(&place, &place.path("small/t"));
}

/// The binary as another user, in the folder of `place`; `None`, and says so, if that is not possible.
pub(crate) fn run_as_nobody(place: &Place, line: &str) -> Option<Output> {
    let program = place.path("program");
    if !program.exists() {
        fs::copy(env!("CARGO_BIN_EXE_blockmirror"), &program).unwrap();
    }
    let line = format!("--reuid=65534 --regid=65534 --clear-groups -- ./program {line}");
    match Command::new("setpriv").current_dir(place.path("")).args(line.split(' ')).output() {
        // Its own failure.
        Ok(out) if out.status.code() == Some(127) || out.stderr.starts_with(b"setpriv:") => {
            blockmirror_testing::skip_unsupported(format_args!(
                "{}",
                String::from_utf8_lossy(&out.stderr).trim()
            ));
            None
        }
        Ok(out) => Some(out),
        Err(e) => {
            blockmirror_testing::skip_unsupported(format_args!("setpriv: {e}"));
            None
        }
    }
}

/// As another user, in directories that are not all of it.
#[test]
fn what_the_directory_does_not_allow_is_written_in_place() {
    let place = Place::new();
    source(&place);
    let set =
        |name: &str, mode| fs::set_permissions(place.path(name), fs::Permissions::from_mode(mode)).unwrap();
    set("", 0o755);
    set("source", 0o644);
    let run = |line: &str| run_as_nobody(&place, line);
    if run("--version").is_none() {
        return;
    }
    for (directory, mode, why) in [
        ("closed", 0o755, "its directory is not writable"),
        ("sticky", 0o1777, "it is another user's file in a sticky directory"),
    ] {
        fs::create_dir(place.path(directory)).unwrap();
        let target = format!("{directory}/t");
        fs::write(place.path(&target), "old").unwrap();
        set(&target, 0o666);
        set(directory, mode);
        let out = run(&format!("convert -f raw source {target}")).unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(0), "{directory}: {said}");
        assert!(said.contains(why), "{directory}: {said}");
        is_copied(&place, &place.path(&target));
        let out = run(&format!("convert -f raw --atomic source {target}")).unwrap();
        assert!(String::from_utf8(out.stderr).unwrap().contains(why));
        assert_eq!(out.status.code(), Some(1));
    }
    // It may be written, not read: the copy is complete all the same.
    fs::create_dir(place.path("drop")).unwrap();
    set("drop", 0o333);
    for _ in 0..2 {
        let out = run("convert -f raw source drop/t").unwrap();
        assert_eq!(out.status.code(), Some(0), "{out:?}");
        is_copied(&place, &place.path("drop/t"));
    }
    assert_eq!(fs::read_dir(place.path("drop")).unwrap().count(), 1);
    // A file whose owner cannot be kept.
    fs::create_dir(place.path("open")).unwrap();
    set("open", 0o777);
    fs::write(place.path("open/t"), "old").unwrap();
    set("open/t", 0o666);
    let out = run("convert --atomic -f raw source open/t").unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("cannot be replaced atomically: its owner cannot be kept"), "{said}");
    assert_eq!((out.status.code(), &*fs::read(place.path("open/t")).unwrap()), (Some(1), &b"old"[..]));
    let out = run("convert -f raw source open/t").unwrap();
    assert!(String::from_utf8_lossy(&out.stderr).contains("its owner cannot be kept"), "{out:?}");
    assert_eq!(
        fs::metadata(place.path("open/t")).unwrap().uid(),
        fs::metadata(place.path("source")).unwrap().uid()
    );
    is_copied(&place, &place.path("open/t"));
    assert_eq!(fs::read_dir(place.path("open")).unwrap().count(), 1);
}

/// Starts a copy that takes long, waits until `begun`, and kills it.
fn kill_a_copy(place: &Place, options: &str, begun: impl Fn() -> bool) {
    fs::write(place.path("source"), vec![7; 8 << 20]).unwrap();
    let mut child = spawn(place, &format!("convert -f raw --speed 1M {options} source t"));
    for _ in 0..500 {
        if begun() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert!(begun(), "{options}: {:?}", child.try_wait());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_killed_copy_in_place_opens_nowhere() {
    for compat in ["0.10", "1.1"] {
        let place = Place::new();
        place.ours_ok("create -q -f qcow2 @t 4M");
        let (target, old) = (place.path("t"), fs::metadata(place.path("t")).unwrap().ino());
        kill_a_copy(&place, &format!("-O qcow2 -o compat={compat} --in-place"), || {
            fs::metadata(&target).unwrap().len() > (1 << 20)
        });
        assert_eq!(fs::metadata(&target).unwrap().ino(), old);
        for command in ["info @t", "convert @t @u", "resize @t 9M"] {
            let said = place.ours_fails(command, 1);
            assert!(said.contains("a copy into it was interrupted"), "{command}: {said}");
        }
        if crate::common::have_qemu("a killed copy in place") {
            assert_ne!(place.theirs("qemu-img", "info @t").code, 0);
        }
        // Written once more it is an image again.
        place.ours_ok("convert -f raw -O qcow2 --in-place @source @t");
        assert_eq!(place.ours_ok("compare -f raw @source @t"), "Images are identical.\n");
    }
}

#[test]
fn what_a_killed_copy_leaves_is_named_and_cleaned() {
    let place = Place::new();
    let partials =
        || -> Vec<_> { place.names().into_iter().filter(|name| name.ends_with(".partial")).collect() };
    kill_a_copy(&place, "", || !partials().is_empty());
    let [left] = &*partials() else { panic!("{:?}", place.names()) };
    // Not ours: the form is another.
    for other in [".t.12345.partial", ".t.0123abcg.partial", ".tt.0123abcd.partial"] {
        fs::write(place.path(other), "").unwrap();
    }
    let ran = place.ours("convert -f raw @source @t");
    assert_eq!(ran.code, 0);
    assert_eq!(ran.err.lines().count(), 1, "{ran:?}");
    assert!(ran.err.contains(&**left) && ran.err.contains("kept; --clean removes it"), "{ran:?}");
    // One that is in use belongs to a run that goes on.
    fs::remove_file(place.path("t")).unwrap();
    let mut living = spawn(&place, "convert -f raw --speed 1M source t");
    while partials().len() < 5 {
        assert!(living.try_wait().unwrap().is_none());
    }
    std::thread::sleep(std::time::Duration::from_millis(100));
    let ran = place.ours("convert -f raw --clean @source @t");
    assert!(ran.err.contains(&**left) && ran.err.contains(": removed"), "{ran:?}");
    assert!(!partials().contains(left));
    assert_eq!(partials().len(), 4, "{:?}", partials());
    living.kill().unwrap();
    living.wait().unwrap();
}

#[test]
fn a_file_size_limit_leaves_nothing() {
    let place = Place::new();
    fs::write(place.path("source"), vec![7; 4 << 20]).unwrap();
    for command in
        ["convert -f raw source t", "convert -f raw -O qcow2 source t", "create -o preallocation=full t 4M"]
    {
        let program = env!("CARGO_BIN_EXE_blockmirror");
        let line = format!("ulimit -f 1000; exec {program} {command}");
        let out = Command::new("sh").current_dir(place.path("")).args(["-c", &line]).output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{command}: {out:?}");
        assert_eq!(place.names(), ["source"], "{command}");
    }
}

#[test]
fn a_longer_target_keeps_what_lies_past_the_source() {
    const LEN: usize = (4 << 20) - 1536;
    const LONG: usize = 6 << 20;
    let place = Place::new();
    source(&place);
    // It ends inside a cluster of the target, with zeros.
    let bytes = fs::read(place.path("source")).unwrap()[..LEN].to_vec();
    fs::write(place.path("source"), &bytes).unwrap();
    place.ours_ok("convert -q -f raw -O qcow2 @source @source.qcow2");
    let old = vec![0xee; LONG];
    let expected = [&bytes[..], &old[LEN..]].concat();
    for (format, from) in [("raw", "raw"), ("raw", "qcow2"), ("qcow2", "raw"), ("qcow2", "qcow2")] {
        let from_file = if from == "raw" { "source" } else { "source.qcow2" };
        fs::write(place.path("old"), &old).unwrap();
        place.ours_ok(&format!("convert -q -f raw -O {format} @old @t"));
        for command in ["convert", "mirror"] {
            let line = format!("-f {from} -n -O {format} @{from_file} @t");
            place.ours_ok(&format!("{command} --dry-run {line}"));
            let ran = place.ours(&format!("{command} {line}"));
            assert_eq!(ran.code, 0, "{format}: {ran:?}");
            let rest = format!("it is {} bytes longer than the source; they are kept\n", LONG - LEN);
            assert!(ran.err.contains(&rest) && ran.err.lines().count() == 1, "{ran:?}");
            place.ours_ok(&format!("convert -q -f {format} @t @seen"));
            assert!(fs::read(place.path("seen")).unwrap() == expected, "{command} {from} {format}");
        }
    }
    File::create(place.path("short")).unwrap().set_len(1 << 20).unwrap();
    let said = place.ours_fails("convert -f raw -n @source @short", 1);
    assert!(said.contains("1048576"), "{said}");
}
