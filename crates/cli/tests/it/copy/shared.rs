//! Directories in which others make files: links and files that they have put there, and names that they
//! take. Needs root; skipped visibly without.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};

use super::targets::run_as_nobody;
use crate::common::Place;
use crate::copy::source;

const STRANGER: Option<u32> = Some(65534);

/// A place with a sticky directory `shared` that everyone may write, and files of another user in it; `None`,
/// and says so, without the privilege to make them.
fn shared(files: &[&str]) -> Option<Place> {
    let place = Place::new();
    source(&place);
    fs::create_dir(place.path("shared")).unwrap();
    fs::set_permissions(place.path("shared"), fs::Permissions::from_mode(0o1777)).unwrap();
    for name in files {
        let path = place.path(&format!("shared/{name}"));
        fs::write(&path, "theirs").unwrap();
        if let Err(e) = chown(&path, STRANGER, STRANGER) {
            blockmirror_testing::skip_unsupported(format_args!("chown: {e}"));
            return None;
        }
    }
    Some(place)
}

#[test]
fn links_of_others_in_a_sticky_directory_are_not_followed() {
    let Some(place) = shared(&["theirs"]) else { return };
    fs::write(place.path("secret"), "secret").unwrap();
    for (name, to) in [("link", "secret"), ("dangling", "made"), ("by_ours", "shared/link")] {
        symlink(place.path(to), place.path(&format!("shared/{name}"))).unwrap();
    }
    for name in ["link", "dangling"] {
        lchown(place.path(&format!("shared/{name}")), STRANGER, STRANGER).unwrap();
    }
    symlink("shared/link", place.path("from_outside")).unwrap();
    for target in ["shared/link", "shared/dangling", "shared/by_ours", "from_outside"] {
        for options in ["", "--in-place ", "--atomic ", "-O qcow2 "] {
            let line = format!("convert {options}-f raw @source @{target}");
            let ran = place.ours(&line);
            assert_eq!(ran.code, 1, "{line}: {ran:?}");
            // Where the kernel has the rule switched on, it comes first.
            assert!(
                ran.err.contains("is not followed") || ran.err.contains("ermission denied"),
                "{line}: {ran:?}"
            );
        }
        assert_eq!(place.ours(&format!("create @{target} 1M")).code, 1);
    }
    assert_eq!(fs::read(place.path("secret")).unwrap(), b"secret");
    assert!(!place.path("made").exists());
    // Links of our own, and of the directory's owner, are.
    symlink("mine", place.path("shared/own")).unwrap();
    place.ours_ok("convert -q -f raw @source @shared/own");
    assert!(fs::read(place.path("shared/mine")).unwrap() == fs::read(place.path("source")).unwrap());
    chown(place.path("shared"), STRANGER, STRANGER).unwrap();
    place.ours_ok("convert -q -f raw @source @shared/link");
    assert!(fs::read(place.path("secret")).unwrap() == fs::read(place.path("source")).unwrap());
}

/// It would take the new contents to its owner.
#[test]
fn files_of_others_in_a_sticky_directory_want_a_choice() {
    let Some(place) = shared(&["theirs"]) else { return };
    let path = place.path("shared/theirs");
    for mode in [0o1777, 0o1770] {
        fs::set_permissions(place.path("shared"), fs::Permissions::from_mode(mode)).unwrap();
        for line in ["convert -f raw @source @shared/theirs", "create -f qcow2 @shared/theirs 1M"] {
            let said = place.ours_fails(line, 1);
            assert!(
                said.contains("file of another user (number 65534)") && said.contains("--atomic"),
                "{said}"
            );
        }
    }
    assert_eq!(fs::read(&path).unwrap(), b"theirs");
    for option in ["--in-place", "--atomic"] {
        fs::write(&path, "theirs").unwrap();
        place.ours_ok(&format!("convert -q {option} -f raw @source @shared/theirs"));
        assert!(fs::read(&path).unwrap() == fs::read(place.path("source")).unwrap());
    }
    // A directory where no other user makes files is as any.
    fs::set_permissions(place.path("shared"), fs::Permissions::from_mode(0o1755)).unwrap();
    place.ours_ok("convert -q -f raw @source @shared/theirs");
}

/// Anyone can make files that look like what a killed run has left.
#[test]
fn names_that_others_take_do_not_keep_a_copy() {
    let partial = |number| format!(".t.{number:08x}.partial");
    let theirs: Vec<_> = (0..40).map(partial).collect();
    let Some(place) = shared(&theirs.iter().map(String::as_str).collect::<Vec<_>>()) else { return };
    let count = || {
        let names = fs::read_dir(place.path("shared")).unwrap();
        names
            .filter(|name| name.as_ref().unwrap().file_name().to_string_lossy().ends_with(".partial"))
            .count()
    };
    let ran = place.ours("convert --clean -f raw @source @shared/t");
    assert_eq!((ran.code, ran.err.as_str(), count()), (0, "", 40), "they are no concern of ours");
    for number in 100..140 {
        fs::write(place.path(&format!("shared/{}", partial(number))), "ours").unwrap();
    }
    for (options, left, what) in
        [("", 80, "kept; --clean removes it"), ("--clean ", 64, ": removed"), ("--clean ", 48, ": removed")]
    {
        let ran = place.ours(&format!("convert {options}-f raw @source @shared/t"));
        assert_eq!((ran.code, ran.err.matches(what).count(), count()), (0, 16, left), "{ran:?}");
    }
    // One that may not be removed is noted, and the copy goes on: it lies in a directory of another user.
    let Some(place) = shared(&[]) else { return };
    let drop_box = place.path("shared");
    fs::set_permissions(place.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["t", ".t.00000001.partial"] {
        fs::write(drop_box.join(name), "old").unwrap();
        fs::set_permissions(drop_box.join(name), fs::Permissions::from_mode(0o666)).unwrap();
    }
    chown(drop_box.join(".t.00000001.partial"), STRANGER, STRANGER).unwrap();
    fs::set_permissions(&drop_box, fs::Permissions::from_mode(0o755)).unwrap();
    let Some(out) = run_as_nobody(&place, "convert --clean -f raw source shared/t") else { return };
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(0), "{said}");
    assert!(said.contains(".t.00000001.partial") && said.contains("cannot be removed ("), "{said}");
    assert!(fs::read(drop_box.join("t")).unwrap() == fs::read(place.path("source")).unwrap());
}
