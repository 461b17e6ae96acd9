//! What captive servers read: other formats by qemu-nbd, archives, packed files and URLs by nbdkit.

use std::fs::{self, File};
use std::process::Command;

use super::{content, ok, place, run, split};
use crate::captive::http;
use crate::common::Place;

const LEN: usize = 6 << 20;

/// Writes `raw`, and has `tool` make something else of it.
fn with_raw(place: &Place, tool: &str, line: &str) -> Vec<u8> {
    let bytes = content(LEN);
    fs::write(place.path("raw"), &bytes).unwrap();
    let made = Command::new(tool).args(line.split(' ')).current_dir(place.path(".")).status().unwrap();
    assert!(made.success(), "{tool} {line}");
    bytes
}

/// Each format of QEMU's that is not read here: by brackets, by `--via`, and by the command that the refusal
/// of the file suggests.
#[test]
fn formats_are_read_by_qemu_nbd() {
    let Some(place) = place("formats_are_read_by_qemu_nbd", &["qemu-img", "qemu-nbd"]) else { return };
    for (format, options) in [
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=streamOptimized"),
        ("vdi", "static=off"),
        ("vhdx", "subformat=dynamic"),
        ("vpc", "subformat=dynamic,force_size=on"),
        ("qed", "cluster_size=65536"),
        ("parallels", "cluster_size=1M"),
    ] {
        let name = format!("disk.{format}");
        let bytes =
            with_raw(&place, "qemu-img", &format!("convert -f raw -O {format} -o {options} raw {name}"));
        let copied = |words: Vec<&str>| {
            let ran = ok(&place, words);
            assert!(fs::read(place.path("copy")).unwrap() == bytes, "{format}");
            fs::remove_file(place.path("copy")).unwrap();
            ran
        };
        let servers = format!("convert [ qemu-nbd -r -f {format} {name} ] copy");
        copied(split(&servers));
        let ran = copied(split(&format!("convert --via qemu-nbd {name} copy")));
        assert!(ran.out.contains(&format!("[ qemu-nbd -r -f {format} {name} ] -> copy (raw)")), "{ran:?}");
        ok(&place, split(&format!("compare --via qemu-nbd -f raw raw {name}")));
        let refused = run(&place, ["info", &*name]);
        assert_eq!(refused.code, 1, "{refused:?}");
        let suggested = format!("[ qemu-nbd -r -f {format} {name} ]");
        assert!(refused.err.contains(&suggested), "{refused:?}");
        // Given as raw it is what it was.
        ok(&place, ["convert", "-f", "raw", &*name, "copy"]);
        assert_eq!(fs::read(place.path("copy")).unwrap(), fs::read(place.path(&name)).unwrap());
        fs::remove_file(place.path("copy")).unwrap();
    }
}

/// A name that qemu-nbd would take for a protocol or an option.
#[test]
fn via_qemu_nbd_opens_any_name() {
    let Some(place) = place("via_qemu_nbd_opens_any_name", &["qemu-img", "qemu-nbd"]) else { return };
    let bytes = with_raw(&place, "qemu-img", "convert -f raw -O vdi raw disk");
    for name in ["nbd:x=y z", "-r", "it's"] {
        let path = format!("./{name}");
        fs::copy(place.path("disk"), place.path(name)).unwrap();
        ok(&place, ["convert", "--via", "qemu-nbd", &path, "copy"]);
        assert!(fs::read(place.path("copy")).unwrap() == bytes, "{name}");
        fs::remove_file(place.path("copy")).unwrap();
    }
    let refused = run(&place, ["convert", "--via", "qemu-nbd", "raw", "copy"]);
    assert_eq!(refused.code, 2, "{refused:?}");
    let refused = run(&place, ["convert", "--via", "qemu-nbd", "-f", "raw", "disk", "copy"]);
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(!place.path("copy").exists());
    // The command itself says what is wrong with a name.
    let missing = run(&place, ["info", "--via", "qemu-nbd", "missing.vmdk"]);
    assert!(missing.code == 1 && missing.err.contains("No such file"), "{missing:?}");
}

