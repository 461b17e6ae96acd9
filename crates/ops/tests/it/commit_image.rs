//! Committing images by their paths: what failures, a full disk and a cancelled caller leave.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, WriteFlags, ZeroFlags};
use blockmirror_image::{
    AllowedReferences, CreateSettings, CreateSpec, Format, NewImage, OpenOptions, ReferencePolicy,
};
use blockmirror_ops::{Commit, Error};

const LEN: u64 = 1 << 20;

/// A raw base, `rules` that fail its requests, and an overlay on it with data and zeros of its own.
struct Place {
    dir: tempfile::TempDir,
    want: Vec<u8>,
}

impl Place {
    fn new(rules: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("base"), vec![1; LEN as usize]).unwrap();
        fs::write(dir.path().join("rules"), rules).unwrap();
        let place = Self { dir, want: Vec::new() };
        let mut settings = CreateSettings::default();
        settings.backing_file = Some("blkdebug:rules:base".into());
        settings.backing_format = Some(Format::Raw);
        let spec = CreateSpec::new(Format::Qcow2, LEN, settings).unknown_chain(true);
        NewImage::create(place.overlay(), &spec).unwrap().persist().unwrap();
        let image = place.open(true);
        for at in (0..LEN).step_by(150_000) {
            image.write_at(&[9; 60_000], at.min(LEN - 60_000), WriteFlags::NONE).unwrap();
            let zeros = ByteRange::at(at + 70_000, 40_000).intersect(ByteRange::new(0, LEN));
            image.write_zeroes(zeros, ZeroFlags::MAY_UNMAP).unwrap();
        }
        image.flush().unwrap();
        let want = contents(&*image);
        Self { want, ..place }
    }

    fn overlay(&self) -> PathBuf {
        self.dir.path().join("overlay")
    }

    /// The overlay over its base without rules.
    fn open(&self, writable: bool) -> std::sync::Arc<dyn BlockDevice> {
        let rules = self.dir.path().join("rules");
        let kept = fs::read(&rules).unwrap();
        fs::write(&rules, "").unwrap();
        let mut policy = ReferencePolicy::beside(&self.overlay()).unwrap();
        policy.allow_protocols();
        let image = OpenOptions::new().policy(policy).writable(writable).open(self.overlay()).unwrap();
        fs::write(&rules, kept).unwrap();
        image.device().clone()
    }

    fn commit(&self) -> Commit {
        Commit::new(self.overlay()).allow(AllowedReferences::new().protocols(true))
    }

    fn base(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("base")).unwrap()
    }
}

fn contents(disk: &dyn BlockDevice) -> Vec<u8> {
    let mut all = vec![0; disk.len() as usize];
    disk.read_at(&mut all, 0).unwrap();
    all
}

fn file(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

fn rule(event: &str, errno: u32, once: &str) -> String {
    format!("[inject-error]\nevent = \"{event}\"\nerrno = \"{errno}\"\nonce = \"{once}\"\n")
}

#[test]
fn a_base_that_fails_leaves_the_image_as_it_was() {
    for (event, errno, kind) in [
        ("pwritev", 28, ErrorKind::NoSpace),
        ("pwritev", 5, ErrorKind::Io),
        ("pwritev_zero", 28, ErrorKind::NoSpace),
        ("flush_to_disk", 5, ErrorKind::Io),
        ("flush_to_disk", 28, ErrorKind::NoSpace),
    ] {
        for once in ["on", "off"] {
            let place = Place::new(&rule(event, errno, once));
            let before = file(&place.overlay());
            let error = place.commit().run(&AtomicBool::new(false), |_| {}).unwrap_err();
            let case = format!("{event} {errno} {once}: {error}");
            assert_eq!(error.device_error().map(|error| error.kind()), Some(kind), "{case}");
            assert!(file(&place.overlay()) == before, "{case}: the image was written");
            assert!(contents(&*place.open(false)) == place.want, "{case}");
            // Once the reason is gone the same again is all that it takes.
            fs::write(place.dir.path().join("rules"), "").unwrap();
            assert!(place.commit().run(&AtomicBool::new(false), |_| {}).unwrap().emptied);
            assert!(place.base() == place.want && contents(&*place.open(false)) == place.want, "{case}");
        }
    }
}

#[test]
fn a_commit_that_is_cancelled_leaves_the_image_as_it_was() {
    let place = Place::new("");
    let before = file(&place.overlay());
    let error = place.commit().speed(1).run(&AtomicBool::new(true), |_| {}).unwrap_err();
    assert!(matches!(error.kind(), blockmirror_ops::ErrorKind::Cancelled), "{error}");
    assert!(file(&place.overlay()) == before && contents(&*place.open(false)) == place.want);
    let job = place.commit().speed(1).open().unwrap().start().unwrap();
    drop(job);
    assert!(file(&place.overlay()) == before && contents(&*place.open(false)) == place.want);
}

#[test]
fn an_image_that_is_kept_is_only_read() {
    let place = Place::new("");
    let before = file(&place.overlay());
    let outcome = place.commit().keep(true).run(&AtomicBool::new(false), |_| {}).unwrap();
    assert!(!outcome.emptied && file(&place.overlay()) == before && place.base() == place.want);
    assert_eq!(outcome.base, place.dir.path().join("base"));
    // Even where it cannot be written.
    let options = OpenOptions::new();
    let named = place.commit().access(options).base(place.dir.path().join("base"));
    assert!(!named.run(&AtomicBool::new(false), |_| {}).unwrap().emptied);
    assert!(file(&place.overlay()) == before);
}

#[test]
fn what_has_no_base_says_so() {
    let place = Place::new("");
    let path = place.dir.path().join("base");
    let refused = |commit: Commit| commit.open().unwrap_err();
    assert!(matches!(refused(Commit::new(&path)), Error::NoBacking { .. }));
    assert!(matches!(refused(place.commit().base("elsewhere")), Error::NotInChain { .. }));
    let overlay = place.overlay();
    assert!(matches!(refused(place.commit().base(overlay)), Error::NotInChain { .. }));
}
