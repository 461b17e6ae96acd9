//! Bytes that are known by two names: files and the devices on them. A copy never empties what it reads, nor
//! a disk that is in use. Needs loop devices, mounts, other users; skipped visibly without.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use super::targets::{Loop, Mount, run_as_nobody, system};
use crate::common::Place;
use crate::copy::source;

/// The image in `place` that a copy must not change.
fn image(place: &Place, name: &str) -> Vec<u8> {
    source(place);
    fs::copy(place.path("source"), place.path(name)).unwrap();
    fs::read(place.path(name)).unwrap()
}

#[test]
fn a_device_and_the_file_below_it_are_one() {
    let place = Place::new();
    let bytes = image(&place, "disk");
    let Some(device) = Loop::new(&place.path("disk")) else { return };
    let Some(upper) = Loop::new(Path::new(&device.0)) else { return };
    for (source, target) in [
        (&*device.0, "@disk"),
        ("@disk", &*device.0),
        (&*upper.0, "@disk"),
        ("@disk", &*upper.0),
        (&*upper.0, &*device.0),
    ] {
        for options in ["", "-O qcow2", "-n", "--in-place", "--atomic", "--force", "--dry-run", "-U"] {
            for command in ["convert", "mirror"] {
                let line = format!("{command} -f raw {options} {source} {target}").replace("  ", " ");
                let said = place.ours_fails(&line, 1);
                assert!(said.contains("it is part of the source"), "{line}: {said}");
            }
        }
        let line = format!("convert -f raw -O qcow2 --force -o data_file={target} {source} @t");
        let said = place.ours_fails(&line.replace("=@disk", "=disk"), 1);
        assert!(said.contains("it is part of the source"), "{line}: {said}");
    }
    // Nor does an image take the place of what it stands on.
    place.ours_ok(&format!("create -q -u -f qcow2 -b {} -F raw @top 4M", device.0));
    for (backing, format) in [(&*device.0, "raw"), ("top", "qcow2")] {
        for force in ["", "--force "] {
            let said =
                place.ours_fails(&format!("create {force}-f qcow2 -b {backing} -F {format} @disk 1M"), 1);
            assert!(
                said.contains("own backing file") || said.contains("part of the chain"),
                "{backing}: {said}"
            );
        }
    }
    assert!(fs::read(place.path("disk")).unwrap() == bytes);
    // Two devices with a range each are two.
    fs::write(place.path("wide"), vec![5; 8 << 20]).unwrap();
    let with = |options| Loop::with(options, &place.path("wide"));
    let Some(first) = with("--sizelimit 4194304") else { return };
    let Some(second) = with("--offset 4194304") else { return };
    place.ours_ok(&format!("convert -q -f raw -n @disk {}", second.0));
    place.ours_ok(&format!("convert -q -f raw -n {} {}", second.0, first.0));
    let wide = fs::read(place.path("wide")).unwrap();
    assert!(wide[..4 << 20] == bytes && wide[4 << 20..] == bytes);
}

/// A table of partitions with one, in the second MiB: 2048 sectors from 2048 on.
fn partitioned() -> Vec<u8> {
    let mut disk = vec![7; 4 << 20];
    disk[..512].fill(0);
    disk[450] = 0x83;
    disk[454..458].copy_from_slice(&[0, 8, 0, 0]);
    disk[458..462].copy_from_slice(&[0, 8, 0, 0]);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

#[test]
fn a_partition_and_its_disk_are_one() {
    let place = Place::new();
    let disk = place.path("disk");
    fs::write(&disk, partitioned()).unwrap();
    let Some(device) = Loop::with("--partscan", &disk) else { return };
    let partition = format!("{}p1", device.0);
    if !Path::new(&partition).exists() {
        return blockmirror_testing::skip_unsupported(format_args!("no {partition}"));
    }
    for (source, target) in
        [(&*partition, "@disk"), (&*partition, &*device.0), (&*device.0, &*partition), ("@disk", &*partition)]
    {
        let said = place.ours_fails(&format!("convert -f raw {source} {target}"), 1);
        assert!(said.contains("it is part of the source"), "{source} {target}: {said}");
    }
    assert!(fs::read(&disk).unwrap() == partitioned());
}

/// The server that the source comes from may be what has the target open.
#[test]
fn what_a_server_reads_is_not_emptied() {
    let place = Place::new();
    let bytes = image(&place, "disk");
    let run = |line: &str| {
        let line = format!("{} {line}", env!("CARGO_BIN_EXE_blockmirror"));
        let mut command = Command::new("nbdkit");
        command.current_dir(place.path("")).args(["-U", "-", "file", "disk", "--run", &line]).output()
    };
    match run("--version") {
        Ok(out) if out.status.success() => {}
        other => return blockmirror_testing::skip_unsupported(format_args!("nbdkit: {other:?}")),
    }
    for options in ["", "-O qcow2", "--dry-run"] {
        let out = run(&format!("convert -f raw {options} \"$uri\" disk")).unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(1), "{options}: {said}");
        assert!(said.contains("has it open, and may be the server") && said.contains("--atomic"), "{said}");
        assert!(fs::read(place.path("disk")).unwrap() == bytes);
    }
    // A file that nothing holds is replaced, whatever the source.
    fs::write(place.path("t"), "old").unwrap();
    for target in ["\"$uri\" t", "--atomic \"$uri\" disk"] {
        let out = run(&format!("convert -q -f raw {target}")).unwrap();
        assert!(out.status.success(), "{out:?}");
    }
    assert!(fs::read(place.path("t")).unwrap() == bytes && fs::read(place.path("disk")).unwrap() == bytes);
}

