//! Copies that share blocks with their source, on file systems that can: each rule of `--reflink`. Needs
//! root, loop devices, and `mkfs.xfs` and `mkfs.btrfs`; skipped visibly without.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;

use blockmirror_testing::LoopFs;
use serde_json::Value;

use crate::common::{Place, have_qemu};

const MIB: u64 = 1 << 20;

/// Runs `test` on each file system with reflinks, in a folder on it.
fn on_each(name: &str, test: impl Fn(&Place)) {
    for fs in LoopFs::with_reflinks(name) {
        let place = Place::within(fs.path());
        test(&place);
        drop(place);
    }
}

/// Bytes without a zero among them, which tell where they are.
fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|at| (at / 512 % 251) as u8 + 1).collect()
}

/// Bytes in use on the file system of `path`, once everything is written.
fn used(path: &Path) -> u64 {
    assert!(Command::new("sync").arg("-f").arg(path).status().unwrap().success());
    let out = Command::new("df").args(["-B1", "--output=used"]).arg(path).output().unwrap();
    String::from_utf8(out.stdout).unwrap().lines().nth(1).unwrap().trim().parse().unwrap()
}

/// What a copy says for programs.
fn copy(place: &Place, line: &str) -> Value {
    serde_json::from_str(&place.ours_ok(&format!("{line} --output=json"))).unwrap()
}

/// Bytes shared, and bytes copied.
fn figures(done: &Value) -> (u64, u64) {
    (done["shared"].as_u64().unwrap(), done["copied"].as_u64().unwrap())
}

fn same(place: &Place, a: &str, b: &str) {
    assert_eq!(place.ours_ok(&format!("compare {a} {b}")), "Images are identical.\n", "{a} {b}");
    if have_qemu("reflink::same") {
        place.img(&format!("compare {a} {b}"));
    }
}

#[test]
fn data_is_shared_across_formats() {
    on_each("data_is_shared_across_formats", |place| {
        let bytes = pattern(16 * MIB);
        fs::write(place.path("a.raw"), &bytes).unwrap();
        place.ours_ok("convert -q --reflink=never -O qcow2 @a.raw @a.qcow2");
        let qcow2 = fs::read(place.path("a.qcow2")).unwrap();
        for (from, format) in [("a.raw", "raw"), ("a.qcow2", "raw"), ("a.raw", "qcow2"), ("a.qcow2", "qcow2")]
        {
            let before = used(&place.path(""));
            let done = copy(place, &format!("convert -O {format} @{from} @t"));
            assert_eq!(figures(&done), (16 * MIB, 0), "{from} {format}");
            assert!((1..100).contains(&done["clone-calls"].as_u64().unwrap()), "{done}");
            // What the last target had of its own is free again.
            let grown = used(&place.path("")).saturating_sub(before);
            assert!(grown < 4 * MIB, "{from} {format}: {grown} bytes more in use");
            same(place, &format!("@{from}"), "@t");
            if format == "qcow2" {
                place.ours_ok("check @t");
                if have_qemu("data_is_shared_across_formats") {
                    place.img("check @t");
                }
            }
            // A change of the copy is not one of the source.
            let mut target = fs::File::options().write(true).open(place.path("t")).unwrap();
            let len = target.seek(SeekFrom::End(0)).unwrap();
            target.seek(SeekFrom::Start(len / 2)).unwrap();
            target.write_all(&[0xee; 100_000]).unwrap();
            target.sync_all().unwrap();
            assert!(fs::read(place.path("a.raw")).unwrap() == bytes);
            assert!(fs::read(place.path("a.qcow2")).unwrap() == qcow2);
        }
    });
}

#[test]
fn a_tail_that_is_no_whole_block_is_copied() {
    on_each("a_tail_that_is_no_whole_block_is_copied", |place| {
        fs::write(place.path("a.raw"), pattern(MIB + 1000)).unwrap();
        for format in ["raw", "qcow2"] {
            let done = copy(place, &format!("convert -f raw -O {format} @a.raw @t"));
            assert_eq!(figures(&done).0, MIB, "{format}");
            assert_eq!(
                done["copied"].as_u64().unwrap() + done["skipped"].as_u64().unwrap(),
                1024,
                "{format}"
            );
            same(place, "@a.raw", "@t");
        }
    });
}

#[test]
fn nothing_is_shared_where_that_is_asked_for() {
    on_each("nothing_is_shared_where_that_is_asked_for", |place| {
        fs::write(place.path("a.raw"), pattern(4 * MIB)).unwrap();
        for options in ["--reflink=never", "-S 4k", "-S 0", "-o preallocation=full", "-t writethrough -S 64k"]
        {
            let done = copy(place, &format!("convert {options} @a.raw @t"));
            assert_eq!(figures(&done), (0, 4 * MIB), "{options}");
            assert_eq!(done["clone-calls"], 0, "{options}");
            same(place, "@a.raw", "@t");
        }
        let said = place.ours_fails("convert --reflink=always -S 4k @a.raw @u", 2);
        assert!(said.contains("cannot be combined with -S"), "{said}");
    });
}

