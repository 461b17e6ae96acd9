//! Opening chains: what is found, what is refused, and that `info` opens one file.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::{Path, PathBuf};

use blockmirror_block::{ErrorKind, WriteFlags};
use blockmirror_file::FileOptions;
use blockmirror_image::{
    CreateSettings, CreateSpec, Error, Format, ImageInfo, ImageName, LockMode, MAX_CHAIN_L1_BYTES, NewImage,
    Note, OpenOptions, ReferencePolicy, ReferenceRefusal, read_chain,
};
use blockmirror_image_lock::{ImageLock, Permissions};

struct Folder {
    dir: tempfile::TempDir,
}

impl Folder {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn create(&self, name: &str, format: Format, size: u64, options: &str) {
        let mut settings = CreateSettings::default();
        settings.parse(format, options).unwrap();
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        NewImage::create(&path, &CreateSpec::new(format, size, settings)).unwrap().persist().unwrap();
    }

    fn options(&self, top: &str) -> OpenOptions {
        OpenOptions::new().policy(ReferencePolicy::beside(&self.path(top)).unwrap())
    }

    fn write(&self, name: &str, offset: u64, byte: u8) {
        let options = self.options(name).format(Format::Qcow2).writable(true);
        let image = options.open(self.path(name)).unwrap();
        image.device().write_at(&[byte; 512], offset, WriteFlags::NONE).unwrap();
        image.device().flush().unwrap();
    }

    fn refusal(&self, top: &str) -> ReferenceRefusal {
        match self.options(top).open(self.path(top)) {
            Err(Error::Reference(refused)) => refused.reason,
            other => panic!("{top}: {other:?}"),
        }
    }
}

fn read(device: &dyn blockmirror_block::BlockDevice, offset: u64) -> u8 {
    let mut byte = [0];
    device.read_at(&mut byte, offset).unwrap();
    byte[0]
}

#[test]
fn each_layer_shows_through_the_one_above() {
    let folder = Folder::new();
    folder.create("base.raw", Format::Raw, 1 << 20, "");
    folder.create("below/middle", Format::Qcow2, 1 << 20, "backing_file=../base.raw,backing_fmt=raw");
    folder.create("top", Format::Qcow2, 1 << 20, "backing_file=below/middle,backing_fmt=qcow2");
    fs::write(folder.path("base.raw"), vec![1; 1 << 20]).unwrap();
    // The directory of an image that is opened by itself is the root, and this one's base lies above it.
    let policy = ReferencePolicy::beside(&folder.path("top")).unwrap();
    let middle = OpenOptions::new().policy(policy).writable(true).open(folder.path("below/middle")).unwrap();
    middle.device().write_at(&[2; 512], 65536, WriteFlags::NONE).unwrap();
    middle.device().flush().unwrap();
    drop(middle);
    folder.write("top", 2 * 65536, 3);

    let image = folder.options("top").open(folder.path("top")).unwrap();
    let device = &**image.device();
    assert_eq!([0, 65536, 2 * 65536].map(|at| read(device, at)), [1, 2, 3]);
    let backing = image.backing().unwrap();
    assert_eq!((backing.name.as_path(), backing.format), (Path::new("below/middle"), Format::Qcow2));
    for file in ["top", "below/middle", "base.raw"] {
        assert!(image.uses(folder.path(file)), "{file}");
    }
    assert!(!image.uses(folder.path("other")) && image.notes().is_empty());
    let chain = read_chain(folder.path("top"), &folder.options("top")).unwrap();
    assert_eq!(
        chain.iter().map(|info| info.format).collect::<Vec<_>>(),
        [Format::Qcow2, Format::Qcow2, Format::Raw]
    );
}

