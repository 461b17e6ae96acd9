//! Files that get their name when they are whole.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use blockmirror_block::{ErrorKind, Storage};
use blockmirror_file::{
    Existing, FileOptions, LockMode, NewFile, Replacement, TargetFile, TargetOptions, TargetPlan,
};

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn it_has_its_name_only_when_persisted() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    let new = NewFile::create(&target, Existing::Refuse, &FileOptions::new()).unwrap();
    new.storage().write_at(b"data", 0).unwrap();
    assert!(!target.exists());
    let partial = names(dir.path());
    assert!(partial[0].starts_with(".disk.raw.") && partial[0].ends_with(".partial"), "{partial:?}");
    assert_eq!(new.partial_path().file_name().unwrap().to_str().unwrap(), partial[0]);
    assert_eq!(new.storage().name(), target.to_str().unwrap());
    let storage = new.storage().clone();
    new.persist().unwrap();
    assert_eq!(names(dir.path()), ["disk.raw"]);
    assert_eq!(fs::read(&target).unwrap(), b"data");
    storage.write_at(b"more", 4).unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"datamore");
}

#[test]
fn dropped_it_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    fs::write(&target, "old").unwrap();
    let new = NewFile::create(&target, Existing::Replace, &FileOptions::new()).unwrap();
    new.storage().write_at(b"new", 0).unwrap();
    drop(new);
    assert_eq!(names(dir.path()), ["disk.raw"]);
    assert_eq!(fs::read(&target).unwrap(), b"old");
}

#[test]
fn an_existing_file_is_refused_or_replaced_whole() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    fs::write(&target, "old and long").unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o640)).unwrap();
    let refused = NewFile::create(&target, Existing::Refuse, &FileOptions::new()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::AlreadyExists);

    let link = dir.path().join("link");
    std::os::unix::fs::symlink("disk.raw", &link).unwrap();
    let new = NewFile::create(&link, Existing::Replace, &FileOptions::new()).unwrap();
    new.storage().write_at(b"new", 0).unwrap();
    new.persist().unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"new");
    assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o640);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink(), "the link is followed, not replaced");
    assert_eq!(names(dir.path()), ["disk.raw", "link"]);
}

#[test]
fn a_file_that_appears_meanwhile_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    let new = NewFile::create(&target, Existing::Refuse, &FileOptions::new()).unwrap();
    fs::write(&target, "another writer's").unwrap();
    assert_eq!(new.persist().unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&target).unwrap(), b"another writer's");
    assert_eq!(names(dir.path()), ["disk.raw"]);
}

#[test]
fn a_file_in_use_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    fs::write(&target, "old").unwrap();
    let reader = FileOptions::new().open(&target).unwrap();
    let error = NewFile::create(&target, Existing::Replace, &FileOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    drop(reader);
    let new = NewFile::create(&target, Existing::Replace, &FileOptions::new()).unwrap();
    // And it is in use by us until it is replaced.
    assert_eq!(FileOptions::new().open(&target).unwrap_err().kind(), ErrorKind::Locked);
    assert!(FileOptions::new().lock(LockMode::Shared).open(&target).is_ok());
    drop(new);
    assert!(FileOptions::new().open(&target).is_ok());
}

/// Renaming over a file takes no leave to write it: one that was protected against writing was once replaced.
/// Root may write any file but a program that runs, as this one does.
#[test]
fn a_file_that_may_not_be_written_is_not_replaced() {
    let program = std::env::current_exe().unwrap();
    let error = NewFile::create(&program, Existing::Replace, &FileOptions::new()).unwrap_err();
    assert_eq!(error.name(), program.to_str());
}

