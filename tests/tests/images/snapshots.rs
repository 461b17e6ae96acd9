//! What users and scripts see, as text under `snapshots/`: parsed metadata, `info`, `map`, the plan, help,
//! errors.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::common::ours;
use blockmirror_block::testing::MemoryStorage;
use blockmirror_qcow2::Header;
use blockmirror_testing::scratch::scratch;
use blockmirror_testing::testdata::{Manifest, folder};
use insta::assert_snapshot;
use tempfile::TempDir;

/// Unpacks stored images into one folder.
fn unpacked(names: &[&str]) -> TempDir {
    let dir = scratch().unwrap();
    let manifest = Manifest::load(&folder()).unwrap();
    for name in names {
        manifest.entry(name).unwrap().unpack(&folder(), dir.path()).unwrap();
    }
    dir
}

/// Runs a command line on files in `dir` (`@` stands for the folder); everything it said, and the exit code.
fn said(dir: &Path, line: &str) -> String {
    let place = dir.to_str().unwrap();
    let ran = ours(line.split(' ').map(|word| word.replacen('@', &format!("{place}/"), 1)));
    let mut text = format!("$ blockmirror {}\n", line.replace('@', ""));
    for out in [&ran.stdout, &ran.stderr] {
        text.push_str(&steady(&out.replace(&format!("{place}/"), "").replace(place, "DIR")));
    }
    if ran.code != 0 {
        writeln!(text, "[exit code {}]", ran.code).unwrap();
    }
    text
}

/// Blanks out what differs between file systems and runs: space taken on the host, time.
fn steady(text: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        let blanked =
            ["\"actual-size\":", "\"free\":", "disk size:", "\"elapsed", "\"date-sec\":", "\"date-nsec\":"]
                .iter()
                .find_map(|key| line.find(key).map(|at| format!("{} ..", &line[..at + key.len()])));
        let line = blanked.unwrap_or_else(|| line.to_owned());
        lines.push(match line.find(", in ") {
            Some(at) if line.ends_with(" s") => format!("{}, in .. s", &line[..at]),
            _ => line,
        });
    }
    lines.iter().map(|l| l.trim_end().to_owned() + "\n").collect()
}

fn all_said(dir: &Path, lines: &[&str]) -> String {
    lines.iter().map(|line| said(dir, line)).collect::<Vec<_>>().join("\n")
}

#[test]
fn parsed_metadata() {
    let images = [
        "v2-512-plain.qcow2",
        "v3-512-refcount1.qcow2",
        "v3-64k-extended_l2.qcow2",
        "v3-64k-chain.qcow2",
        "v3-4k-data_file_raw.qcow2",
        "v3-4k-bitmap.qcow2",
        "v3-4k-snapshot.qcow2",
        "v3-4k-dirty.qcow2",
        "v3-4k-zstd.qcow2",
    ];
    let dir = unpacked(&images);
    let mut text = String::new();
    for name in images {
        let bytes = fs::read(dir.path().join(name)).unwrap();
        let storage = Arc::new(MemoryStorage::with_contents(&bytes));
        let header = Header::read(&*storage).unwrap();
        writeln!(text, "{name}\n{header:#?}\n").unwrap();
    }
    assert_snapshot!(text);
}

#[test]
fn info() {
    let images = [
        "v3-64k-chain.qcow2",
        "v2-4k-plain.qcow2",
        "v3-4k-data_file.qcow2",
        "v3-4k-snapshot.qcow2",
        "v3-4k-bitmap.qcow2",
        "v2-4k-aes.qcow2",
        "odd.raw",
    ];
    let dir = unpacked(&images);
    let text = all_said(
        dir.path(),
        &[
            "info @v3-64k-chain.qcow2",
            "info --backing-chain --output=json @v3-64k-chain.qcow2",
            "info --output=json @v2-4k-plain.qcow2",
            "info @v3-4k-data_file.qcow2",
            "info --output=json @v3-4k-data_file.qcow2",
            "info @v3-4k-snapshot.qcow2",
            "info --output=json @v3-4k-bitmap.qcow2",
            "info @v2-4k-aes.qcow2",
            "info --output=json @odd.raw",
        ],
    );
    assert_snapshot!(text);
}

#[test]
fn map() {
    let dir = unpacked(&["v3-64k-chain.qcow2", "v2-4k-zeroes.qcow2", "v3-64k-extended_l2_deflate.qcow2"]);
    let text = all_said(
        dir.path(),
        &[
            "map @v3-64k-chain.qcow2",
            "map --output=json @v3-64k-chain.qcow2",
            "map --output=json @v2-4k-zeroes.qcow2",
            "map --output=json @v3-64k-extended_l2_deflate.qcow2",
            "map --output=json -s 64K -l 128K @v3-64k-chain.qcow2",
        ],
    );
    assert_snapshot!(text);
}

#[test]
fn plan() {
    let dir = unpacked(&["v3-64k-chain.qcow2", "v2-4k-plain.qcow2"]);
    let text = all_said(
        dir.path(),
        &[
            "mirror --dry-run @v3-64k-chain.qcow2 @new.qcow2",
            "mirror --dry-run --output=json @v3-64k-chain.qcow2 @new.qcow2",
            "mirror --dry-run -O raw @v3-64k-chain.qcow2 @new.raw",
            "mirror --dry-run -O qcow2 -o cluster_size=2M @v2-4k-plain.qcow2 @new.qcow2",
            "mirror --dry-run --sync=top -B v3-64k-chain-middle.qcow2 -F qcow2 @v3-64k-chain.qcow2 @new.qcow2",
            "mirror --dry-run --granularity=1M @v2-4k-plain.qcow2 @new.qcow2",
        ],
    );
    assert_snapshot!(text);
}