/// The named exception: they are not looked for in what is shared.
#[test]
fn zeros_that_were_written_are_shared_as_data() {
    on_each("zeros_that_were_written_are_shared_as_data", |place| {
        let mut bytes = pattern(4 * MIB);
        bytes[MIB as usize..2 << 20].fill(0);
        fs::write(place.path("a.raw"), bytes).unwrap();
        let (shared, copied) = figures(&copy(place, "convert @a.raw @t"));
        assert_eq!((shared, copied), (4 * MIB, 0));
        let done = copy(place, "convert -S 4k @a.raw @u");
        assert_eq!(figures(&done), (0, 3 * MIB));
        same(place, "@t", "@u");
    });
}

/// Under QEMU's name they become holes, as there.
#[test]
fn under_the_name_qemu_img_nothing_is_shared_unless_that_is_asked_for() {
    on_each("under_the_name_qemu_img_nothing_is_shared_unless_that_is_asked_for", |place| {
        let mut bytes = pattern(4 * MIB);
        bytes[MIB as usize..2 << 20].fill(0);
        fs::write(place.path("a.raw"), bytes).unwrap();
        for (options, shared) in [(&[][..], false), (&["--reflink=auto"][..], true)] {
            let (from, to) = (place.path("a.raw"), place.path("t"));
            let paths = [from.to_str().unwrap(), to.to_str().unwrap()];
            let words = ["qemu-img", "convert"].into_iter().chain(options.iter().copied()).chain(paths);
            let (mut out, mut err) = (Vec::new(), Vec::new());
            let code = blockmirror_cli::run(words.map(str::to_owned), &mut out, &mut err);
            assert_eq!(i32::from(code), 0, "{}", String::from_utf8_lossy(&err));
            let file = fs::File::open(place.path("t")).unwrap();
            let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(MIB as _)).unwrap();
            assert_eq!(hole == MIB, !shared, "{options:?}: a hole at {hole}");
            same(place, "@a.raw", "@t");
        }
    });
}

#[test]
fn holes_stay_holes_and_layers_are_shared_each() {
    on_each("holes_stay_holes_and_layers_are_shared_each", |place| {
        let mut base = fs::File::create(place.path("base.raw")).unwrap();
        base.write_all(&pattern(2 * MIB)).unwrap();
        base.set_len(16 * MIB).unwrap();
        drop(base);
        place.ours_ok("create -q -f qcow2 -b base.raw -F raw @top.qcow2");
        if !have_qemu("holes_stay_holes_and_layers_are_shared_each") {
            return;
        }
        place.io_as("qcow2", "top.qcow2", &["write -P 0x55 8M 1M", "write -z 0 64k"]);
        for format in ["raw", "qcow2"] {
            let done = copy(place, &format!("convert -O {format} @top.qcow2 @t"));
            assert_eq!(figures(&done), (3 * MIB - 65_536, 0), "{format}: {done}");
            same(place, "@top.qcow2", "@t");
        }
    });
}

#[test]
fn what_is_stored_in_another_way_is_copied() {
    on_each("what_is_stored_in_another_way_is_copied", |place| {
        fs::write(place.path("a.raw"), pattern(4 * MIB)).unwrap();
        place.ours_ok("convert -q -c -O qcow2 @a.raw @packed.qcow2");
        // Compressed; several clusters in a block; compressed anew; read by a verification.
        for line in [
            "convert -O raw @packed.qcow2 @t",
            "convert -O qcow2 -o cluster_size=2k @a.raw @t",
            "convert -c -O qcow2 @a.raw @t",
            "convert --verify=hash @a.raw @t",
            "convert --verify=readback @a.raw @t",
        ] {
            let done = copy(place, line);
            assert_eq!((figures(&done), &done["clone-calls"]), ((0, 4 * MIB), &Value::from(0)), "{line}");
            same(place, "@a.raw", "@t");
            fs::remove_file(place.path("t")).unwrap();
            let (code, why) = match line.contains("--verify") {
                true => (2, "cannot be combined with --reflink=always"),
                false => (1, "can share no blocks with source"),
            };
            let said = place.ours_fails(&line.replace("convert", "convert --reflink=always"), code);
            assert!(said.contains(why), "{line}: {said}");
            assert!(!place.path("t").exists(), "{line}");
            // What would be written in place keeps what it holds.
            fs::write(place.path("t"), [0xcc; 100_000]).unwrap();
            let in_place = line.replace("convert", "convert --reflink=always --in-place");
            let said = place.ours_error(&in_place, code);
            assert!(said.contains(why), "{line}: {said}");
            assert!(fs::read(place.path("t")).unwrap() == [0xcc; 100_000], "{line}: {said}");
            fs::remove_file(place.path("t")).unwrap();
        }
    });
}

