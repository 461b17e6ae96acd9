//! Space that a target will not find, before the copy begins, and space that runs out.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::Place;
use crate::copy::targets::{Loop, Mount};
use crate::output::Failed;

/// A file `source` of 20 MiB with `data` MiB of data at its start, and a folder `small` with 8 MiB of space.
fn place(data: u64) -> Option<(Place, Mount)> {
    let place = Place::new();
    fs::create_dir(place.path("small")).unwrap();
    let mount = Mount::new("-t tmpfs -o size=8M", Path::new("none"), &place.path("small"))?;
    let source = File::create(place.path("source")).unwrap();
    source.set_len(20 << 20).unwrap();
    source.write_all_at(&vec![7; (data << 20) as usize], 0).unwrap();
    Some((place, mount))
}

#[test]
fn a_copy_that_cannot_fit_is_refused_before_it_begins() {
    let Some((place, _mount)) = place(12) else { return };
    for line in [
        "convert --output=json -f raw @source @small/t",
        "mirror --output=json -f raw @source @small/t",
        "convert --output=json -f raw -O qcow2 @source @small/t",
    ] {
        let ran = place.ours(line);
        let failed: Failed = serde_json::from_str(&ran.err).unwrap();
        assert_eq!((ran.code, &*failed.class), (1, "no-space"), "{ran:?}");
        assert!(failed.message.contains("up to 12"), "{ran:?}");
        assert!(failed.message.ends_with("; --no-space-check copies all the same"), "{ran:?}");
        assert_eq!(fs::read_dir(place.path("small")).unwrap().count(), 0, "{line}");
        let ran = place.ours(&format!("{line} --no-space-check"));
        assert!(ran.code == 1 && ran.err.contains("No space left on device"), "{ran:?}");
        assert_eq!(fs::read_dir(place.path("small")).unwrap().count(), 0, "{line}");
    }
    // Under the other name it is tried, as ever.
    let ran = place.ours("qemu-img convert -f raw @source @small/t");
    assert!(ran.code == 1 && ran.err.contains("No space left on device"), "{ran:?}");
    // A guess is noted.
    let ran = place.ours("convert -q -c -f raw -O qcow2 @source @small/t");
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.err.contains("it may not fit (compressed data takes less)"), "{ran:?}");
}

#[test]
fn what_fits_is_copied() {
    let Some((place, _mount)) = place(5) else { return };
    for line in ["convert -q -f raw @source @small/t", "mirror -q -f raw -O qcow2 @source @small/t"] {
        assert_eq!(place.ours(line).err, "");
        fs::remove_file(place.path("small/t")).unwrap();
    }
    // Zeros that were written are left out.
    fs::write(place.path("zeros"), [vec![0; 6 << 20], vec![7; 1 << 20], vec![0; 6 << 20]].concat()).unwrap();
    let ran = place.ours("convert -q -f raw @zeros @small/t");
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(
        ran.err.contains("it may not fit (zeros that the source holds as data take no space)"),
        "{ran:?}"
    );
    place.ours_ok("compare -q -f raw @zeros @small/t");
    fs::remove_file(place.path("small/t")).unwrap();
    // Zeros that are to take space do not fit.
    assert!(place.ours_fails("convert -q -S 0 -f raw @source @small/t", 1).contains("up to 20 MiB"));
    // The space of a file that is written in place is given back.
    fs::write(place.path("small/t"), vec![1; 5 << 20]).unwrap();
    place.ours_ok("convert -q --in-place -f raw @source @small/t");
    place.ours_ok("compare -q -f raw @source @small/t");
    // That of one that is replaced is not.
    assert!(place.ours_fails("convert -q --atomic -f raw @source @small/t", 1).contains("up to 5 MiB"));
    place.ours_ok("compare -q -f raw @source @small/t");
}

#[test]
fn a_device_that_is_too_short_for_the_image_keeps_what_it_holds() {
    let Some((place, _mount)) = place(12) else { return };
    let disk = place.path("disk");
    fs::write(&disk, vec![1; 10 << 20]).unwrap();
    let Some(device) = Loop::new(&disk) else { return };
    let said = place.ours_error(&format!("convert -q -f raw -O qcow2 @source {}", device.0), 1);
    assert!(said.contains("and 10 MiB are free"), "{said}");
    drop(device);
    assert_eq!(fs::read(&disk).unwrap(), vec![1; 10 << 20]);
}

/// It did not say where the copy is, nor that it is there yet.
#[test]
fn a_copy_that_is_to_go_on_and_does_not_fit_stays() {
    let Some((place, _mount)) = place(12) else { return };
    let line = "convert -q -f raw --buf-size 256K --checkpoint @log --checkpoint-interval 1M";
    let first = place.ours_error(&format!("{line} --no-space-check @source @small/t"), 1);
    let kept = |said: &str| {
        let mut parts = said.trim_end().split("; ");
        parts.find(|part| part.contains(" bytes are kept in ")).unwrap().to_owned()
    };
    assert!(first.contains("No space left on device"), "{first}");
    let again = place.ours_error(&format!("{line} @source @small/t"), 1);
    assert!(
        again.contains("up to 12") && again.ends_with("; --no-space-check copies all the same\n"),
        "{again}"
    );
    assert_eq!(kept(&again), kept(&first));
    assert_eq!(fs::read_dir(place.path("small")).unwrap().count(), 1);
    assert!(place.path("log").exists());
}

/// On a terminal the copy waits, and says what is missing.
#[test]
fn on_a_terminal_a_copy_waits_for_space() {
    let name = "on_a_terminal_a_copy_waits_for_space";
    if !blockmirror_testing::qemu::have(name, &["script"]) {
        return;
    }
    let Some((place, _mount)) = place(12) else { return };
    fs::write(place.path("answers"), "\nwhat\nq\n").unwrap();
    let ours = env!("CARGO_BIN_EXE_blockmirror");
    let command = format!("{ours} convert -q --no-space-check -f raw source small/t");
    let output = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .current_dir(place.path("."))
        .stdin(File::open(place.path("answers")).unwrap())
        .stderr(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let (paused, question) =
        (said.matches("are still to be written").count(), "Enter tries again, q ends the copy:");
    assert_eq!((paused, said.matches(question).count()), (2, 3), "{said}");
    assert_eq!(fs::read_dir(place.path("small")).unwrap().count(), 0);
}

/// A copy in the background of a terminal was stopped by its question, and never ended.
#[test]
fn in_the_background_of_a_terminal_a_copy_without_space_fails() {
    let name = "in_the_background_of_a_terminal_a_copy_without_space_fails";
    if !blockmirror_testing::qemu::have(name, &["script", "timeout"]) {
        return;
    }
    let Some((place, _mount)) = place(12) else { return };
    let ours = env!("CARGO_BIN_EXE_blockmirror");
    let copy = format!("{ours} convert -q --no-space-check -f raw source small/t");
    // With job control a shell gives what is in the background a process group of its own.
    let command = format!("sh -c 'set -m; timeout -k 1 60 {copy} & wait $!'");
    let output = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .current_dir(place.path("."))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("No space left on device") && !said.contains("Enter tries again"), "{said}");
    assert_eq!(fs::read_dir(place.path("small")).unwrap().count(), 0);
}