#[test]
fn a_chain_that_comes_back_to_itself_is_refused() {
    let folder = Folder::new();
    folder.create("a", Format::Qcow2, 65536, "backing_file=b,backing_fmt=qcow2");
    folder.create("elsewhere", Format::Qcow2, 65536, "backing_file=./a,backing_fmt=qcow2");
    fs::rename(folder.path("elsewhere"), folder.path("b")).unwrap();
    assert!(matches!(folder.refusal("a"), ReferenceRefusal::Cycle));
    assert!(read_chain(folder.path("a"), &folder.options("a")).is_err());
    // By another name: the file counts, not what it is called.
    folder.create("c", Format::Qcow2, 65536, "backing_file=link,backing_fmt=qcow2");
    fs::hard_link(folder.path("c"), folder.path("link")).unwrap();
    assert!(matches!(folder.refusal("c"), ReferenceRefusal::Cycle));
}

#[test]
fn a_chain_has_a_greatest_depth() {
    let folder = Folder::new();
    folder.create("0", Format::Qcow2, 65536, "");
    for i in 1..=3 {
        folder.create(
            &i.to_string(),
            Format::Qcow2,
            65536,
            &format!("backing_file={},backing_fmt=qcow2", i - 1),
        );
    }
    assert!(folder.options("3").max_depth(4).open(folder.path("3")).is_ok());
    match folder.options("3").max_depth(3).open(folder.path("3")) {
        Err(Error::Reference(refused)) => assert!(matches!(refused.reason, ReferenceRefusal::TooDeep(3))),
        other => panic!("{other:?}"),
    }
}