#[test]
fn names_of_any_length_and_kind_work_or_fail_cleanly() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("n".repeat(255));
    NewFile::create(&long, Existing::Refuse, &FileOptions::new()).unwrap().persist().unwrap();
    assert!(long.exists());
    let nowhere = dir.path().join("missing").join("disk");
    let error = NewFile::create(&nowhere, Existing::Refuse, &FileOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.name(), nowhere.to_str());
    for bad in [dir.path().join(".."), dir.path().to_owned(), "/dev/null".into()] {
        let error = NewFile::create(&bad, Existing::Replace, &FileOptions::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    assert_eq!(names(dir.path()).len(), 1);
}

/// An ACL as the kernel keeps it: version 2, then entries of tag, permissions and id.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0];
    for (tag, permissions, id) in entries {
        bytes.extend_from_slice(&[tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

fn set(path: &Path, name: &str, value: &[u8]) -> bool {
    let set = rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty());
    set.inspect_err(|e| blockmirror_testing::skip_unsupported(format_args!("{name}: {e}"))).is_ok()
}

fn get(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 1024];
    let len = rustix::fs::getxattr(path, name, &mut value[..]).ok()?;
    value.truncate(len);
    Some(value)
}

const ACL: &str = "system.posix_acl_access";

fn replace(target: &Path) {
    NewFile::create(target, Existing::Replace, &FileOptions::new()).unwrap().persist().unwrap();
}

#[test]
fn a_replaced_file_passes_on_all_that_it_carries() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    fs::write(&target, "old").unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o600)).unwrap();
    // The owner, one more user, the group, the mask, everyone else.
    let list = acl(&[(1, 6, !0), (2, 4, 65534), (4, 0, !0), (16, 4, !0), (32, 0, !0)]);
    if !set(&target, ACL, &list) || !set(&target, "user.label", b"db") {
        return;
    }
    let flags = || rustix::fs::ioctl_getflags(fs::File::open(&target).unwrap());
    let flagged = flags().and_then(|flags| {
        let file = fs::File::open(&target).unwrap();
        rustix::fs::ioctl_setflags(file, flags | rustix::fs::IFlags::NODUMP)
    });
    let owned = std::os::unix::fs::chown(&target, Some(1), Some(1));
    let before = fs::metadata(&target).unwrap();
    replace(&target);
    let after = fs::metadata(&target).unwrap();
    assert_eq!(after.len(), 0);
    assert_eq!((after.uid(), after.gid(), after.mode()), (before.uid(), before.gid(), before.mode()));
    assert_eq!(after.uid() == 1, owned.is_ok());
    assert_eq!(get(&target, ACL), Some(list));
    assert_eq!(get(&target, "user.label"), Some(b"db".to_vec()));
    if flagged.is_ok() {
        assert!(flags().unwrap().contains(rustix::fs::IFlags::NODUMP));
    }
}

/// A write to the old file would have taken them away, too.
#[test]
fn rights_that_go_with_the_contents_are_not_passed_on() {
    const CAPABILITY: &str = "security.capability";
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    fs::write(&target, "old").unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o6755)).unwrap();
    // Version 2; CAP_NET_RAW, permitted and effective.
    let mut capability = vec![1, 0, 0, 2, 0, 32, 0, 0];
    capability.resize(20, 0);
    let capable = set(&target, CAPABILITY, &capability);
    assert_eq!(get(&target, CAPABILITY).is_some(), capable);
    replace(&target);
    assert_eq!(get(&target, CAPABILITY), None);
    assert_eq!(fs::metadata(&target).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn a_directory_gives_its_successor_no_more_access() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    fs::write(&target, "old").unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o660)).unwrap();
    let open = acl(&[(1, 7, !0), (2, 7, 65534), (4, 7, !0), (16, 7, !0), (32, 7, !0)]);
    if !set(dir.path(), "system.posix_acl_default", &open) {
        return;
    }
    let new = NewFile::create(&target, Existing::Replace, &FileOptions::new()).unwrap();
    assert_eq!(get(new.partial_path(), ACL), None, "before it has its name, too");
    new.persist().unwrap();
    assert_eq!(get(&target, ACL), None);
    assert_eq!(fs::metadata(&target).unwrap().mode() & 0o777, 0o660);
}

#[test]
fn another_file_that_took_the_name_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    fs::write(&target, "old").unwrap();
    let new = NewFile::create(&target, Existing::Replace, &FileOptions::new()).unwrap();
    fs::write(dir.path().join("other"), "other").unwrap();
    fs::rename(dir.path().join("other"), &target).unwrap();
    assert_eq!(new.persist().unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&target).unwrap(), b"other");
    assert_eq!(names(dir.path()), ["disk.raw"]);
}

