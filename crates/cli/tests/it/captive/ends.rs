//! How captive servers end: before the command, with it, and when it is killed.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{command, nothing_is_left, ok, pid, place, run, runs, split, with_pid};
use crate::common::Place;
use crate::process::{output, signal, wait_until};

/// A copy from a server that answers slowly: it lasts much longer than the test.
fn slow_copy(place: &Place) -> Child {
    let server = with_pid("nbdkit --filter=delay pattern 1G rdelay=1");
    let words = ["convert"].into_iter().chain(server).chain(["copy"]);
    let child = command(place, words).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("the copy does not begin", || place.names().iter().any(|name| name.ends_with(".partial")));
    child
}

/// The names in the folder but for those of the test.
fn others(place: &Place) -> Vec<String> {
    place.names().into_iter().filter(|name| !matches!(&**name, "tmp" | "pid" | "pid.new")).collect()
}

#[test]
fn a_server_that_is_killed_ends_the_copy() {
    let Some(place) = place("a_server_that_is_killed_ends_the_copy", &["nbdkit"]) else { return };
    let child = slow_copy(&place);
    let killed = Command::new("kill").args(["-KILL", &pid(&place)]).status().unwrap();
    assert!(killed.success());
    let (code, said) = output(child);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("the captive server sh was ended by signal 9"), "{said}");
    assert_eq!(others(&place), [""; 0], "{said}");
    nothing_is_left(&place);
}

/// The same of a target, which stays as it is.
#[test]
fn a_target_that_is_killed_ends_the_copy() {
    let Some(place) = place("a_target_that_is_killed_ends_the_copy", &["nbdkit"]) else { return };
    fs::write(place.path("raw"), vec![7; 64 << 20]).unwrap();
    let server = with_pid("nbdkit --filter=delay memory 64M wdelay=5");
    let words = ["convert", "-q", "-n", "-f", "raw", "raw"].into_iter().chain(server);
    let child = command(&place, words).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let killed = Command::new("kill").args(["-KILL", &pid(&place)]).status().unwrap();
    assert!(killed.success());
    let (code, said) = output(child);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("the captive server sh was ended by signal 9"), "{said}");
    nothing_is_left(&place);
}

/// A program that calls the command as a function has processes of its own.
#[test]
fn a_function_call_starts_no_server() {
    let said = Place::new().ours_fails("info [ nbdkit memory 1M ]", 1);
    assert_eq!(said, "blockmirror: [ nbdkit memory 1M ]: only the program itself starts a captive server");
}

#[test]
fn a_signal_ends_the_command_before_its_server() {
    let Some(place) = place("a_signal_ends_the_command_before_its_server", &["nbdkit"]) else { return };
    for (name, code) in [("INT", 130), ("TERM", 143)] {
        let child = slow_copy(&place);
        pid(&place);
        signal(&child, name);
        let (ended, said) = output(child);
        assert_eq!((ended, &*said), (Some(code), "blockmirror: copy: copy: cancelled\n"));
        assert_eq!(others(&place), [""; 0]);
        nothing_is_left(&place);
    }
}

#[test]
fn a_server_ends_when_the_command_is_killed() {
    let Some(place) = place("a_server_ends_when_the_command_is_killed", &["nbdkit"]) else { return };
    let child = slow_copy(&place);
    let server = pid(&place);
    signal(&child, "KILL");
    output(child);
    wait_until("the server does not end", || !runs(&server));
    nothing_is_left(&place);
}

/// The words and the exit code of a server that does not begin are in the failure.
#[test]
fn a_server_that_fails_is_named() {
    let Some(place) = place("a_server_that_fails_is_named", &["nbdkit"]) else { return };
    let exits = ["[", "sh", "-c", "echo $$ >pid; echo out of luck >&2; exit 3", "]"];
    let ran = run(&place, ["convert"].into_iter().chain(exits).chain(["copy"]));
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.err.contains("the captive server sh exited with status 3: out of luck"), "{ran:?}");
    let ran = run(&place, split("convert [ no-such-program a ] copy"));
    assert_eq!(ran.code, 1, "{ran:?}");
    let want = "the captive server no-such-program exited with status 127: it cannot be run: No such file";
    assert!(ran.err.contains(want), "{ran:?}");
    let ran = run(&place, split("convert [ /dev/null ] copy"));
    assert!(ran.code == 1 && ran.err.contains("status 126: it cannot be run: Permission denied"), "{ran:?}");
    // Its own reason, of nbdkit's many.
    let ran = run(&place, split("convert [ nbdkit file missing ] copy"));
    assert!(ran.code == 1 && ran.err.contains("the captive server nbdkit exited with status 1"), "{ran:?}");
    assert!(ran.err.contains("missing"), "{ran:?}");
    // A comparison has exit codes of its own.
    let ran = run(&place, ["compare"].into_iter().chain(exits).chain(exits));
    assert_eq!(ran.code, 2, "{ran:?}");
    let ran = run(&place, ["info", "--output=json"].into_iter().chain(exits));
    let said: Value = serde_json::from_str(&ran.err).unwrap();
    assert_eq!(said["exit-code"], 1, "{said}");
    assert_eq!(others(&place), [""; 0]);
}