#[test]
fn copies_and_comparisons() {
    let dir = unpacked(&["v3-64k-chain.qcow2", "v2-4k-plain.qcow2"]);
    let text = all_said(
        dir.path(),
        &[
            "mirror @v3-64k-chain.qcow2 @copy.qcow2",
            "mirror --output=json @v3-64k-chain.qcow2 @copy.json.qcow2",
            "convert @copy.qcow2 @copy.raw",
            "compare @copy.raw @v3-64k-chain.qcow2",
            "compare @copy.raw @v2-4k-plain.qcow2",
            "create -f qcow2 -o cluster_size=4k @new.qcow2 1G",
            "create -f qcow2 -b copy.qcow2 -F qcow2 @overlay.qcow2",
            "create -f qcow2 -o help",
        ],
    );
    assert_snapshot!(text);
}

#[test]
fn checks() {
    let dir = unpacked(&["v3-4k-snapshot.qcow2", "v3-4k-dirty.qcow2", "odd.raw"]);
    let path = dir.path().join("v3-4k-dirty.qcow2");
    let mut bytes = fs::read(&path).unwrap();
    // The refcount of cluster 1 becomes 3, that of cluster 4 becomes 0.
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let block = word(word(48));
    bytes[block + 3] = 3;
    bytes[block + 9] = 0;
    fs::write(&path, bytes).unwrap();
    let text = all_said(
        dir.path(),
        &[
            "check @v3-4k-snapshot.qcow2",
            "check --output=json @v3-4k-snapshot.qcow2",
            "check @v3-4k-dirty.qcow2",
            "check --output=json @v3-4k-dirty.qcow2",
            "check -r leaks @v3-4k-dirty.qcow2",
            "check -r all @v3-4k-dirty.qcow2",
            "check -q @v3-4k-dirty.qcow2",
            "check @odd.raw",
            "check @missing",
            "check -U -r all @v3-4k-dirty.qcow2",
        ],
    );
    assert_snapshot!(text);
}

#[test]
fn help() {
    let dir = scratch().unwrap();
    let text = all_said(
        dir.path(),
        &[
            "--help",
            "mirror --help",
            "convert --help",
            "plan --help",
            "create --help",
            "info --help",
            "inspect --help",
            "map --help",
            "measure --help",
            "check --help",
            "compare --help",
            "hash --help",
            "resize --help",
            "amend --help",
            "bitmap --help",
            "commit --help",
            "rebase --help",
            "dd --help",
            "bench --help",
            "daemon --help",
            "serve --help",
            "ctl --help",
            "ctl SOCKET mirror --help",
            "ctl SOCKET commit --help",
            "ctl SOCKET stream --help",
            "ctl SOCKET snapshot --help",
            "ctl SOCKET close --help",
            "ctl SOCKET jobs --help",
            "ctl SOCKET set-speed --help",
            "ctl SOCKET complete --help",
            "ctl SOCKET abort --help",
            "ctl SOCKET watch --help",
        ],
    );
    assert_snapshot!(text);
}

#[test]
fn errors() {
    let images = ["v3-64k-chain.qcow2", "v2-4k-aes.qcow2", "odd.raw", "v2-4k-plain.qcow2"];
    let dir = unpacked(&images);
    let path = |name: &str| dir.path().join(name);
    fs::write(path("short"), b"QFI\xfb\0\0\0\x03").unwrap();
    fs::write(path("version4"), [&b"QFI\xfb\0\0\0\x04"[..], &[0; 504]].concat()).unwrap();
    fs::write(path("empty"), b"").unwrap();
    fs::write(path("kdmv"), b"KDMV\x01\0\0\0".repeat(64)).unwrap();
    fs::create_dir(path("inside")).unwrap();
    fs::copy(path("v3-64k-chain-base.qcow2"), path("base.qcow2")).unwrap();
    let text = all_said(
        dir.path(),
        &[
            "mirror @missing @new",
            "mirror @v2-4k-plain.qcow2 @nowhere/new",
            "mirror @v2-4k-aes.qcow2 @new",
            "mirror -n -O raw @v2-4k-plain.qcow2 @odd.raw",
            "mirror -f qcow2 @short @new",
            "mirror -f qcow2 @version4 @new",
            "mirror -f qcow2 @empty @new",
            "mirror @kdmv @new",
            "mirror --granularity=3000 @v2-4k-plain.qcow2 @new",
            "mirror --granularity=0x @v2-4k-plain.qcow2 @new",
            "mirror --speed=-1 @v2-4k-plain.qcow2 @new",
            "mirror --on-target-error=stop @v2-4k-plain.qcow2 @new",
            "mirror -O vmdk @v2-4k-plain.qcow2 @new",
            "mirror -o cluster_size=3000 @v2-4k-plain.qcow2 @new",
            "mirror -o cluster=4k @v2-4k-plain.qcow2 @new",
            "mirror -o compat=0.10,extended_l2=on @v2-4k-plain.qcow2 @new",
            "mirror @v2-4k-plain.qcow2 @v2-4k-plain.qcow2",
            "create -f qcow2 @new",
            "create -f qcow2 @new 12Q",
            "create -f qcow2 -b missing.qcow2 -F qcow2 @new",
            "create -f qcow2 -b /etc/hostname -F raw @inside/overlay.qcow2 1M -u",
            "mirror @inside/overlay.qcow2 @new",
            "compare @missing @odd.raw",
            "frobnicate",
        ],
    );
    let mut left: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    left.retain(|name| name.contains("new"));
    assert_eq!(left, Vec::<String>::new(), "refused commands leave no file");
    assert_snapshot!(text);
}
