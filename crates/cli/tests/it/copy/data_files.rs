//! A data file of a new image: what is in the way is not lost unless it is forced.

use std::fs::{self, File};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::process::Command;

use super::source;
use super::targets::{Loop, is_copied};
use crate::common::Place;

/// Lines that make the image `t` with the data file `name`.
fn lines_with_data_file(name: &str) -> [String; 8] {
    [
        format!("create -f qcow2 -o data_file={name} @t 4M"),
        format!("create -f qcow2 -o data_file={name},data_file_raw=on @t 4M"),
        format!("create -f qcow2 -u -b nowhere -F raw -o data_file={name} @t 4M"),
        format!("convert -f raw -O qcow2 -o data_file={name} @source @t"),
        format!("mirror -f raw -O qcow2 -o data_file={name} @source @t"),
        format!("mirror --in-place -f raw -O qcow2 -o data_file={name} @source @t"),
        format!("mirror --atomic -f raw -O qcow2 -o data_file={name} @source @t"),
        format!("convert --dry-run -f raw -O qcow2 -o data_file={name} @source @t"),
    ]
}

/// What the files of a [`place_with_files`] hold.
fn old() -> Vec<u8> {
    vec![7; 1 << 20]
}

/// A source, an overlay over `mid`, and files of all kinds of names.
fn place_with_files() -> Place {
    let place = Place::new();
    source(&place);
    fs::write(place.path("mid"), old()).unwrap();
    place.ours_ok("create -q -f qcow2 -b mid -F raw @overlay");
    fs::write(place.path("file"), old()).unwrap();
    fs::write(place.path("linked"), old()).unwrap();
    fs::hard_link(place.path("linked"), place.path("hard")).unwrap();
    symlink("file", place.path("soft")).unwrap();
    fs::write(place.path("empty"), "").unwrap();
    place
}

/// Nothing was made, removed or changed.
fn is_as_before(place: &Place, names: &[String]) {
    assert_eq!(place.names(), names);
    for name in ["mid", "file", "linked", "hard"] {
        assert!(fs::read(place.path(name)).unwrap() == old(), "{name}");
    }
}

/// A data file that was there already was replaced by an empty one, although its owner might have meant to
/// attach it.
#[test]
fn a_data_file_that_exists_is_emptied_only_by_force() {
    let place = place_with_files();
    let before = place.names();
    for name in ["file", "hard", "soft", "empty", "./file"] {
        for line in lines_with_data_file(name) {
            let said = place.ours_fails(&line, 1);
            let want = format!(
                "@{name}: it exists, and would lose its contents as the data file of @t; --force overwrites it"
            );
            assert!(said.ends_with(&want), "{line}: {said}");
        }
    }
    is_as_before(&place, &before);
    // By force it is emptied, or filled.
    place.ours_ok("create -q --force -f qcow2 -o data_file=file @t 4M");
    assert!(fs::read(place.path("file")).unwrap().iter().all(|byte| *byte == 0));
    place.ours_ok("convert -q --force -f raw -O qcow2 -o data_file=file,data_file_raw=on @source @t");
    is_copied(&place, &place.path("file"));
    // A new image in place of one with a data file leaves that alone.
    place.ours_ok("create -q -f qcow2 @t 4M");
    is_copied(&place, &place.path("file"));
}

#[test]
fn what_cannot_be_a_data_file_is_refused_whatever_is_forced() {
    let place = place_with_files();
    let before = place.names();
    let fifo = place.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    fs::create_dir(place.path("folder")).unwrap();
    for (name, why) in [
        ("fifo", "it is a FIFO"),
        ("folder", "it is a directory"),
        ("t", "its data file must be a file of its own"),
        ("./t", "its data file must be a file of its own"),
    ] {
        for line in lines_with_data_file(name) {
            for force in ["", "--force "] {
                let said = place.ours_fails(&line.replacen(' ', &format!(" {force}"), 1), 1);
                assert!(said.contains(why), "{line}: {said}");
            }
        }
    }
    for (line, why) in [
        ("create --force -f qcow2 -b mid -F raw -o data_file=mid @t 4M", "must be a file of its own"),
        ("create --force -f qcow2 -b overlay -F qcow2 -o data_file=mid @t 4M", "part of the chain"),
        ("convert --force -f raw -O qcow2 -o data_file=source @source @t", "part of the source"),
        ("convert --force -O qcow2 -o data_file=mid @overlay @t", "part of the source"),
    ] {
        let said = place.ours_fails(line, 1);
        assert!(said.contains(why), "{line}: {said}");
    }
    fs::remove_file(fifo).unwrap();
    fs::remove_dir(place.path("folder")).unwrap();
    is_as_before(&place, &before);
}

#[test]
fn a_block_device_becomes_a_data_file_only_by_force() {
    const O_EXCL: i32 = 0o200;
    let place = Place::new();
    source(&place);
    let old = vec![7; 4 << 20];
    fs::write(place.path("disk"), &old).unwrap();
    let Some(device) = Loop::new(&place.path("disk")) else { return };
    let name = &device.0;
    for line in [
        format!("create -f qcow2 -o data_file={name} @t 4M"),
        format!("convert -f raw -O qcow2 -o data_file={name} @source @t"),
        format!("convert --dry-run -f raw -O qcow2 -o data_file={name} @source @t"),
    ] {
        let said = place.ours_fails(&line, 1);
        assert!(said.contains(&format!("{name}: it exists")) && said.contains("--force"), "{line}: {said}");
        // That it is held is said first: one option overrides both.
        let held = File::options().read(true).custom_flags(O_EXCL).open(name).unwrap();
        let said = place.ours_fails(&line, 1);
        assert!(said.contains("block device is in use") && !said.contains("it exists"), "{line}: {said}");
        drop(held);
    }
    assert!(fs::read(name).unwrap() == old);
    place.ours_ok(&format!(
        "convert -q --force -f raw -O qcow2 -o data_file={name},data_file_raw=on @source @t"
    ));
    assert!(fs::read(name).unwrap() == fs::read(place.path("source")).unwrap());
}
