//! How captive servers are written and named, and where there are none.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use serde_json::Value;

use super::{OURS, ok, place, ran, run, split, with_pid};
use crate::common::Place;

/// Words reach the server as they are, and with them what systemd's socket activation says.
#[test]
fn words_are_passed_on_as_they_are() {
    let Some(place) = place("words_are_passed_on_as_they_are", &["nbdkit"]) else { return };
    let odd = ["a b", "it's", "\"quoted\"", "$HOME", "*", "", "[", "\\n", "é\n"];
    let script = "printf '%s\\0' \"$@\" >args; env >env; echo $$ >self; exec nbdkit memory 1M";
    let server = ["[", "sh", "-c", script, "sh"].into_iter().chain(odd).chain(["]"]);
    let ran = ok(&place, ["info", "--output=json"].into_iter().chain(server));
    let args = fs::read_to_string(place.path("args")).unwrap();
    assert_eq!(args.split_terminator('\0').collect::<Vec<_>>(), odd);
    let env = fs::read_to_string(place.path("env")).unwrap();
    let own = fs::read_to_string(place.path("self")).unwrap();
    for line in ["LISTEN_FDS=1", "LISTEN_FDNAMES=unknown", &format!("LISTEN_PID={}", own.trim())] {
        assert!(env.lines().any(|found| found == line), "{line}: {env}");
    }
    // The name in what is printed is the command, ready to be pasted, in JSON too.
    let info: Value = serde_json::from_str(&ran.out).unwrap();
    let name = info["filename"].as_str().unwrap();
    assert!(name.starts_with("[ sh -c 'printf "), "{name}");
    assert!(name.contains("'a b' 'it'\\''s' '\"quoted\"' '$HOME' '*' '' '[' '\\n'"), "{name}");
}

/// A descriptor 3 that the command was started with is not the server's.
#[test]
fn a_descriptor_of_the_parent_is_not_in_the_way() {
    let Some(place) = place("a_descriptor_of_the_parent_is_not_in_the_way", &["nbdkit"]) else { return };
    let words = ["-c", "exec \"$0\" info [ nbdkit memory 1M ] 3</dev/null 4</dev/null", OURS];
    let ran =
        ran(Command::new("sh").args(words).current_dir(place.path(".")).env("TMPDIR", place.path("tmp")));
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.out.starts_with("image: [ nbdkit memory 1M ]\nfile format: raw\n"), "{ran:?}");
}

#[test]
fn every_command_that_names_an_image_takes_one() {
    let Some(place) = place("every_command_that_names_an_image_takes_one", &["nbdkit"]) else { return };
    for line in [
        "info SERVER",
        "map SERVER",
        "measure -O qcow2 SERVER",
        "inspect SERVER",
        "hash SERVER",
        "compare SERVER SERVER",
        "bench -q -c 4 SERVER",
        "mirror SERVER target",
        "mirror --dry-run SERVER other",
        "convert -- SERVER other",
    ] {
        let words = line.split(' ').flat_map(|word| match word {
            "SERVER" => with_pid("nbdkit pattern 1M"),
            word => vec![word],
        });
        let ran = run(&place, words);
        assert_eq!(ran.code, 0, "{line}: {ran:?}");
        assert!(!(ran.out.clone() + &ran.err).contains("/proc/"), "{line}: {ran:?}");
    }
    let ran = run(&place, ["check"].into_iter().chain(with_pid("nbdkit memory 1M")));
    assert_eq!(ran.code, 63, "{ran:?}");
}

#[test]
fn misplaced_brackets_are_refused_before_anything_starts() {
    let place = Place::new();
    fs::create_dir(place.path("tmp")).unwrap();
    for (line, words) in [
        ("info [", "\"[\" without \"]\""),
        ("info [ touch started", "\"[\" without \"]\""),
        ("info [ ]", "the program is missing"),
        ("info a ]", "\"]\" without \"[\""),
        ("convert -n -f raw a [ touch [ started ] ]", "\"]\" without \"[\""),
        ("info --no-such-option [ touch started ]", "--no-such-option"),
        ("ctl sock mirror disk [ touch started ]", "[ touch started ]: no image is named there"),
        ("convert -B [ touch started ] a b", "[ touch started ]: no image is named there"),
        ("convert --checkpoint c [ touch started ] b", "--checkpoint: a later run"),
        ("convert --resume=sample [ touch started ] b", "--checkpoint: a later run"),
        ("info --limits=untrusted --via qemu-nbd tmp", "--via: no server is started from the sandbox"),
        ("info --limits=untrusted [ touch started ]", "[ touch started ]: no server is connected to"),
    ] {
        let ran = run(&place, split(line));
        assert_eq!(ran.code, 2, "{line}: {ran:?}");
        assert!(ran.err.contains(words) && ran.err.lines().count() == 1, "{line}: {ran:?}");
        assert_eq!(place.names(), ["tmp"], "{line}");
    }
    // Errors are objects where they were asked for.
    let ran = run(&place, split("info --output=json ["));
    assert_eq!(serde_json::from_str::<Value>(&ran.err).unwrap()["class"], "usage", "{ran:?}");
}

/// Under the name of QEMU's program a bracket is a file name, and elsewhere one in a name, in JSON or in an
/// image is.
#[test]
fn brackets_elsewhere_are_names() {
    let place = Place::new();
    fs::create_dir(place.path("tmp")).unwrap();
    fs::write(place.path("["), vec![7; 512]).unwrap();
    symlink(OURS, place.path("qemu-img")).unwrap();
    let mut qemu_img = Command::new(place.path("qemu-img"));
    let ran = ran(qemu_img.args(["info", "["]).current_dir(place.path(".")));
    assert!(ran.code == 0 && ran.out.starts_with("image: [\n"), "{ran:?}");
    let ran = ok(&place, ["info", "./["]);
    assert!(ran.out.starts_with("image: ./[\n"), "{ran:?}");
    let json = r#"json:{"driver":"raw","file":{"driver":"file","filename":"["}}"#;
    ok(&place, ["info", json]);
    let ran = run(&place, ["info", "[ touch started ]"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    ok(&place, ["create", "-q", "-f", "qcow2", "-u", "-b", "[ touch started ]", "-F", "raw", "top", "1M"]);
    let ran = run(&place, ["convert", "top", "copy"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(!place.path("started").exists());
}
