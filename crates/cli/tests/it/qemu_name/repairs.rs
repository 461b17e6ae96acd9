//! `check -r` under the name `qemu-img`: its words and figures on damaged images, beside QEMU's program.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use crate::common::{Place, have_qemu};

/// The entry of an L1 or L2 table without its flags.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

/// An image whose fields are changed.
struct Fields(File);

impl Fields {
    fn open(path: &Path) -> Self {
        Self(OpenOptions::new().read(true).write(true).open(path).unwrap())
    }

    fn get(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    }

    fn set(&self, at: u64, value: u64) {
        self.0.write_all_at(&value.to_be_bytes(), at).unwrap();
    }

    fn l1(&self) -> u64 {
        self.get(40)
    }

    /// Where the entry of a guest cluster of the first L2 table lies.
    fn l2(&self, cluster: u64) -> u64 {
        (self.get(self.l1()) & OFFSET) + 8 * cluster
    }

    /// The 16 bits that count references to a host cluster.
    fn set_refcount(&self, cluster: u64, count: u16) {
        let block = self.get(self.get(48));
        self.0.write_all_at(&count.to_be_bytes(), block + 2 * cluster).unwrap();
    }
}

type Damage = (&'static str, fn(&Fields));

const DAMAGES: &[Damage] = &[
    ("a leaked cluster", |image| image.set(image.l2(1), 0)),
    ("refcounts that are too high", |image| {
        image.set_refcount(0, 2);
        image.set_refcount(4, 7);
    }),
    ("a cluster of three entries", |image| {
        image.set(image.l2(1), image.get(image.l2(0)));
        image.set(image.l2(2), image.get(image.l2(0)));
    }),
    ("COPIED is clear in L1 and L2", |image| {
        image.set(image.l2(0), image.get(image.l2(0)) & !COPIED);
        image.set(image.l1(), image.get(image.l1()) & !COPIED);
    }),
    ("COPIED is clear, and the header has two references", |image| {
        image.set(image.l1(), image.get(image.l1()) & !COPIED);
        image.set_refcount(0, 2);
    }),
    ("a cluster in use that counts as free", |image| image.set_refcount(5, 0)),
    ("an unknown autoclear feature", |image| image.set(88, 1 << 63)),
];

fn run(program: &Path, dir: &Path, words: &[&str]) -> Output {
    Command::new(program).args(words).arg("image").current_dir(dir).env("LC_ALL", "C").output().unwrap()
}

/// What both programs say of the same damage, and that QEMU finds nothing afterwards.
fn same(name: &str, damage: fn(&Fields), options: &[&str]) {
    let (ours, theirs) = (Place::new(), Place::new());
    ours.img("create -q -f qcow2 @image 4M");
    ours.io("image", &["write -q -P 1 0 192k"]);
    damage(&Fields::open(&ours.path("image")));
    fs::copy(ours.path("image"), theirs.path("image")).unwrap();
    let link = ours.path("qemu-img");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_blockmirror"), &link).unwrap();
    let dir = |place: &Place| place.path("image").parent().unwrap().to_owned();
    let words: Vec<_> = ["check"].iter().chain(options).copied().collect();
    let a = run(&link, &dir(&ours), &words);
    let b = run(Path::new("qemu-img"), &dir(&theirs), &words);
    let text = |output: &Output| {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    assert_eq!(text(&a), text(&b), "{name}: {options:?}");
    if options.contains(&"all") {
        let after = run(Path::new("qemu-img"), &dir(&ours), &["check"]);
        assert!(after.status.success(), "{name}: {after:?}");
        let autoclear = Fields::open(&ours.path("image")).get(88);
        assert_eq!(autoclear, Fields::open(&theirs.path("image")).get(88), "{name}: {options:?}");
    }
}

#[test]
fn repairs_say_what_qemu_img_says() {
    if !have_qemu("repairs_say_what_qemu_img_says") {
        return;
    }
    for (name, damage) in DAMAGES {
        for options in [&["-r", "all"][..], &["-r", "all", "--output=json"], &[]] {
            same(name, *damage, options);
        }
        // Of what it does not repair QEMU speaks once in each of its passes, or gives up.
        if !["a cluster of three entries", "a cluster in use that counts as free"].contains(name) {
            same(name, *damage, &["-r", "leaks"]);
        }
    }
}
