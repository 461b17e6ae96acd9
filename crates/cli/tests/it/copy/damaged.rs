//! Images that are damaged: cut short, or with a cluster in use that counts as free.

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::Place;

const CLUSTER: u64 = 65536;
/// Guest bytes that the images of these tests hold, all of it data.
const LEN: u64 = 1 << 20;

/// `whole`, with no byte zero.
fn whole(place: &Place) -> Vec<u8> {
    let bytes: Vec<u8> = (0..LEN).map(|at| (at / 512 % 255) as u8 + 1).collect();
    fs::write(place.path("whole"), &bytes).unwrap();
    bytes
}

fn cut(place: &Place, name: &str, lost: u64) -> u64 {
    let file = File::options().write(true).open(place.path(name)).unwrap();
    let len = file.metadata().unwrap().len() - lost;
    file.set_len(len).unwrap();
    len
}

/// Copies `over` under `policy`: the bytes from `lost` on are given up, and said to be.
fn check_given_up(place: &Place, policy: &str, options: &str, lost: u64, bytes: &[u8]) {
    let ran = place.ours(&format!("convert -q {policy} --output json @over @kept"));
    assert_eq!(ran.code, 3, "{options}: {ran:?}");
    let out: Value = serde_json::from_str(&ran.out).unwrap();
    let ranges: Vec<_> = out["given-up"]
        .as_array()
        .unwrap()
        .iter()
        .map(|range| {
            let at = |key: &str| range[key].as_u64().unwrap();
            assert!(range["message"].as_str().unwrap().contains("cut short"), "{range}");
            (at("start"), at("start") + at("length"))
        })
        .collect();
    // Neighbours, from the first byte that is lost to the last.
    assert_eq!((ranges[0].0, ranges[ranges.len() - 1].1), (lost, LEN), "{options}: {ranges:?}");
    assert!(ranges.windows(2).all(|pair| pair[0].1 == pair[1].0), "{options}: {ranges:?}");
    for (start, end) in &ranges {
        let line = format!("bytes {start} to {end}: ");
        assert_eq!(ran.err.lines().filter(|said| said.contains(&line)).count(), 1, "{ran:?}");
    }
    let kept = fs::read(place.path("kept")).unwrap();
    // What a cluster that is there in part lacks is zeros.
    let there = (LEN - CLUSTER - CLUSTER / 2) as usize;
    assert!(kept[..there] == bytes[..there], "{options}");
    assert!(kept[there..].iter().all(|byte| *byte == 0), "{options}");
}

