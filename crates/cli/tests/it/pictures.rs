//! Pictures by the command: maps, plans, and pages about copies, with hostile names and at a bad end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::Stdio;

use crate::common::Place;
use crate::process::{output, shell, signal, wait_until};

/// Each element is closed in its order, and there is no script and nothing that is fetched.
fn assert_well_formed(text: &str) {
    let mut open = Vec::new();
    let plain = text.replace("http://www.w3.org/2000/svg", "");
    for tag in plain.split('<').skip(1) {
        let tag = tag.split('>').next().unwrap();
        let name: &str = tag.split([' ', '\n', '/']).next().unwrap();
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name), "{tag}"),
            None if tag.ends_with('/') || matches!(name, "!DOCTYPE" | "meta") => {}
            None => open.push(name),
        }
    }
    assert!(open.is_empty(), "{open:?}");
    for foreign in ["<script", "href=", "src=", "url(", "@import", "://"] {
        assert!(!plain.contains(foreign), "{foreign}");
    }
}

fn place_with_disk() -> Place {
    let place = Place::new();
    let mut disk = vec![0; 1 << 20];
    disk[..5000].fill(7);
    disk[600_000..700_000].fill(8);
    fs::write(place.path("disk.raw"), disk).unwrap();
    place.ours_ok("convert -q -f raw -O qcow2 -o cluster_size=4K @disk.raw @disk.qcow2");
    place
}

#[test]
fn a_map_is_drawn_as_it_is_listed() {
    let place = place_with_disk();
    place.ours_ok("create -q -f qcow2 -b disk.qcow2 -F qcow2 @top.qcow2");
    place.ours_ok("convert -q -c -f raw -O qcow2 @disk.raw @small.qcow2");
    for (image, holds) in [
        ("disk.qcow2", "108 KiB of 1 MiB hold data, in 2 pieces"),
        ("top.qcow2", "108 KiB of 1 MiB hold data, in 2 pieces"),
        ("small.qcow2", "192 KiB of 1 MiB hold data, all of it compressed"),
    ] {
        for format in ["svg", "html"] {
            let line = format!("map --output={format} @{image}");
            let picture = place.ours_ok(&line);
            assert!(picture.contains(holds), "{line}: {picture}");
            assert_well_formed(&picture);
            assert_eq!(picture, place.ours_ok(&line), "the same each time");
        }
    }
    let part = place.ours_ok("map --output=svg -s 64K -l 64K @disk.qcow2");
    assert!(part.contains("The disk of 64 KiB holds no data"), "{part}");
    // In eight tebibytes nothing gets longer.
    place.ours_ok("create -q -f qcow2 @big.qcow2 8T");
    let big = place.ours_ok("map --output=svg @big.qcow2");
    assert!(
        big.len() < 100_000 && big.contains("Each cell is 4 GiB of the disk, a full row 256 GiB"),
        "{big}"
    );
}

#[test]
fn hostile_names_stay_text() {
    let place = place_with_disk();
    for (name, shown) in [
        (&b"<script>alert(1)<.raw"[..], "&lt;script&gt;alert(1)&lt;.raw"),
        (b"a&b\"c'd.raw", "a&amp;b&quot;c&#39;d.raw"),
        (b"two\nlines\x1b[2J.raw", "two\\nlines\\u{1b}[2J.raw"),
        (b"not\xffutf8.raw", "not\u{fffd}utf8.raw"),
    ] {
        let path = place.path(".").join(std::ffi::OsStr::from_bytes(name));
        fs::copy(place.path("disk.raw"), &path).unwrap();
        for words in
            [&["map", "-f", "raw"][..], &["plan", "-f", "raw"], &["mirror", "--dry-run", "-f", "raw"]]
        {
            for format in ["svg", "html"] {
                let mut line: Vec<OsString> = vec!["blockmirror".into()];
                line.extend(words.iter().map(|word| OsString::from(*word)));
                line.push(format!("--output={format}").into());
                line.push(path.clone().into());
                if words[0] != "map" {
                    line.push(OsString::from_vec([path.as_os_str().as_bytes(), b".new"].concat()));
                }
                let (mut out, mut err) = (Vec::new(), Vec::new());
                assert_eq!(blockmirror_cli::run(line, &mut out, &mut err), 0, "{words:?}: {err:?}");
                let text = String::from_utf8(out).unwrap();
                // A long path is cut at its beginning.
                assert!(text.contains(&shown[shown.len() - 12..]), "{words:?} {shown}: {text}");
                assert_well_formed(&text);
            }
        }
    }
}

