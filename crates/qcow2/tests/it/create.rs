//! New images over the matrix of options: `qemu-img` finds them clean, and tells about them exactly what it
//! tells about those it creates itself.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;

use blockmirror_block::Storage;
use blockmirror_file::{FileOptions, FileStorage};
use blockmirror_qcow2::options::{OPTIONS, OptionDef, OptionValue};
use blockmirror_qcow2::{Compression, CreateOptions, Error, Header, Preallocation, Version};
use blockmirror_testing::qemu::have;

fn new_file(dir: &Path, name: &str) -> FileStorage {
    let path = dir.join(name);
    let _ = std::fs::remove_file(&path);
    FileOptions::new().create_new(true).open(path).unwrap()
}

/// Creates `name` in `dir`, and the data file if the options name one.
fn create(dir: &Path, name: &str, options: &CreateOptions) -> Result<(), Error> {
    let storage = new_file(dir, name);
    let data = options.data_file.as_ref().map(|data| new_file(dir, std::str::from_utf8(data).unwrap()));
    options.create(&storage, data.as_ref().map(|d| d as &dyn Storage))
}

/// What the same options are on `qemu-img`'s command line.
fn as_qemu(options: &CreateOptions) -> String {
    let part = |option: &OptionDef| {
        let value = match option.get(options)? {
            OptionValue::Flag(true) => "on".to_owned(),
            OptionValue::Flag(false) => "off".to_owned(),
            OptionValue::Number(number) => number.to_string(),
            OptionValue::Choice(choice) => choice.to_owned(),
            OptionValue::Text(text) => String::from_utf8(text).unwrap(),
        };
        Some(format!("{}={value}", option.name))
    };
    // The size is an argument of its own, and only a data file is raw.
    let left_out = |name| name == "size" || (name == "data_file_raw" && options.data_file.is_none());
    let parts: Vec<_> = OPTIONS.iter().filter(|option| !left_out(option.name)).filter_map(part).collect();
    parts.join(",")
}

/// The members of `qemu-img info` that the options decide.
fn described(dir: &Path, image: &str) -> Vec<serde_json::Value> {
    let info = crate::qemu::info(dir, image);
    ["virtual-size", "cluster-size", "backing-filename", "backing-filename-format", "format-specific"]
        .iter()
        .map(|key| info.get(key).cloned().unwrap_or_default())
        .collect()
}

/// The combinations worth trying, valid or not.
fn matrix() -> Vec<CreateOptions> {
    use Preallocation::{Falloc, Full, Metadata, Off};

    let mut out = Vec::new();
    for version in [Version::V2, Version::V3] {
        for cluster_size in [512, 16384, 65536, 2 << 20] {
            let mut add = |size, change: &dyn Fn(&mut CreateOptions)| {
                let mut options = CreateOptions::new(size);
                (options.version, options.cluster_size) = (version, cluster_size);
                change(&mut options);
                out.push(options);
            };
            for preallocation in [Off, Metadata, Falloc, Full] {
                for size in [0, 1, 1_000_000] {
                    add(size, &|o| o.preallocation = preallocation);
                }
            }
            for refcount_bits in [1, 2, 4, 8, 32, 64] {
                add(1_000_000, &|o| (o.preallocation, o.refcount_bits) = (Metadata, refcount_bits));
            }
            for (preallocation, extended_l2) in
                [(Off, false), (Metadata, false), (Full, false), (Off, true), (Metadata, true), (Full, true)]
            {
                let mut add = |change: &dyn Fn(&mut CreateOptions)| {
                    add(3 << 20, &|o| {
                        (o.preallocation, o.extended_l2) = (preallocation, extended_l2);
                        change(o);
                    });
                };
                add(&|_| ());
                add(&|o| o.lazy_refcounts = true);
                add(&|o| o.compression = Compression::Zstd);
                add(&|o| o.data_file = Some(b"data".to_vec()));
                add(&|o| (o.data_file, o.data_file_raw) = (Some(b"raw data".to_vec()), true));
                add(&with_backing);
                add(&|o| {
                    with_backing(o);
                    o.data_file = Some(b"data".to_vec());
                });
            }
        }
    }
    out
}

