//! Copies that are interrupted and gone on with, as the user of the command sees them.

#![allow(clippy::panic, reason = "a test that cannot go on fails")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStderr, Stdio};

use blockmirror_testing::skip;
use serde_json::Value;

use crate::common::Place;
use crate::process::{shell, signal};

const LEN: u64 = 10 << 30;
const DATA: u64 = 4 << 20;

/// 10 GiB, of which the last 4 MiB are data: a copy of it keeps a checkpoint by itself.
fn large(place: &Place) {
    let file = fs::File::create(place.path("source")).unwrap();
    file.set_len(LEN).unwrap();
    file.write_all_at(&vec![7; DATA as usize], LEN - DATA).unwrap();
}

/// A copy that stands still in the data, having passed the hole. Killed if the test fails.
struct Standing {
    child: Child,
    err: BufReader<ChildStderr>,
}

fn standing(place: &Place, more: &str) -> Standing {
    let line = "convert -f raw --progress=json --granularity 64K --buf-size 64K --speed 1";
    let line = format!("{line}{more} source target");
    let mut child = shell(place, ":", &line).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let err = BufReader::new(child.stderr.take().unwrap());
    let mut standing = Standing { child, err };
    loop {
        let mut line = String::new();
        assert!(standing.err.read_line(&mut line).unwrap() > 0, "the copy has ended");
        let Ok(progress) = serde_json::from_str::<Value>(&line) else { continue };
        if progress["skipped"].as_u64().unwrap_or(0) >= LEN - DATA {
            return standing;
        }
    }
}