/// What is read as raw though it holds something else is noted, with the command that reads that.
#[test]
fn guesses_are_noted() {
    let Some(place) = place("guesses_are_noted", &["qemu-img", "qemu-nbd", "nbdkit", "xz", "gzip"]) else {
        return;
    };
    let bytes =
        with_raw(&place, "qemu-img", "convert -f raw -O vpc -o subformat=fixed,force_size=on raw f.vpc");
    with_raw(&place, "xz", "-k --block-size=1MiB raw");
    with_raw(&place, "gzip", "-k raw");
    for (name, server) in [
        ("f.vpc", "qemu-nbd -r -f vpc f.vpc"),
        ("raw.xz", "nbdkit --filter=xz file raw.xz"),
        ("raw.gz", "nbdkit --filter=gzip file raw.gz"),
    ] {
        let ran = ok(&place, ["convert", name, "same"]);
        assert!(ran.err.contains(&format!("note: {name}: it is read as raw")), "{ran:?}");
        assert!(ran.err.contains(&format!("[ {server} ] reads what is in it")), "{ran:?}");
        let file = fs::read(place.path(name)).unwrap();
        assert!(fs::read(place.path("same")).unwrap().starts_with(&file), "{name}");
        fs::remove_file(place.path("same")).unwrap();
        let ran = ok(&place, ["convert", "-f", "raw", name, "same"]);
        assert_eq!(ran.err, "", "{name}");
        fs::remove_file(place.path("same")).unwrap();
        let ran = ok(&place, split(&format!("convert [ {server} ] copy")));
        assert!(fs::read(place.path("copy")).unwrap() == bytes, "{name}: {ran:?}");
        fs::remove_file(place.path("copy")).unwrap();
    }
    let ran = ok(&place, split("compare --via qemu-nbd -f raw raw f.vpc"));
    assert!(ran.err.contains("note: f.vpc: qemu-nbd reads it, as vpc"), "{ran:?}");
    // Beside another image, the last sector of a disk is what its guest wrote there.
    let refused = run(&place, split("compare --via qemu-nbd raw f.vpc"));
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(refused.err.contains("--via: no image"), "{refused:?}");
}

/// nbdkit's own disks, a file in a tar archive, and a qcow2 image behind a server, which is one only if that
/// is said.
#[test]
fn nbdkit_serves_what_it_is_made_for() {
    let Some(place) = place("nbdkit_serves_what_it_is_made_for", &["nbdkit", "tar", "qemu-img"]) else {
        return;
    };
    let bytes = with_raw(&place, "tar", "cf disks.tar raw");
    ok(&place, split("convert [ nbdkit --filter=tar file disks.tar tar-entry=raw ] copy"));
    assert!(fs::read(place.path("copy")).unwrap() == bytes);
    ok(&place, split("convert [ nbdkit pattern 1M ] pattern"));
    let pattern = fs::read(place.path("pattern")).unwrap();
    let offset = |at: usize| u64::from_be_bytes(pattern[at..at + 8].try_into().unwrap());
    assert_eq!((pattern.len(), offset(0), offset(4096), offset(1_048_568)), (1 << 20, 0, 4096, 1_048_568));
    with_raw(&place, "qemu-img", "convert -f raw -O qcow2 raw disk.qcow2");
    ok(&place, split("convert -f qcow2 [ nbdkit file disk.qcow2 ] disk"));
    assert!(fs::read(place.path("disk")).unwrap() == bytes);
    let ran = ok(&place, split("convert [ nbdkit file disk.qcow2 ] same"));
    let note =
        "[ nbdkit file disk.qcow2 ]: it is copied as raw, and begins as a qcow2 image does; -f qcow2 reads";
    assert!(ran.err.contains(note), "{ran:?}");
    assert_eq!(fs::read(place.path("same")).unwrap(), fs::read(place.path("disk.qcow2")).unwrap());
    let hash = |words: &str| ok(&place, split(words)).out.split(' ').next().unwrap().to_owned();
    assert_eq!(hash("hash [ nbdkit file raw ]"), hash("hash -f raw raw"));
}

#[test]
fn nbdkit_reads_a_url() {
    let Some(place) = place("nbdkit_reads_a_url", &["nbdkit"]) else { return };
    let bytes = content(LEN);
    let port = http::serve(bytes.clone());
    let url = format!("http://127.0.0.1:{port}/disk.raw");
    ok(&place, ["convert", "[", "nbdkit", "curl", &url, "]", "copy"]);
    assert!(fs::read(place.path("copy")).unwrap() == bytes);
}

/// A source and a target at once; several connections to each.
#[test]
fn a_copy_leads_from_one_server_to_another() {
    let Some(place) = place("a_copy_leads_from_one_server_to_another", &["nbdkit", "qemu-img", "qemu-nbd"])
    else {
        return;
    };
    let bytes = with_raw(&place, "qemu-img", "convert -f raw -O vmdk raw disk.vmdk");
    File::create(place.path("target")).unwrap().set_len(LEN as u64).unwrap();
    ok(&place, split("mirror -n [ qemu-nbd -r -e 4 -f vmdk disk.vmdk ] [ nbdkit file target ]"));
    assert!(fs::read(place.path("target")).unwrap() == bytes);
    with_raw(&place, "qemu-img", "create -q -f vmdk new.vmdk 6M");
    ok(&place, split("convert -n --verify=full -f raw raw [ qemu-nbd -t -f vmdk new.vmdk ]"));
    ok(&place, split("compare -f raw raw --via qemu-nbd new.vmdk"));
    ok(&place, split("dd if=[ nbdkit file raw ] of=part bs=1M skip=1"));
    assert!(fs::read(place.path("part")).unwrap() == bytes[1 << 20..]);
}