fn with_backing(options: &mut CreateOptions) {
    options.backing_file = Some(b"base".to_vec());
    options.backing_format = Some("raw".into());
}

#[test]
fn the_matrix_of_options_agrees_with_qemu_img() {
    if !have("the_matrix_of_options_agrees_with_qemu_img", &["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("base"), vec![7; 3 << 20]).unwrap();
    let (mut made, mut refused) = (0, 0);
    for options in matrix() {
        let line = as_qemu(&options);
        let size = options.size.to_string();
        let _ = std::fs::remove_file(dir.join("theirs"));
        let theirs = crate::qemu::img(dir, &["create", "-q", "-f", "qcow2", "-o", &line, "theirs", &size])
            .map(|_| described(dir, "theirs"));
        match (create(dir, "ours", &options), theirs) {
            (Ok(()), Ok(theirs)) => {
                crate::qemu::assert_clean(dir, "ours", &line);
                assert_eq!(described(dir, "ours"), theirs, "{line}");
                let truth =
                    crate::qemu::img(dir, &["compare", "-f", "qcow2", "-F", "qcow2", "ours", "theirs"]);
                assert!(truth.is_ok(), "{line}: {truth:?}");
                let header = Header::read(&new_reader(dir, "ours")).unwrap();
                header.check_writable().unwrap();
                made += 1;
            }
            (Err(_), Err(_)) => refused += 1,
            (ours, theirs) => panic!("{line}: ours {ours:?}, theirs {theirs:?}"),
        }
    }
    eprintln!("{made} images made alike, {refused} combinations refused alike");
    assert!(made > 200 && refused > 100, "{made} made, {refused} refused");
}

fn new_reader(dir: &Path, name: &str) -> FileStorage {
    FileOptions::new().open(dir.join(name)).unwrap()
}

#[test]
fn a_plain_image_has_the_same_bytes_as_one_of_qemu_img() {
    if !have("a_plain_image_has_the_same_bytes_as_one_of_qemu_img", &["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (version, cluster_size) in
        [(Version::V2, 512), (Version::V2, 65536), (Version::V3, 65536), (Version::V3, 2 << 20)]
    {
        let mut options = CreateOptions::new(1 << 20);
        (options.version, options.cluster_size) = (version, cluster_size);
        create(dir, "ours", &options).unwrap();
        let line = as_qemu(&options);
        crate::qemu::img(dir, &["create", "-q", "-f", "qcow2", "-o", &line, "theirs", "1M"]).unwrap();
        assert!(
            std::fs::read(dir.join("ours")).unwrap() == std::fs::read(dir.join("theirs")).unwrap(),
            "{line}"
        );
    }
}

#[test]
fn preallocated_images_take_writes_of_qemu() {
    if !have("preallocated_images_take_writes_of_qemu", &["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (extended_l2, data_file, refcount_bits) in
        [(false, false, 1), (true, false, 16), (false, true, 16), (true, true, 64)]
    {
        let mut options = CreateOptions::new(10 << 20);
        options.preallocation = Preallocation::Metadata;
        (options.extended_l2, options.refcount_bits) = (extended_l2, refcount_bits);
        options.data_file = data_file.then(|| b"data".to_vec());
        create(dir, "ours", &options).unwrap();
        crate::qemu::io(dir, "ours", &["write -P 5 0 1M", "write -P 6 3000k 3000k", "write -z 9M 1M"])
            .unwrap();
        let read =
            crate::qemu::io(dir, "ours", &["read -P 5 0 1M", "read -P 6 3000k 3000k", "read -P 0 6M 4M"])
                .unwrap();
        assert!(!read.contains("verification failed"), "{read}");
        crate::qemu::assert_clean(dir, "ours", &format!("{options:?}"));
    }
}

#[test]
fn large_images_cost_metadata_only() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut options = CreateOptions::new(8 << 40);
    options.cluster_size = 2 << 20;
    options.preallocation = Preallocation::Metadata;
    create(dir, "ours", &options).unwrap();
    let header = Header::read(&new_reader(dir, "ours")).unwrap();
    assert_eq!((header.virtual_size, header.l1_entries), (8 << 40, 16));
    if have("large_images_cost_metadata_only", &["qemu-img"]) {
        crate::qemu::assert_clean(dir, "ours", "8 TiB");
    }
}

#[test]
fn what_is_refused_says_which_option_and_why() {
    let mut lines = String::new();
    let mut refuse = |change: &dyn Fn(&mut CreateOptions)| {
        let mut options = CreateOptions::new(1 << 20);
        change(&mut options);
        lines += &format!("{}\n", options.check().unwrap_err());
    };
    refuse(&|o| o.cluster_size = 256);
    refuse(&|o| o.cluster_size = 3000);
    refuse(&|o| o.cluster_size = 4 << 20);
    refuse(&|o| o.refcount_bits = 3);
    refuse(&|o| o.refcount_bits = 128);
    refuse(&|o| (o.version, o.refcount_bits) = (Version::V2, 8));
    refuse(&|o| (o.version, o.compression) = (Version::V2, Compression::Zstd));
    refuse(&|o| (o.extended_l2, o.cluster_size) = (true, 8192));
    refuse(&|o| o.data_file_raw = true);
    refuse(&|o| {
        o.data_file = Some(b"d".to_vec());
        (o.data_file_raw, o.backing_file) = (true, Some(b"b".to_vec()));
    });
    refuse(&|o| (o.backing_file, o.preallocation) = (Some(b"b".to_vec()), Preallocation::Full));
    refuse(&|o| o.backing_format = Some("raw".into()));
    refuse(&|o| {
        (o.backing_file, o.backing_format) = (Some(b"b".to_vec()), Some("a format of many words".into()))
    });
    refuse(&|o| o.backing_file = Some(vec![b'b'; 1024]));
    refuse(&|o| o.backing_file = Some(b"a\0b".to_vec()));
    refuse(&|o| (o.backing_file, o.cluster_size) = (Some(vec![b'b'; 400]), 512));
    refuse(&|o| (o.size, o.cluster_size) = (129 << 30, 512));
    refuse(&|o| (o.size, o.cluster_size) = (u64::MAX, 2 << 20));
    insta::assert_snapshot!(lines, @r#"
    option cluster_size: 256 is not a power of two from 512 to 2097152 (2 MiB)
    option cluster_size: 3000 is not a power of two from 512 to 2097152 (2 MiB)
    option cluster_size: 4194304 is not a power of two from 512 to 2097152 (2 MiB)
    option refcount_bits: 3 is not a power of two from 1 to 64
    option refcount_bits: 128 is not a power of two from 1 to 64
    option refcount_bits: it needs compat=1.1, not 0.10
    option compression_type: it needs compat=1.1, not 0.10
    option extended_l2: it needs clusters of 16384 bytes or more, not 8192
    option data_file_raw: it needs a data_file
    option data_file_raw: it cannot be combined with a backing_file
    option preallocation: with a backing_file it needs extended_l2
    option backing_fmt: it needs a backing_file
    option backing_fmt: "a format of many words" is not the name of a format
    option backing_file: the name has 1024 bytes, 1 to 1023 are allowed
    option backing_file: the name has a NUL byte
    option backing_file: the name does not fit into a cluster of 512 bytes
    option size: 138512695296 is too large for clusters of 512 bytes, which allow about 137438953472
    option size: 18446744073709551615 is more than 9223372036854775807
    "#);
}

#[test]
fn a_data_file_is_handed_over_exactly_when_it_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (image, data) = (new_file(dir.path(), "image"), new_file(dir.path(), "data"));
    let mut options = CreateOptions::new(1 << 20);
    assert!(matches!(options.create(&image, Some(&data)), Err(Error::Option { option: "data_file", .. })));
    options.data_file = Some(b"data".to_vec());
    assert!(matches!(options.create(&image, None), Err(Error::Option { option: "data_file", .. })));
}

#[test]
fn creating_over_an_old_image_leaves_nothing_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let image = new_file(dir.path(), "image");
    image.write_at(&vec![0xaa; 3 << 20], 0).unwrap();
    CreateOptions::new(1 << 20).create(&image, None).unwrap();
    assert_eq!(image.len().unwrap(), 196_616);
    let mut byte = [1];
    image.read_at(&mut byte, 65_536 + 8).unwrap();
    assert_eq!(byte, [0]);
}