/// One that never accepts a connection: for as long as `--open-timeout` says.
#[test]
fn a_server_that_does_not_answer_is_not_waited_for_forever() {
    let Some(place) = place("a_server_that_does_not_answer", &[]) else { return };
    let silent = with_pid("sleep 600");
    let since = Instant::now();
    let ran = run(&place, ["convert", "--open-timeout", "1"].into_iter().chain(silent).chain(["copy"]));
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.err.contains("[ sh -c "), "{ran:?}");
    assert_eq!(others(&place), [""; 0]);
    // Of one that has gone there is nothing to wait for.
    for option in ["--open-timeout", "--reconnect-delay"] {
        let ran = run(&place, ["convert", option, "600", "[", "no-such-program", "]", "copy"]);
        assert!(ran.code == 1 && ran.err.contains("status 127"), "{ran:?}");
    }
    // Less than the time without the option.
    assert!(since.elapsed() < Duration::from_secs(45), "{:?}", since.elapsed());
}

/// A warning of a server does not get lost; neither does it get among results.
#[test]
fn what_a_server_prints_is_noted() {
    let Some(place) = place("what_a_server_prints_is_noted", &["nbdkit"]) else { return };
    let server =
        ["[", "sh", "-c", "echo a result; echo sh: Warning: careful >&2; exec nbdkit memory 1M", "]"];
    let ran = ok(&place, ["hash"].into_iter().chain(server));
    assert_eq!(ran.err, "blockmirror: note: sh: Warning: careful\n");
    assert_eq!(ran.out.lines().count(), 1, "{ran:?}");
    let ran = ok(&place, ["convert", "--progress=json"].into_iter().chain(server).chain(["copy"]));
    for line in ran.err.lines() {
        assert!(serde_json::from_str::<Value>(line).is_ok(), "{ran:?}");
    }
}

/// A server that was written to, and that fails when it is asked to end: the copy is not known to be whole.
#[test]
fn a_target_that_does_not_end_well_is_a_failure() {
    let Some(place) = place("a_target_that_does_not_end_well_is_a_failure", &["nbdkit"]) else { return };
    fs::write(place.path("raw"), vec![7; 1 << 20]).unwrap();
    let script =
        "trap 'echo cannot write >&2; exit 3' TERM; sh -c 'LISTEN_PID=$$ exec nbdkit memory 1M' & wait";
    let server = ["[", "sh", "-c", script, "]"];
    let ran = run(&place, ["convert", "-n", "-f", "raw", "raw"].into_iter().chain(server));
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.err.contains("the captive server sh exited with status 3: cannot write; what was"),
        "{ran:?}"
    );
    // Of a source it is worth a note.
    let ran = ok(&place, ["hash"].into_iter().chain(server));
    assert!(ran.err.contains("note: the captive server sh exited with status 3"), "{ran:?}");
}

/// What a server that was written to has started ends in order, too; and a server that a signal has ended is
/// not known to have written all.
#[test]
fn what_a_target_has_started_ends_in_order() {
    let Some(place) = place("what_a_target_has_started_ends_in_order", &["nbdkit"]) else { return };
    fs::write(place.path("raw"), vec![7; 1 << 20]).unwrap();
    let serve = "sh -c 'LISTEN_PID=$$ exec nbdkit memory 1M' & wait";
    fs::write(place.path("inner"), format!("trap 'sleep 1; echo >saved; exit' TERM; {serve}")).unwrap();
    let written = |script: &str| {
        let words = ["convert", "-q", "-n", "-f", "raw", "raw", "[", "sh", "-c", script, "]"];
        run(&place, words)
    };
    let ran = written("trap 'exit 0' TERM; sh inner & wait");
    assert!(ran.code == 0 && place.path("saved").exists(), "{ran:?}");
    fs::remove_file(place.path("saved")).unwrap();
    let ran = written("sh inner & wait");
    assert!(ran.code == 1 && place.path("saved").exists(), "{ran:?}");
    assert!(ran.err.contains("the captive server sh was ended by signal 15"), "{ran:?}");
}

/// `serve` does not go on without the server of an image.
#[test]
fn serve_ends_with_its_server() {
    let Some(place) = place("serve_ends_with_its_server", &["nbdkit"]) else { return };
    let words = ["serve", "--socket", "s"].into_iter().chain(with_pid("nbdkit memory 1M"));
    let child = command(&place, words).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("it does not serve", || place.path("s").exists());
    let killed = Command::new("kill").args(["-KILL", &pid(&place)]).status().unwrap();
    assert!(killed.success());
    let (code, said) = output(child);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("the captive server sh was ended by signal 9"), "{said}");
    nothing_is_left(&place);
}