/// A broken download, a data file and a base that were cut off: each converted with exit code 0, and zeros.
#[test]
fn a_file_that_was_cut_short_is_not_copied_as_zeros() {
    let place = Place::new();
    let bytes = whole(&place);
    // Giving up takes ten tries and seconds, so not each of them does.
    for (options, file, giving_up) in [
        ("-o compat=1.1", "disk", Some("--on-source-error ignore")),
        ("-o compat=0.10", "disk", None),
        ("-o extended_l2=on", "disk", None),
        ("-o data_file=data", "data", Some("--salvage")),
        ("-o data_file=data,data_file_raw=on", "data", None),
    ] {
        place.ours_ok(&format!("convert -q -m 1 --force -f raw -O qcow2 {options} @whole @disk"));
        place.ours_ok("create -q -f qcow2 -b disk -F qcow2 @over");
        // The last cluster and a half, of which half may be a subcluster that is there.
        let end = cut(&place, file, CLUSTER + CLUSTER / 2);
        let lost = LEN - CLUSTER - if options.contains("extended") { CLUSTER / 2 } else { 0 };
        fs::write(place.path("t.raw"), &bytes).unwrap();
        for from in ["disk", "over"] {
            let want = format!("but the file ends at {end}: it was cut short and is whole up to there only");
            for line in ["convert", "convert -O qcow2", "mirror -O raw", "convert -S 0", "convert -m 1"] {
                let said = place.ours_fails(&format!("{line} -q @{from} @new"), 1);
                assert!(
                    said.contains(&format!("@{file}")) && said.contains(&want),
                    "{options}: {line}: {said}"
                );
                assert!(!place.path("new").exists(), "{options}: {line}");
            }
            let said = place.ours_fails(&format!("compare -F raw @{from} @whole"), 2);
            assert!(said.contains(&want), "{options}: {said}");
            let said = place.ours_fails(&format!("convert -q -n @{from} @t.raw"), 1);
            assert!(said.contains(&want) && said.contains("the target is incomplete"), "{options}: {said}");
        }
        // The same with what is lost given up.
        if let Some(policy) = giving_up {
            check_given_up(&place, policy, options, lost, &bytes);
        }
        // Writing would make zeros of what is missing.
        let before = (fs::read(place.path("disk")).unwrap(), fs::read(place.path(file)).unwrap());
        for line in ["convert -q -n -f raw -O qcow2 @whole @disk", "resize -q -f qcow2 @disk +1M"] {
            let said = place.ours_fails(line, 1);
            assert!(said.contains("cut short") && said.contains(&format!("@{file}")), "{options}: {said}");
        }
        let after = (fs::read(place.path("disk")).unwrap(), fs::read(place.path(file)).unwrap());
        assert!(after == before, "{options}: something was written");
        // It opens one file: what the data file lacks is not seen.
        let seen = file == "disk";
        let line = format!(
            "cut short: the file ends at {end}; {} KiB ({} bytes) of the disk are missing, the first at {lost}\n",
            (LEN - lost) / 1024,
            LEN - lost
        );
        assert_eq!(place.ours_ok("info @disk").contains(&line), seen, "{options}: {line}");
        let json: Value = serde_json::from_str(&place.ours_ok("info --output json @disk")).unwrap();
        let figures = serde_json::json!({"file-length": end, "first-missing": lost, "missing": LEN - lost});
        assert_eq!(json.get("x-blockmirror-cut-short"), seen.then_some(&figures), "{options}");
        // A last cluster that is short, and one that is zero by statement, lack nothing.
        place.ours_ok(&format!("convert -q -m 1 --force -f raw -O qcow2 {options} @whole @disk"));
        let unit = if options.contains("extended") { 2048 } else { CLUSTER };
        cut(&place, file, unit - 512);
        place.ours_ok("convert -q @over @kept");
        let kept = fs::read(place.path("kept")).unwrap();
        assert!(kept[..(LEN - unit + 512) as usize] == bytes[..(LEN - unit + 512) as usize], "{options}");
        assert!(!place.ours_ok("info @disk").contains("cut short"), "{options}");
    }
}

/// A source that lost its end after it was opened was copied with zeros in place of it.
#[test]
fn a_raw_source_that_shrinks_is_not_copied_as_zeros() {
    let deadline = Instant::now() + Duration::from_secs(120);
    let signal = |name: &str, id: u32| {
        assert!(Command::new("kill").args([name, &id.to_string()]).status().unwrap().success());
    };
    // The copy is stopped while the file is cut; one that was through by then says nothing.
    loop {
        let place = Place::new();
        fs::write(place.path("disk"), vec![7; 32 << 20]).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_blockmirror"))
            .current_dir(place.path(""))
            .args(["convert", "-q", "-f", "raw", "-r", "4M", "disk", "copy"])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while place.names().len() < 2 && child.try_wait().unwrap().is_none() {
            thread::yield_now();
        }
        signal("-STOP", child.id());
        let under_way = place.names().iter().any(|name| name.ends_with(".partial"));
        File::options().write(true).open(place.path("disk")).unwrap().set_len(512).unwrap();
        signal("-CONT", child.id());
        let output = child.wait_with_output().unwrap();
        if under_way {
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(1), "{said}");
            assert!(said.contains("disk") && said.contains("512"), "{said}");
            assert_eq!(place.names(), ["disk"]);
            return;
        }
        assert!(Instant::now() < deadline, "no copy was caught on its way");
    }
}