#[test]
fn a_plan_says_what_each_granularity_costs() {
    let place = place_with_disk();
    let plan = place.ours_ok("plan -f raw -O qcow2 -o cluster_size=16K --speed 1M @disk.raw @new.qcow2");
    let plan = plan.replace(&format!("{}/", place.path("").to_str().unwrap().trim_end_matches('/')), "@");
    let lines: Vec<_> = plan.lines().filter(|line| !line.starts_with("space: ")).collect();
    let head = [
        "plan: @disk.raw -> @new.qcow2: 1 MiB",
        "granularity: 16 KiB (the target's cluster size)",
        "copy: 1 MiB in 1 run",
        "zero: 0 bytes",
        "skip: 0 bytes",
        "allocated in clusters: 1 MiB",
        "time: 1.0 s at 1 MiB/s",
    ];
    assert_eq!(lines[..head.len()], head);
    let chosen: Vec<_> = lines.iter().filter(|line| line.starts_with('>')).collect();
    assert_eq!(chosen, [&">      16 KiB    1.57 KiB       4 KiB                     16 KiB       1 MiB"]);
    assert!(!place.path("new.qcow2").exists());
    let json =
        |line: &str| place.ours_ok(&format!("{line} --output=json -f raw -O qcow2 @disk.raw @new.qcow2"));
    assert_eq!(json("plan"), json("mirror --dry-run"));
    let svg = place.ours_ok("convert --dry-run --output=svg -f qcow2 -O raw @disk.qcow2 @new.raw");
    assert!(svg.contains("108 KiB of 1 MiB to copy, at a granularity of 64 KiB"), "{svg}");
    assert_well_formed(&svg);
    let line = place.ours_fails("mirror --output=svg @disk.qcow2 @new.qcow2", 2);
    assert!(line.contains("--report FILE.html"), "{line}");
    assert_eq!(place.names(), ["disk.qcow2", "disk.raw"]);
}

#[test]
fn a_page_about_a_copy_says_how_it_ended() {
    let place = place_with_disk();
    place.ours_ok("convert -q --verify=hash --report @good.html @disk.qcow2 @copy.raw");
    let page = fs::read_to_string(place.path("good.html")).unwrap();
    assert!(page.contains("<h1 class=\"good\">Copy completed in "), "{page}");
    assert!(page.contains("<td>copied; the copy is verified</td>"), "{page}");
    assert!(page.contains("<td>copied</td><td>108 KiB</td>"), "{page}");
    assert_well_formed(&page);
    // One that exists is not replaced, and nothing is copied.
    let line = place.ours_fails("convert -q --report @good.html @disk.qcow2 @other.raw", 1);
    assert_eq!(line, "blockmirror: create: @good.html: it exists");
    assert!(!place.path("other.raw").exists());
    fs::write(place.path("rules"), "[inject-error]\nevent = \"none\"\niotype = \"read\"\nsector = \"8\"\n")
        .unwrap();
    let line = "convert -f raw --report @bad.html blkdebug:@rules:@disk.raw @lost.raw";
    place.ours_error(line, 1);
    let page = fs::read_to_string(place.path("bad.html")).unwrap();
    assert!(page.contains("<h1 class=\"bad\">Copy failed after "), "{page}");
    assert!(page.contains("Input/output error"), "{page}");
    assert_well_formed(&page);
    let line = "convert --salvage -f raw --report @part.html blkdebug:@rules:@disk.raw @part.raw";
    assert_eq!(place.ours(line).code, 3);
    let page = fs::read_to_string(place.path("part.html")).unwrap();
    assert!(page.contains("<h1 class=\"bad\">Copy ended after "), "{page}");
}

#[test]
fn an_interrupted_copy_has_a_page_too() {
    let place = place_with_disk();
    let line = "convert -f raw --granularity 64K --buf-size 64K --speed 1 --report page.html disk.raw target";
    let mut child = shell(&place, ":", line);
    let child = child.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    // Both files have begun, with other names.
    wait_until("the copy does not begin", || place.names().len() > 3);
    signal(&child, "TERM");
    assert_eq!(output(child).0, Some(143));
    let page = fs::read_to_string(place.path("page.html")).unwrap();
    assert!(page.contains("<h1 class=\"bad\">Copy interrupted after "), "{page}");
    assert_eq!(place.names(), ["disk.qcow2", "disk.raw", "page.html"]);
}