#[test]
fn names_lead_only_where_the_policy_allows() {
    let folder = Folder::new();
    folder.create("out/secret", Format::Raw, 65536, "");
    folder.create("in/top", Format::Qcow2, 65536, "backing_file=../out/secret,backing_fmt=raw");
    folder.create("in/url", Format::Qcow2, 65536, "backing_file=nbd://localhost/x,backing_fmt=raw");
    folder.create("in/json", Format::Qcow2, 65536, r#"backing_file=json:{"driver":"raw"},backing_fmt=raw"#);
    assert!(matches!(folder.refusal("in/top"), ReferenceRefusal::Outside { .. }));
    assert!(matches!(folder.refusal("in/url"), ReferenceRefusal::NotAPath));
    assert!(matches!(folder.refusal("in/json"), ReferenceRefusal::NotAPath));
    let denied = OpenOptions::new().open(folder.path("in/top"));
    assert!(
        matches!(denied, Err(Error::Reference(refused)) if matches!(refused.reason, ReferenceRefusal::Denied))
    );
    let mut policy = ReferencePolicy::beside(&folder.path("in/top")).unwrap();
    policy.allow_dir(&folder.path("out")).unwrap();
    assert!(OpenOptions::new().policy(policy).open(folder.path("in/top")).is_ok());
    // Describing it needs none of that.
    assert!(ImageInfo::read(folder.path("in/top"), &OpenOptions::new()).is_ok());
}

#[test]
fn a_data_file_is_found_beside_the_image_and_obeys_the_policy() {
    let folder = Folder::new();
    folder.create("top", Format::Qcow2, 1 << 20, "data_file=top.data,data_file_raw=on");
    assert_eq!(fs::metadata(folder.path("top.data")).unwrap().len(), 1 << 20);
    match folder.options("top").writable(true).open(folder.path("top")) {
        Err(Error::Reference(refused)) => assert!(matches!(refused.reason, ReferenceRefusal::Guessed)),
        other => panic!("written on the word of a guessed header: {other:?}"),
    }
    folder.write("top", 65536, 7);
    assert_eq!(fs::read(folder.path("top.data")).unwrap()[65536], 7);
    let image = folder.options("top").open(folder.path("top")).unwrap();
    assert_eq!(read(&**image.device(), 65536), 7);
    assert!(image.uses(folder.path("top.data")));
    let denied = OpenOptions::new().open(folder.path("top"));
    assert!(matches!(denied, Err(Error::Reference(_))), "{denied:?}");
    // An image whose data file is the image itself.
    fs::remove_file(folder.path("top.data")).unwrap();
    fs::hard_link(folder.path("top"), folder.path("top.data")).unwrap();
    assert!(matches!(folder.refusal("top"), ReferenceRefusal::Cycle));
}

#[test]
fn formats_are_found_out_or_refused_by_name() {
    let folder = Folder::new();
    fs::write(folder.path("vmdk"), [b"KDMV".as_slice(), &[0; 1020]].concat()).unwrap();
    let refused = OpenOptions::new().open(folder.path("vmdk"));
    assert!(matches!(refused, Err(Error::ForeignFormat { format: "vmdk", .. })), "{refused:?}");
    let taken = OpenOptions::new().format(Format::Raw).open(folder.path("vmdk")).unwrap();
    assert_eq!(taken.device().len(), 1024);

    folder.create("base", Format::Qcow2, 65536, "");
    folder.create("top", Format::Qcow2, 65536, "backing_file=base");
    let image = folder.options("top").open(folder.path("top")).unwrap();
    let [Note::BackingFormatGuessed { format: Format::Qcow2, .. }] = image.notes() else {
        panic!("{:?}", image.notes())
    };
}

/// A guest that owns a raw disk must not turn it into an image of another format for those who guess.
#[test]
fn a_guessed_raw_disk_does_not_become_another_format() {
    let folder = Folder::new();
    folder.create("disk", Format::Raw, 65536, "");
    let header = [b"QFI\xfb\0\0\0\x03".as_slice(), &[0; 504]].concat();
    let guessed = folder.options("disk").writable(true).open(folder.path("disk")).unwrap();
    assert!(guessed.device().write_at(&header, 0, WriteFlags::NONE).is_err());
    drop(guessed);
    let given = folder.options("disk").format(Format::Raw).writable(true).open(folder.path("disk")).unwrap();
    given.device().write_at(&header, 0, WriteFlags::NONE).unwrap();
}

/// What a name is made to be.
enum Face {
    /// A symbolic link to this.
    Link(PathBuf),
    /// This file.
    File(PathBuf),
}

impl Face {
    fn put_on(&self, name: &Path) {
        match self {
            Self::Link(target) => std::os::unix::fs::symlink(target, name).unwrap(),
            Self::File(file) => fs::hard_link(file, name).unwrap(),
        }
    }
}

/// How often a test of names that are flipped opens its image, at least.
const TRIES: u32 = 2000;

/// Makes `name` one of `faces` in turn, atomically, as fast as it can.
struct Flipper {
    shared: std::sync::Arc<Flips>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Flips {
    stop: std::sync::atomic::AtomicBool,
    done: std::sync::atomic::AtomicU64,
}

impl Flipper {
    fn new(name: PathBuf, faces: [Face; 2]) -> Self {
        use std::sync::atomic::Ordering::Relaxed;
        let shared = std::sync::Arc::new(Flips::default());
        let flips = std::sync::Arc::clone(&shared);
        faces[0].put_on(&name);
        let thread = std::thread::spawn(move || {
            let spare = name.with_extension("spare");
            while !flips.stop.load(Relaxed) {
                let flip = flips.done.fetch_add(1, Relaxed) + 1;
                // Renaming one link of a file onto another leaves both.
                let _ = fs::remove_file(&spare);
                faces[flip as usize % 2].put_on(&spare);
                fs::rename(&spare, &name).unwrap();
            }
        });
        Self { shared, thread: Some(thread) }
    }

    /// Whether `tries` openings, of which `seen` met the face the test asks for, raced with enough flips.
    ///
    /// On a busy machine one of the two threads may get far before the other runs at all: the number of tries
    /// alone proves nothing.
    fn raced(&self, tries: u32, seen: u32) -> bool {
        const FLIPS: u64 = 100;
        assert!(
            !self.thread.as_ref().is_some_and(std::thread::JoinHandle::is_finished),
            "nothing is flipped"
        );
        tries >= TRIES && seen > 0 && self.shared.done.load(std::sync::atomic::Ordering::Relaxed) > FLIPS
    }
}

impl Drop for Flipper {
    fn drop(&mut self) {
        self.shared.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// A link was judged by where its name led, and then opened by its name once more.
#[test]
fn a_link_that_is_flipped_never_leads_out() {
    let folder = Folder::new();
    for (file, byte) in [("in/good", 1), ("out/secret", 0x5e)] {
        fs::create_dir_all(folder.path(file).parent().unwrap()).unwrap();
        fs::write(folder.path(file), vec![byte; 1 << 20]).unwrap();
    }
    folder.create("in/top", Format::Qcow2, 1 << 20, "backing_file=link,backing_fmt=raw");
    let flipper = Flipper::new(
        folder.path("in/link"),
        [Face::File(folder.path("in/good")), Face::Link(folder.path("out/secret"))],
    );
    let (mut tries, mut opened) = (0, 0);
    while !flipper.raced(tries, opened) {
        tries += 1;
        match folder.options("in/top").open(folder.path("in/top")) {
            Ok(image) => {
                assert_eq!(read(&**image.device(), 0), 1, "a file outside was read");
                opened += 1;
            }
            Err(Error::Reference(refused)) => {
                assert!(matches!(refused.reason, ReferenceRefusal::Outside { .. }), "{refused}");
            }
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_data_file_that_is_flipped_is_never_written_outside() {
    let folder = Folder::new();
    folder.create("in/top", Format::Qcow2, 1 << 20, "data_file=link");
    fs::rename(folder.path("in/link"), folder.path("in/good")).unwrap();
    fs::create_dir_all(folder.path("out")).unwrap();
    fs::write(folder.path("out/secret"), vec![0x5e; 1 << 20]).unwrap();
    let flipper = Flipper::new(
        folder.path("in/link"),
        [Face::File(folder.path("in/good")), Face::Link(folder.path("out/secret"))],
    );
    let (mut tries, mut written) = (0, 0);
    while !flipper.raced(tries, written) {
        tries += 1;
        let options = folder.options("in/top").format(Format::Qcow2).writable(true);
        let Ok(image) = options.open(folder.path("in/top")) else { continue };
        image.device().write_at(&[7; 512], 0, WriteFlags::NONE).unwrap();
        written += 1;
    }
    drop(flipper);
    assert!(fs::read(folder.path("out/secret")).unwrap().iter().all(|byte| *byte == 0x5e));
}

/// The folder that names are judged by was looked up by its name, and so was the image: two folders.
#[test]
fn a_folder_that_is_flipped_does_not_widen_what_is_allowed() {
    let folder = Folder::new();
    fs::create_dir_all(folder.path("secrets")).unwrap();
    fs::write(folder.path("secrets/key"), vec![0x5e; 1 << 20]).unwrap();
    let key = folder.path("secrets/key");
    let options = format!("backing_file={},backing_fmt=raw", key.display());
    folder.create("in/top", Format::Qcow2, 1 << 20, &options);
    let flipper = Flipper::new(
        folder.path("folder"),
        [Face::Link(folder.path("in")), Face::Link(folder.path("secrets"))],
    );
    let (mut tries, mut refused) = (0, 0);
    while !flipper.raced(tries, refused) {
        tries += 1;
        let top = folder.path("folder/top");
        let Ok(policy) = ReferencePolicy::beside(&top) else { continue };
        match OpenOptions::new().policy(policy).open(&top) {
            Ok(_) => panic!("a file outside of the image's folder was opened"),
            Err(Error::Reference(_)) => refused += 1,
            Err(_) => {}
        }
    }
}

/// `info` was refused while a guest ran, and `-U` insisted on a lock of its own.
#[test]
fn an_image_in_use_can_be_described_and_read_without_a_lock() {
    let folder = Folder::new();
    folder.create("base", Format::Qcow2, 65536, "");
    folder.create("top", Format::Qcow2, 65536, "backing_file=base,backing_fmt=qcow2");
    let (base, top) = (folder.path("base"), folder.path("top"));
    let held = [&base, &top].map(|path| OpenOptions::new().writable(true).open(path));
    // The top is refused its backing file, so nothing but its own file is held.
    assert!(held[0].is_ok() && held[1].is_err());
    let writer = folder.options("top").lock(LockMode::Off).writable(true).open(&top).unwrap();
    let file = fs::File::open(&top).unwrap();
    let all = Permissions::READ_WRITE;
    let lock = ImageLock::acquire(&file, &top, all, all).unwrap();
    assert_eq!(ImageInfo::read(&top, &folder.options("top")).unwrap().virtual_size, 65536);
    assert_eq!(read_chain(&top, &folder.options("top")).unwrap().len(), 2);
    assert!(
        matches!(folder.options("top").open(&top), Err(Error::Block(error)) if error.kind() == ErrorKind::Locked)
    );
    // Even where the other one shares no reads.
    for lock in [LockMode::Shared, LockMode::Off] {
        folder.options("top").lock(lock).open(&top).unwrap();
    }
    lock.release(&file);
    drop(writer);
}

#[test]
fn headers_name_files_and_formats_as_qemu_does() {
    let folder = Folder::new();
    fs::write(folder.path("base"), vec![7; 65536]).unwrap();
    fs::create_dir(folder.path("deep")).unwrap();
    for (name, format) in [("file:base", "raw"), ("base", "file"), ("file:../base", "host_device")] {
        let image = if name.contains("..") { "deep/top" } else { "top" };
        let file = FileOptions::new().create_new(true).open(folder.path(image)).unwrap();
        let mut options = blockmirror_qcow2::CreateOptions::new(65536);
        (options.backing_file, options.backing_format) = (Some(name.into()), Some(format.to_owned()));
        options.create(&file, None).unwrap();
        drop(file);
        let mut policy = ReferencePolicy::beside(&folder.path(image)).unwrap();
        policy.allow_dir(&folder.path(".")).unwrap();
        let top = OpenOptions::new().policy(policy).open(folder.path(image)).unwrap();
        assert_eq!((read(&**top.device(), 0), top.backing().unwrap().format), (7, Format::Raw), "{name}");
        fs::remove_file(folder.path(image)).unwrap();
    }
}

#[test]
fn protocols_in_headers_are_opened_where_they_are_allowed() {
    let folder = Folder::new();
    fs::write(folder.path("base"), vec![7; 65536]).unwrap();
    fs::write(folder.path("rules"), "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\nsector = \"8\"\n")
        .unwrap();
    fs::create_dir_all(folder.path("in")).unwrap();
    let make = |name: &str| {
        let path = folder.path("in/top");
        let _ = fs::remove_file(&path);
        let file = FileOptions::new().create_new(true).open(&path).unwrap();
        let mut options = blockmirror_qcow2::CreateOptions::new(65536);
        (options.backing_file, options.backing_format) = (Some(name.into()), Some("raw".to_owned()));
        options.create(&file, None).unwrap();
    };
    let open = |allow_protocols: bool, allow_outside: bool| {
        let mut policy = ReferencePolicy::beside(&folder.path("in/top")).unwrap();
        if allow_protocols {
            policy.allow_protocols();
        }
        if allow_outside {
            policy.allow_dir(&folder.path(".")).unwrap();
        }
        OpenOptions::new().policy(policy).open(folder.path("in/top"))
    };
    let reason = |opened: Result<blockmirror_image::Image, Error>| match opened {
        Err(Error::Reference(refused)) => refused.reason,
        other => panic!("{other:?}"),
    };
    make("null-co://");
    assert!(matches!(reason(open(false, true)), ReferenceRefusal::NotAPath));
    assert_eq!(read(&**open(true, false).unwrap().device(), 0), 0);
    make("blkdebug:../rules:../base");
    assert!(matches!(reason(open(false, true)), ReferenceRefusal::NotAPath));
    // Both files are outside of the image's folder.
    assert!(matches!(reason(open(true, false)), ReferenceRefusal::Outside { .. }));
    let image = open(true, true).unwrap();
    assert_eq!(read(&**image.device(), 0), 7);
    assert!(image.device().read_at(&mut [0; 512], 8 * 512).is_err());
    make("blkdebug::../base");
    assert_eq!(read(&**open(true, true).unwrap().device(), 0), 7);
    // The rules alone are outside.
    fs::hard_link(folder.path("base"), folder.path("in/base")).unwrap();
    make("blkdebug:../rules:base");
    assert!(matches!(reason(open(true, false)), ReferenceRefusal::Outside { .. }));
    for name in ["json:{}", "nbd://localhost/x", "blkdebug:x", "null-co://?size=1"] {
        make(name);
        assert!(matches!(reason(open(true, true)), ReferenceRefusal::NotAPath), "{name}");
    }
}

/// Each layer may have a large L1 table; a chain of them took gigabytes of memory.
#[test]
fn the_l1_tables_of_a_chain_are_bounded_together() {
    let folder = Folder::new();
    // An L1 table of 30 MiB each, which takes no space on disk.
    let options = |index: u32| match index.checked_sub(1) {
        Some(below) => format!("cluster_size=512,backing_file={below},backing_fmt=qcow2"),
        None => "cluster_size=512".to_owned(),
    };
    // Made from the top down: there is nothing below to look at yet.
    for index in (0..9).rev() {
        folder.create(&index.to_string(), Format::Qcow2, 120 << 30, &options(index));
    }
    folder.options("3").open(folder.path("3")).unwrap();
    match folder.options("8").open(folder.path("8")) {
        Err(Error::ChainTables { path, bytes, limit }) => {
            // The first layer is the top: the ninth no longer fits.
            assert_eq!((path, limit), (folder.path("0"), MAX_CHAIN_L1_BYTES));
            assert!(bytes > limit);
        }
        other => panic!("{other:?}"),
    }
}

/// The chain of the header was shown, or missed, though the image is opened on another one.
#[test]
fn what_is_typed_below_an_image_is_in_its_chain() {
    let folder = Folder::new();
    folder.create("base", Format::Raw, 65536, "");
    folder.create("header", Format::Qcow2, 65536, "");
    folder.create("other/typed", Format::Qcow2, 65536, "");
    folder.create("middle", Format::Qcow2, 65536, "backing_file=base,backing_fmt=raw");
    folder.create("top", Format::Qcow2, 65536, "backing_file=header,backing_fmt=qcow2");
    fs::remove_file(folder.path("header")).unwrap();
    let chain = |backing: &str| {
        let top = format!(
            r#"json:{{"driver":"qcow2","file.filename":"{}",{backing}}}"#,
            folder.path("top").display()
        );
        let name = ImageName::parse(Path::new(&top)).unwrap();
        let chain = read_chain(&name.path, &folder.options("top").node(name.node).format(name.format))?;
        Ok::<_, Error>(chain.into_iter().map(|info| info.path).collect::<Vec<_>>())
    };
    let file = |name: &str| format!(r#""driver":"qcow2","file.filename":"{}""#, folder.path(name).display());
    let (typed, middle, top) = (file("other/typed"), file("middle"), file("top"));
    let paths = |names: &[&str]| names.iter().map(|name| folder.path(name)).collect::<Vec<_>>();
    let found = chain(&format!(r#""backing":{{{middle}}}"#)).unwrap();
    assert_eq!(found, paths(&["top", "middle", "base"]));
    let found = chain(&format!(r#""backing":{{{typed},"backing":{{{middle}}}}}"#)).unwrap();
    assert_eq!(found, paths(&["top", "other/typed", "middle", "base"]));
    let found = chain(&format!(r#""backing":{{{middle},"backing":null}}"#)).unwrap();
    assert_eq!(found, paths(&["top", "middle"]));
    for cycle in [format!(r#""backing":{{{top}}}"#), format!(r#""backing":{{{middle},"backing":{{{top}}}}}"#)]
    {
        let refused = chain(&cycle).unwrap_err();
        assert!(
            matches!(&refused, Error::Reference(error) if matches!(error.reason, ReferenceRefusal::Cycle)),
            "{refused}"
        );
    }
}