#[test]
fn clusters_that_are_partly_allocated_are_copied() {
    on_each("clusters_that_are_partly_allocated_are_copied", |place| {
        if !have_qemu("clusters_that_are_partly_allocated_are_copied") {
            return;
        }
        place.img("create -q -f qcow2 -o extended_l2=on @a.qcow2 1M");
        place.io_as("qcow2", "a.qcow2", &["write -P 1 0 64k", "write -P 2 70k 8k", "write -P 3 196608 2k"]);
        for options in ["-O qcow2", "-O qcow2 -o extended_l2=on", "-O raw"] {
            let done = copy(place, &format!("convert {options} @a.qcow2 @t"));
            let (shared, _) = figures(&done);
            assert!((65_536..=65_536 + 8192).contains(&shared), "{options}: {done}");
            assert_eq!(shared % 4096, 0, "{options}: {done}");
            same(place, "@a.qcow2", "@t");
        }
    });
}

#[test]
fn files_of_two_file_systems_share_nothing() {
    on_each("files_of_two_file_systems_share_nothing", |place| {
        let other = Place::new();
        fs::write(other.path("a.raw"), pattern(4 * MIB)).unwrap();
        let source = other.path("a.raw").display().to_string();
        let done = copy(place, &format!("convert {source} @t"));
        assert_eq!(figures(&done), (0, 4 * MIB));
        let old = pattern(8 * MIB);
        for how in ["-q", "--in-place", "-n"] {
            fs::write(place.path("t"), &old).unwrap();
            let said = place.ours_error(&format!("convert --reflink=always {how} -O raw {source} @t"), 1);
            assert!(said.contains("can share no blocks with source"), "{how}: {said}");
            assert!(fs::read(place.path("t")).unwrap() == old, "{how}: the target has lost what it held");
        }
        // With nothing to share nothing is refused.
        fs::File::create(other.path("a.raw")).unwrap().set_len(MIB).unwrap();
        place.ours_ok(&format!("convert -q --reflink=always {source} @u"));
    });
}

#[test]
fn an_image_that_exists_is_shared_into() {
    on_each("an_image_that_exists_is_shared_into", |place| {
        let bytes = pattern(4 * MIB);
        fs::write(place.path("a.raw"), &bytes).unwrap();
        for format in ["raw", "qcow2"] {
            place.ours_ok(&format!("create -q -f {format} @t 5M"));
            if format == "raw" {
                fs::write(place.path("t"), vec![0x77; 5 << 20]).unwrap();
            }
            let done = copy(place, &format!("convert --reflink=always -n -O {format} @a.raw @t"));
            assert_eq!(figures(&done), (4 * MIB, 0), "{format}");
            place.ours_ok(&format!("convert -q -O raw -f {format} @t @u"));
            let rest = if format == "raw" { 0x77 } else { 0 };
            let found = fs::read(place.path("u")).unwrap();
            assert!(found[..4 << 20] == bytes && found[4 << 20..].iter().all(|byte| *byte == rest));
        }
        place.ours_ok("check @t");
    });
}

#[test]
fn nocow_files_of_btrfs_are_copied_to_others() {
    let Some(fs) = LoopFs::new("nocow_files_of_btrfs_are_copied_to_others", "btrfs", &[]) else { return };
    let place = Place::within(fs.path());
    fs::write(place.path("a.raw"), pattern(4 * MIB)).unwrap();
    fs::create_dir(place.path("nocow")).unwrap();
    match Command::new("chattr").arg("+C").arg(place.path("nocow")).status() {
        Ok(status) if status.success() => {}
        other => return blockmirror_testing::skip_unsupported(format_args!("chattr +C: {other:?}")),
    }
    assert_eq!(figures(&copy(&place, "convert @a.raw @nocow/b.raw")), (0, 4 * MIB));
    // Between two of them, it works.
    assert_eq!(figures(&copy(&place, "convert @nocow/b.raw @nocow/c.raw")), (4 * MIB, 0));
    same(&place, "@a.raw", "@nocow/c.raw");
    let said = place.ours_fails("convert --reflink=always @a.raw @nocow/d.raw", 1);
    assert!(said.contains("can share no blocks with source"), "{said}");
}

#[test]
fn smaller_blocks_let_smaller_clusters_share() {
    let name = "smaller_blocks_let_smaller_clusters_share";
    let Some(fs) = LoopFs::new(name, "xfs", &["-b", "size=1024"]) else { return };
    let place = Place::within(fs.path());
    fs::write(place.path("a.raw"), pattern(4 * MIB)).unwrap();
    let done = copy(&place, "convert -O qcow2 -o cluster_size=2k @a.raw @t.qcow2");
    assert_eq!(figures(&done), (4 * MIB, 0));
    same(&place, "@a.raw", "@t.qcow2");
    let done = copy(&place, "convert -O raw @t.qcow2 @t.raw");
    assert_eq!(figures(&done), (4 * MIB, 0));
    same(&place, "@a.raw", "@t.raw");
}