/// Everything goes through one descriptor of the directory: what takes its name meanwhile is left alone.
#[test]
fn a_directory_that_is_renamed_keeps_its_new_file() {
    let dir = tempfile::tempdir().unwrap();
    let (first, moved) = (dir.path().join("first"), dir.path().join("moved"));
    fs::create_dir(&first).unwrap();
    let new = NewFile::create(first.join("disk"), Existing::Refuse, &FileOptions::new()).unwrap();
    fs::rename(&first, &moved).unwrap();
    fs::create_dir(&first).unwrap();
    new.persist().unwrap();
    assert_eq!((names(&first).len(), names(&moved)), (0, vec!["disk".to_owned()]));
}

#[test]
fn what_fails_after_the_file_was_created_leaves_none() {
    let dir = tempfile::tempdir().unwrap();
    // No program may use direct I/O on this filesystem, which is found out after creating.
    let direct = FileOptions::new().direct(true);
    for path in [dir.path().join("disk"), Path::new("/dev/shm").join(format!("bm-{}", std::process::id()))] {
        let made = NewFile::create(&path, Existing::Refuse, &direct);
        drop(made);
        let left = names(path.parent().unwrap());
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(!left.iter().any(|left| left.contains(name)), "{left:?}");
    }
}

/// Starts to replace the file at `path` as the decision says, which must be to replace it.
fn plan(path: &Path) -> NewFile {
    match TargetPlan::new(path, TargetOptions::new()).unwrap().open().unwrap() {
        (TargetFile::New(new), _) => new,
        other => panic!("{other:?}"),
    }
}

/// The copy takes long; a mode that is narrowed meanwhile stays narrow.
#[test]
fn rights_that_are_taken_away_meanwhile_stay_away() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    let mode = |mode| fs::set_permissions(&target, fs::Permissions::from_mode(mode)).unwrap();
    fs::write(&target, "old").unwrap();
    mode(0o666);
    let with_acl =
        set(&target, ACL, &acl(&[(1, 6, !0), (2, 6, 65534), (4, 0, !0), (16, 6, !0), (32, 0, !0)]))
            && set(&target, "user.label", b"db");
    let new = plan(&target);
    new.storage().write_at(b"new", 0).unwrap();
    if with_acl {
        rustix::fs::removexattr(&target, ACL).unwrap();
        rustix::fs::removexattr(&target, "user.label").unwrap();
    }
    mode(0o600);
    let owned = std::os::unix::fs::chown(&target, Some(1), Some(1)).is_ok();
    new.persist().unwrap();
    let after = fs::metadata(&target).unwrap();
    assert_eq!((fs::read(&target).unwrap().as_slice(), after.mode() & 0o777), (&b"new"[..], 0o600));
    assert_eq!((after.uid() == 1, after.gid() == 1), (owned, owned));
    assert_eq!((get(&target, ACL), get(&target, "user.label")), (None, None));
}

#[test]
fn a_file_that_gets_another_name_meanwhile_is_not_parted_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    fs::write(&target, "old").unwrap();
    let new = plan(&target);
    fs::hard_link(&target, dir.path().join("other")).unwrap();
    let said = new.persist().unwrap_err();
    assert!(said.to_string().contains("has got further hard links"), "{said}");
    assert_eq!(fs::read(&target).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["disk.raw", "other"]);
}

/// What was judged is what is written, or nothing is.
#[test]
fn a_file_that_takes_the_name_after_the_decision_is_left_alone() {
    for replacement in [Replacement::Auto, Replacement::Atomic, Replacement::InPlace] {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("disk.raw");
        fs::write(&target, "old").unwrap();
        let plan = TargetPlan::new(&target, TargetOptions::new().replacement(replacement)).unwrap();
        fs::write(dir.path().join("other"), "other").unwrap();
        fs::hard_link(dir.path().join("other"), dir.path().join("linked")).unwrap();
        fs::rename(dir.path().join("other"), &target).unwrap();
        let said = plan.open().unwrap_err();
        assert_eq!(said.kind(), ErrorKind::AlreadyExists, "{said}");
        for name in ["disk.raw", "linked"] {
            assert_eq!(fs::read(dir.path().join(name)).unwrap(), b"other", "{replacement:?}");
        }
        assert_eq!(names(dir.path()).len(), 2);
    }
}