/// A cluster that the guest uses and that counts as free was handed out again: the copy read as something
/// else, with exit code 0.
#[test]
fn an_image_that_maps_free_clusters_is_not_written() {
    // What the image is made with, where the guest's data lies, and which of these loses its refcount.
    for (size, cluster, data, damaged) in
        [("256K", CLUSTER, vec![0], 0), ("8M", 4096, vec![0, 4 << 20], 4 << 20)]
    {
        let place = Place::new();
        let len = if size == "8M" { 8_usize << 20 } else { 256 << 10 };
        let mut old = vec![0; len];
        for at in &data {
            old[*at..*at + cluster as usize].fill(5);
        }
        fs::write(place.path("old"), &old).unwrap();
        place.ours_ok(&format!("convert -q -f raw -O qcow2 -o cluster_size={cluster} @old @t"));
        let host = host_offset(&place.ours_ok("map --output json @t"), damaged as u64);
        clear_refcount(&place, "t", cluster, host);
        let damage = fs::read(place.path("t")).unwrap();
        // Only what is not mapped yet, so that the copy asks for new clusters.
        let mut new = old.clone();
        new[2 * cluster as usize..3 * cluster as usize].fill(6);
        new[5 * 4096..8 * 4096].fill(6);
        fs::write(place.path("new"), &new).unwrap();
        let said = place.ours_fails("convert -q -f raw -O qcow2 -n @new @t", 1);
        assert!(said.contains("refcount") && said.contains("@t"), "{size}: {said}");
        let info: Value = serde_json::from_str(&place.ours_ok("info --output json @t")).unwrap();
        assert_eq!(info["format-specific"]["data"]["corrupt"], true, "{size}");
        // From then on it is refused at once, and reads as it did where nothing was written.
        let said = place.ours_fails("convert -q -f raw -O qcow2 -n @new @t", 1);
        assert!(said.contains("marked corrupt"), "{size}: {said}");
        place.ours_ok("convert -q @t @seen");
        let seen = fs::read(place.path("seen")).unwrap();
        for (at, (seen, (old, new))) in seen.iter().zip(old.iter().zip(&new)).enumerate() {
            assert!(seen == old || seen == new, "{size}: byte {at} is {seen}");
        }
        for at in &data {
            assert!(seen[*at..*at + cluster as usize].iter().all(|byte| *byte == 5), "{size}: {at}");
        }
        // The data clusters, as bytes of the file, are as they were.
        let after = fs::read(place.path("t")).unwrap();
        let host = host as usize;
        assert!(after[host..host + cluster as usize] == damage[host..host + cluster as usize]);
    }
}

/// Where the file holds guest byte `at`, by what `map` says.
fn host_offset(map: &str, at: u64) -> u64 {
    let rows: Value = serde_json::from_str(map).unwrap();
    let row = rows.as_array().unwrap().iter().find(|row| {
        let start = row["start"].as_u64().unwrap();
        (start..start + row["length"].as_u64().unwrap()).contains(&at)
    });
    let row = row.unwrap();
    row["offset"].as_u64().unwrap() + at - row["start"].as_u64().unwrap()
}

/// Makes the refcount of the cluster at `host` zero; the image has refcounts of 16 bits.
fn clear_refcount(place: &Place, name: &str, cluster: u64, host: u64) {
    let mut bytes = fs::read(place.path(name)).unwrap();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let table = word(&bytes, 48);
    let index = (host / cluster) as usize;
    let per_block = cluster as usize / 2;
    let block = word(&bytes, table + index / per_block * 8);
    let at = block + index % per_block * 2;
    assert_eq!(bytes[at..at + 2], [0, 1]);
    bytes[at..at + 2].fill(0);
    fs::write(place.path(name), bytes).unwrap();
}
