//! `--no-clobber`: what exists stays, and of two runs one makes the file.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use crate::common::Place;
use crate::output::Failed;
use crate::process::shell;

#[test]
fn what_exists_is_refused_and_stays() {
    let place = Place::new();
    fs::write(place.path("source"), vec![7; 1 << 20]).unwrap();
    fs::write(place.path("old"), "old").unwrap();
    std::os::unix::fs::symlink("nowhere", place.path("link")).unwrap();
    for target in ["old", "link"] {
        for line in [
            "convert --no-clobber --output=json -f raw @source @",
            "convert --no-clobber --output=json -f raw -O qcow2 --dry-run @source @",
            "mirror --no-clobber --output=json -f raw -O qcow2 @source @",
        ] {
            let ran = place.ours(&format!("{line}{target}"));
            let failed: Failed = serde_json::from_str(&ran.err).unwrap();
            assert_eq!((ran.code, &*failed.class), (1, "exists"), "{ran:?}");
        }
        for line in ["create --no-clobber -f qcow2 @", "dd --no-clobber -f raw if=@source of=@"] {
            let line = if line.starts_with("create") {
                format!("{line}{target} 1M")
            } else {
                format!("{line}{target}")
            };
            assert!(place.ours_fails(&line, 1).ends_with(&format!("create: @{target}: it exists")), "{line}");
        }
    }
    assert_eq!(fs::read_to_string(place.path("old")).unwrap(), "old");
    assert_eq!(place.names(), ["link", "old", "source"]);
    for (line, made) in [
        ("create -q --no-clobber -f qcow2 @created 1M", "created"),
        ("convert -q --no-clobber -f raw -O qcow2 @source @converted", "converted"),
        ("mirror -q --no-clobber -f raw @source @mirrored", "mirrored"),
        ("dd -q --no-clobber -f raw if=@source of=@copied", "copied"),
    ] {
        place.ours_ok(line);
        assert!(place.path(made).exists(), "{line}");
    }
    for more in ["-n", "--in-place", "--atomic", "--force"] {
        assert_eq!(place.ours(&format!("convert --no-clobber {more} -f raw @source @t")).code, 2, "{more}");
    }
    let uri = "nbd+unix:///disk?socket=@none";
    assert!(
        place
            .ours_error(&format!("convert --no-clobber -f raw @source {uri}"), 1)
            .contains("an export exists")
    );
}

/// A run is in the middle of its copy: the name is free, and taken all the same.
#[test]
fn a_file_that_another_run_makes_is_refused() {
    let place = Place::new();
    fs::write(place.path("source"), vec![7; 1 << 20]).unwrap();
    let line = "convert --no-clobber --progress=json -f raw --granularity 64K --buf-size 64K --speed 1";
    let mut first = shell(&place, ":", &format!("{line} source target"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(first.stderr.take().unwrap()).read_line(&mut said).unwrap();
    assert!(said.contains("\"progress\""), "{said}");
    let refused = place.ours_fails("mirror --no-clobber -f raw @source @target", 1);
    assert!(refused.contains("another run is making it: @.target."), "{refused}");
    first.kill().unwrap();
    first.wait().unwrap();
    // What it has left is in the way of no other.
    place.ours_ok("convert -q --no-clobber -f raw @source @target");
    assert_eq!(fs::read(place.path("target")).unwrap(), vec![7; 1 << 20]);
}