impl Standing {
    /// Ends it by the signal `name`; its exit code, and the error in its last object.
    fn end(mut self, name: &str) -> (Option<i32>, Value) {
        signal(&self.child, name);
        let mut text = String::new();
        self.err.read_to_string(&mut text).unwrap();
        let code = self.child.wait().unwrap().code();
        let last = text.lines().last().and_then(|line| serde_json::from_str::<Value>(line).ok());
        (code, last.map_or(Value::Null, |last| last["error"].clone()))
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn temporary(place: &Place) -> Vec<String> {
    place.names().into_iter().filter(|name| name.starts_with('.')).collect()
}

#[test]
fn a_large_copy_is_gone_on_with_by_itself() {
    let place = Place::new();
    large(&place);
    let (code, said) = standing(&place, "").end("INT");
    assert_eq!(code, Some(6), "{said}");
    let kept = temporary(&place);
    assert!(kept[0].ends_with(".partial") && kept[1].ends_with(".resume") && kept.len() == 2, "{kept:?}");
    let want = format!(
        "copy: target: cancelled; {} of {LEN} bytes are kept in {}: the same command goes on there",
        LEN - DATA,
        kept[0]
    );
    assert_eq!(said["message"], want);
    assert!(!place.path("target").exists());
    let ran = place.ours("convert -f raw --output=json @source @target");
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(
        ran.err.contains("\"class\":\"note\"") && ran.err.contains("going on with an interrupted copy"),
        "{ran:?}"
    );
    let outcome: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!((outcome["resumed"].as_u64(), outcome["copied"].as_u64()), (Some(LEN - DATA), Some(DATA)));
    place.ours_ok("compare -q -f raw -F raw @source @target");
    assert_eq!(place.names(), ["source", "target"]);
}

/// The object of a copy that is kept was that of a failure of which nothing is known.
#[test]
fn under_json_a_copy_that_is_kept_says_why_it_ended() {
    let place = Place::new();
    large(&place);
    let (code, failed) = standing(&place, " --output=json").end("INT");
    assert_eq!((code, &failed["class"], &failed["exit-code"]), (Some(6), &"interrupted".into(), &6.into()));
    let place = Place::new();
    // So far behind the operations that run at once that something is copied before it is met.
    let bad_sector = (48 << 20) / 512 - 1;
    fs::write(place.path("source"), vec![7; 48 << 20]).unwrap();
    let rule = format!("[inject-error]\nevent = \"read_aio\"\nsector = \"{bad_sector}\"\n");
    fs::write(place.path("rules"), rule).unwrap();
    let line = "convert --output=json -f raw --checkpoint @log blkdebug:@rules:@source @target";
    let ran = place.ours(line);
    let failed: Value = serde_json::from_str(ran.err.lines().last().unwrap()).unwrap();
    assert!(failed["message"].as_str().unwrap().contains("are kept in"), "{ran:?}");
    assert_eq!((ran.code, &failed["class"], &failed["errno"]), (1, &"io".into(), &5.into()), "{ran:?}");
    assert!(failed["operation"].is_string() && failed["offset"].is_u64(), "{ran:?}");
}

#[test]
fn a_killed_copy_is_gone_on_with() {
    for (format, named) in [("raw", ""), ("qcow2", ""), ("qcow2", "--checkpoint log")] {
        let place = Place::new();
        large(&place);
        let more = format!(" -O {format} --checkpoint-interval 64K {named}");
        let (code, _) = standing(&place, more.trim_end()).end("KILL");
        assert_eq!(code, None);
        assert!(!place.path("target").exists());
        assert_eq!(temporary(&place).len() + usize::from(place.path("log").exists()), 2);
        let named = named.replace("log", "@log");
        let line = format!("convert -q -f raw -O {format} {named} @source @target").replace("  ", " ");
        place.ours_ok(&line);
        place.ours_ok(&format!("compare -q -f raw -F {format} @source @target"));
        assert_eq!(place.names(), ["source", "target"]);
    }
}

/// The line stood still while regions were read again.
#[test]
fn what_is_read_again_is_shown() {
    let place = Place::new();
    large(&place);
    standing(&place, "").end("INT");
    let ran = place.ours("convert -q -f raw --progress=json --resume=verify @source @target");
    assert_eq!(ran.code, 0, "{ran:?}");
    let lines = ran.err.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let shown: Vec<_> = lines.filter(|line| line["event"] == "progress").collect();
    assert_eq!((&shown[0]["phase"], &shown[0]["done"]), (&"resume".into(), &0.into()), "{ran:?}");
    assert_eq!(shown[0]["total"], LEN - DATA, "{ran:?}");
    assert_eq!(shown.last().unwrap()["phase"], "copy", "{ran:?}");
}

#[test]
fn a_changed_source_is_refused_until_the_user_says_what_to_do() {
    for way in ["--restart", "--clean"] {
        let place = Place::new();
        large(&place);
        standing(&place, "").end("TERM");
        let kept = temporary(&place);
        fs::File::options().write(true).open(place.path("source")).unwrap().write_all_at(b"new", 0).unwrap();
        let said = place.ours_fails("convert -q -f raw @source @target", 1);
        let want = format!(
            "blockmirror: copy: @target: an interrupted copy cannot be gone on with: a file of the source has \
             changed, or is another one (@{}); --restart begins anew, --clean also removes what other runs have left",
            kept[0]
        );
        assert_eq!(said, want);
        assert_eq!(temporary(&place), kept);
        let ran = place.ours(&format!("convert -q -f raw {way} @source @target"));
        assert_eq!(ran.code, 0, "{ran:?}");
        assert!(ran.err.trim_end().ends_with(": removed"), "{ran:?}");
        place.ours_ok("compare -q -f raw -F raw @source @target");
        assert_eq!(place.names(), ["source", "target"]);
    }
}

#[test]
fn what_is_asked_on_a_terminal_decides() {
    let script =
        ["/usr/bin/script", "/bin/script"].into_iter().find(|path| fs::exists(path).unwrap_or(false));
    let Some(script) = script else {
        return skip("what_is_asked_on_a_terminal_decides", format_args!("there is no `script`"));
    };
    for (answer, code, left) in [("n", 1, 2), ("yes", 0, 0), ("r", 0, 0)] {
        let place = Place::new();
        large(&place);
        standing(&place, "").end("INT");
        fs::write(place.path("answer"), format!("{answer}\n")).unwrap();
        let ours = env!("CARGO_BIN_EXE_blockmirror");
        let command = format!("{ours} convert -q -f raw source target");
        let output = std::process::Command::new(script)
            .args(["-qec", &command, "/dev/null"])
            .current_dir(place.path("."))
            .stdin(fs::File::open(place.path("answer")).unwrap())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!((output.status.code(), temporary(&place).len()), (Some(code), left), "{answer}: {said}");
        assert!(
            said.contains("an interrupted copy is there: 10 GiB of 10 GiB. Go on with it? [y/r/n]"),
            "{said}"
        );
        assert_eq!(said.contains("going on with"), answer == "yes", "{said}");
        assert_eq!(place.path("target").exists(), code == 0);
    }
}

#[test]
fn under_the_name_qemu_img_nothing_is_kept_unasked() {
    let place = Place::new();
    large(&place);
    let line = "qemu-img convert -f raw -r 1 source target";
    let child = shell(&place, ":", line).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    crate::process::wait_until("the copy does not begin", || !temporary(&place).is_empty());
    signal(&child, "INT");
    let (code, said) = crate::process::output(child);
    assert_eq!((code, place.names()), (Some(130), vec!["source".to_owned()]), "{said}");
}

#[test]
fn what_cannot_have_a_checkpoint_is_a_usage_error() {
    let place = Place::new();
    fs::write(place.path("source"), vec![7; 1 << 20]).unwrap();
    fs::write(place.path("target"), vec![0; 1 << 20]).unwrap();
    let said = place.ours_fails("convert -n -O raw -f raw --checkpoint @log @source @target", 2);
    assert_eq!(
        said,
        "blockmirror: copy: @target: it cannot have a checkpoint: it is written into an image that exists"
    );
    for option in ["--restart", "--checkpoint-interval 64K"] {
        let said = place.ours_fails(&format!("convert -f raw {option} @source @new"), 2);
        let option = option.split(' ').next().unwrap();
        let want = "this copy keeps no checkpoint; --checkpoint FILE asks for one";
        assert_eq!(said, format!("blockmirror: {option}: {want}"));
    }
    let said = place.ours_fails("convert -f raw --checkpoint-interval 1G @source @target", 2);
    assert_eq!(said, "blockmirror: --checkpoint-interval: \"1G\": must be between 1 and 384M");
    assert_eq!(place.names(), ["source", "target"]);
}