/// Fails where the file `disk` in `place` is not kept from copies by what uses a loop device on it.
fn is_kept(place: &Place, bytes: &[u8], why: &str) {
    for line in ["convert -f raw @source @disk", "convert -f raw --dry-run @source @disk", "create @disk 4M"]
    {
        let said = place.ours_fails(line, 1);
        assert!(said.contains(why) && said.contains("--in-place"), "{why}: {line}: {said}");
    }
    for line in [
        "convert -f raw -n @source @disk",
        "mirror -f raw -n --dry-run @source @disk",
        "resize -f raw @disk 8M",
    ] {
        let said = place.ours_fails(line, 1);
        assert!(said.contains(why) && said.contains("--force"), "{why}: {line}: {said}");
    }
    assert!(fs::read(place.path("disk")).unwrap() == bytes, "{why}");
}

#[test]
fn a_file_below_a_device_in_use_is_not_emptied() {
    let place = Place::new();
    source(&place);
    let disk = place.path("disk");
    File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    if system(&format!("mkfs.ext4 -q -F {}", disk.display())).is_none() {
        return;
    }
    let bytes = fs::read(&disk).unwrap();
    fs::create_dir(place.path("mnt")).unwrap();
    let Some(device) = Loop::new(&disk) else { return };

    // As by a virtual machine, without a claim.
    let open = File::open(&device.0).unwrap();
    is_kept(&place, &bytes, " has it open), stands on it");
    drop(open);
    let mount = Mount::new("-o ro", Path::new(&device.0), &place.path("mnt"));
    is_kept(&place, &bytes, "which is in use (it is mounted on ");
    if mount.is_some() {
        // By a user who may not look at the device.
        fs::set_permissions(place.path(""), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["source", "disk"] {
            fs::set_permissions(place.path(name), fs::Permissions::from_mode(0o666)).unwrap();
        }
        if let Some(out) = run_as_nobody(&place, "convert -f raw source disk") {
            assert_eq!(out.status.code(), Some(1), "{out:?}");
            assert!(String::from_utf8_lossy(&out.stderr).contains("in use"), "{out:?}");
            assert!(fs::read(&disk).unwrap() == bytes);
        }
    }
    drop(mount);
    if let Some(upper) = Loop::new(Path::new(&device.0)) {
        let mount = Mount::new("-o ro", Path::new(&upper.0), &place.path("mnt"));
        is_kept(&place, &bytes, " stands on it), stands on it");
        if mount.is_some() {
            // The kernel lets the lower device be claimed.
            let said = place.ours_fails(&format!("convert -f raw @source {}", device.0), 1);
            assert!(
                said.contains("which is in use (it is mounted on ") && said.contains("--force"),
                "{said}"
            );
            assert!(fs::read(&disk).unwrap() == bytes);
        }
    }
    // Asked for, it is done; and nothing speaks against it once the device is free.
    let open = File::open(&device.0).unwrap();
    place.ours_ok("convert -q -f raw --in-place @source @disk");
    drop(open);
    place.ours_ok("convert -q -f raw -n @source @disk");
    place.ours_ok("convert -q -f raw @source @disk");
    assert!(fs::read(&device.0).unwrap() == fs::read(place.path("source")).unwrap());
}

/// That is how a container gets a single file.
#[test]
fn a_file_that_is_mounted_elsewhere_is_written_in_place() {
    let place = Place::new();
    let bytes = image(&place, "wanted");
    for name in ["t", "on_it"] {
        fs::write(place.path(name), "old").unwrap();
    }
    let Some(_mount) = Mount::new("--bind", &place.path("t"), &place.path("on_it")) else { return };
    let ran = place.ours("convert -f raw @source @t");
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(
        ran.err.contains("t: written in place (it is mounted on ") && ran.err.contains("on_it"),
        "{ran:?}"
    );
    assert!(fs::read(place.path("on_it")).unwrap() == bytes);
    let said = place.ours_fails("convert -f raw @t @on_it", 1);
    assert!(said.contains("it is part of the source"), "{said}");
}

#[test]
fn a_file_that_is_swapped_to_is_refused_at_once() {
    struct Swap(String);
    impl Drop for Swap {
        fn drop(&mut self) {
            let _ = Command::new("swapoff").arg(&self.0).status();
        }
    }
    let place = Place::new();
    source(&place);
    let file = place.path("swap").display().to_string();
    fs::write(&file, vec![0; 1 << 20]).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    if system(&format!("mkswap {file}")).is_none() || system(&format!("swapon {file}")).is_none() {
        return;
    }
    let _swap = Swap(file);
    for options in ["", "--in-place ", "--atomic ", "--dry-run "] {
        let said = place.ours_fails(&format!("convert {options}-f raw @source @swap"), 1);
        assert!(said.contains("@swap: the system swaps to it"), "{options}: {said}");
    }
}
