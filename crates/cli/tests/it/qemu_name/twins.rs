//! Two folders with the same images, one for each program.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::common::Place;

const OURS: &str = env!("CARGO_BIN_EXE_blockmirror");

/// The images that a folder begins with.
pub(crate) struct World {
    place: Place,
}

impl World {
    pub(crate) fn new() -> Self {
        let place = Place::new();
        for (name, size, writes) in [
            ("base.qcow2", "4M", &["write -P 1 0 300k", "write -P 2 1M 64k", "write -z 2M 128k"][..]),
            ("other.qcow2", "4M", &["write -P 1 0 64k", "write -P 9 3M 4k"]),
            ("longer.qcow2", "6M", &["write -P 5 5M 64k", "write -P 4 512 1k"]),
            ("snapshots.qcow2", "4M", &["write -P 1 0 1M"]),
            ("bitmaps.qcow2", "4M", &["write -P 3 64k 64k"]),
            ("target.qcow2", "4M", &["write -P 4 64k 64k"]),
            ("leaky.qcow2", "4M", &["write -P 6 0 64k", "write -P 7 64k 64k"]),
        ] {
            place.img(&format!("create -q -f qcow2 @{name} {size}"));
            place.io(name, writes);
        }
        place.img("create -q -f qcow2 -o compat=0.10 @old.qcow2 4M");
        place.io("old.qcow2", &["write -P 8 128k 64k"]);
        place.img("convert -O raw @base.qcow2 @base.raw");
        place.img("convert -O raw @other.qcow2 @other.raw");
        place.img("create -q -f qcow2 -b base.qcow2 -F qcow2 @overlay.qcow2");
        place.io("overlay.qcow2", &["write -P 7 512k 64k", "write -z 1M 64k"]);
        place.img("snapshot -c one @snapshots.qcow2");
        place.io("snapshots.qcow2", &["write -P 2 0 64k"]);
        place.img("snapshot -c two @snapshots.qcow2");
        place.img("bitmap --add @bitmaps.qcow2 first");
        place.img("bitmap --add -g 128k @bitmaps.qcow2 second");
        place.io("bitmaps.qcow2", &["write -P 4 1M 64k"]);
        place.img("bitmap --add @target.qcow2 kept");
        leak(&place.path("leaky.qcow2"));
        Self { place }
    }
}

/// Takes the second cluster of the disk out of its table; its refcount stays.
fn leak(image: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(image).unwrap();
    let number = |offset: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    };
    let l1 = number(40);
    let l2 = number(l1) & 0x00ff_ffff_ffff_fe00;
    file.write_all_at(&[0; 8], l2 + 8).unwrap();
}

/// Two copies of the world, removed at the end.
pub(crate) struct Twins {
    dir: tempfile::TempDir,
}

/// Why a line did not do the same.
pub(crate) enum Wrong {
    /// Our program does not have the command, or the option.
    Missing,
    Differs(String),
}

impl From<String> for Wrong {
    fn from(what: String) -> Self {
        Self::Differs(what)
    }
}

/// What a program left behind.
struct Left {
    dir: PathBuf,
    output: Output,
}

impl Left {
    fn code(&self) -> Option<i32> {
        self.output.status.code()
    }

    /// The standard output, with what is its folder's and what changes from run to run taken away.
    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.output.stdout);
        super::words::steady(&text.replace(self.dir.to_str().unwrap(), "DIR"))
    }

    fn names(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(&self.dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Twins {
    pub(crate) fn new(world: &World) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for twin in ["ours", "theirs"] {
            let twin = dir.path().join(twin);
            fs::create_dir(&twin).unwrap();
            for name in world.place.names() {
                fs::copy(world.place.path(&name), twin.join(&name)).unwrap();
            }
        }
        symlink(OURS, dir.path().join("qemu-img")).unwrap();
        Self { dir }
    }

    fn run_one(&self, program: &Path, twin: &str, line: &str) -> Left {
        let dir = self.dir.path().join(twin);
        let words = words_of(&line.replace("{}", dir.to_str().unwrap()));
        let mut command = Command::new(program);
        command.args(words).current_dir(&dir).env("LC_ALL", "C").env_remove("BLOCKMIRROR_ALLOW_BACKING");
        Left { output: command.output().unwrap(), dir }
    }

    /// Runs `line` with both programs; says what differs. The words of the standard output count if `words`.
    pub(crate) fn run(&self, line: &str, words: bool) -> Result<(), Wrong> {
        let theirs = self.run_one(Path::new("qemu-img"), "theirs", line);
        let ours = self.run_one(&self.dir.path().join("qemu-img"), "ours", line);
        if ours.code() != theirs.code() {
            let said = |left: &Left| String::from_utf8_lossy(&left.output.stderr).trim().to_owned();
            let unknown = ["Command not found", "invalid option", "unrecognized option"];
            if theirs.output.status.success() && unknown.iter().any(|what| said(&ours).contains(what)) {
                return Err(Wrong::Missing);
            }
            let (our_code, their_code) = (ours.code(), theirs.code());
            return Err(format!(
                "exit code {our_code:?}, qemu-img {their_code:?}: {} / {}",
                said(&ours),
                said(&theirs)
            )
            .into());
        }
        if words && ours.text() != theirs.text() {
            return Err(format!("prints {:?}, qemu-img {:?}", ours.text(), theirs.text()).into());
        }
        if ours.names() != theirs.names() {
            return Err(format!("leaves {:?}, qemu-img {:?}", ours.names(), theirs.names()).into());
        }
        for name in ours.names() {
            same_image(&ours.dir.join(&name), &theirs.dir.join(&name))?;
        }
        Ok(())
    }
}

/// The words of a line as a shell splits them; only single quotes quote.
fn words_of(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), None::<String>, false);
    for c in line.chars() {
        match c {
            '\'' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' if !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Whether two files are the same image: the same bytes, or what QEMU says of them and reads in them.
fn same_image(ours: &Path, theirs: &Path) -> Result<(), String> {
    if fs::read(ours).unwrap() == fs::read(theirs).unwrap() {
        return Ok(());
    }
    let (our_info, their_info) = (info(ours), info(theirs));
    let name = ours.file_name().unwrap().to_string_lossy();
    if our_info != their_info {
        return Err(format!("{name} is {our_info}, qemu-img's {their_info}"));
    }
    let format = our_info["format"].as_str().unwrap();
    let words = ["compare", "-f", format, "-F", format].map(str::to_owned);
    let paths = [ours, theirs].map(|path| path.to_str().unwrap().to_owned());
    let compared = Command::new("qemu-img").args(words.into_iter().chain(paths)).output().unwrap();
    if !compared.status.success() {
        return Err(format!("{name}: {}", String::from_utf8_lossy(&compared.stdout)));
    }
    match format {
        "qcow2" => sound(ours),
        _ => Ok(()),
    }
}

/// What QEMU says of an image, with what differs from run to run taken away.
fn info(image: &Path) -> Value {
    let dir = image.parent().unwrap();
    let words = ["info", "--output=json", image.file_name().unwrap().to_str().unwrap()];
    let output = Command::new("qemu-img").args(words).current_dir(dir).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    super::words::steady_json(serde_json::from_str(&text).unwrap_or_else(|_| panic!("{output:?}")))
}

/// Whether QEMU finds nothing wrong with an image.
fn sound(image: &Path) -> Result<(), String> {
    let output = Command::new("qemu-img").arg("check").arg(image).output().unwrap();
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{}: {}", image.display(), String::from_utf8_lossy(&output.stdout))),
    }
}
