//! `offset` and `size`: a raw disk, or what a qcow2 image lies in, is a part of a file.

use std::fs;

use crate::common::{Place, have_qemu};

/// 1,000,000 bytes that tell where they belong.
fn file(place: &Place) -> Vec<u8> {
    let bytes: Vec<u8> = (0..250_000_u32).flat_map(|at| (at | 1 << 31).to_be_bytes()).collect();
    fs::write(place.path("f"), &bytes).unwrap();
    bytes
}

fn options(words: &str) -> String {
    format!("--image-opts driver=raw,{words},file.filename=@f")
}

#[test]
fn a_part_of_a_file_is_a_disk() {
    let place = Place::new();
    let bytes = file(&place);
    let theirs = have_qemu("a_part_of_a_file_is_a_disk");
    for (words, start, end) in [
        ("offset=512", 512, 1_000_000),
        ("offset=1", 1, 1_000_000),
        ("offset=1000,size=1024", 1000, 2024),
        ("offset=1k,size=64k", 1024, 66_560),
        ("size=4096", 0, 4096),
        ("size=0", 0, 0),
        ("offset=999936,size=512", 999_936, 1_000_000),
        ("offset=1000448", 1_000_000, 1_000_000),
        ("offset=999999", 999_999, 1_000_000),
    ] {
        place.ours_ok(&format!("convert -q {} @t", options(words)));
        let copy = fs::read(place.path("t")).unwrap();
        let held = end - start;
        assert!(copy[..held] == bytes[start..end] && copy[held..].iter().all(|byte| *byte == 0), "{words}");
        assert!(
            place.ours_ok(&format!("compare {} {}", options(words), "driver=raw,file.filename=@t"))
                == "Images are identical.\n",
            "{words}"
        );
        if theirs {
            place.img(&format!("convert {} @u", options(words)));
            assert_eq!(fs::read(place.path("u")).unwrap(), copy, "{words}");
            // QEMU's map aborts at other offsets, and prints a row of no bytes.
            let has_map = (start % 512 == 0 || words == "offset=1000,size=1024") && held > 0;
            for command in ["map --output=json", "map"].into_iter().filter(|_| has_map) {
                let line = format!("{command} {}", options(words));
                assert_eq!(place.ours_ok(&line), place.img(&line), "{line}");
            }
        }
    }
    for (words, message) in [
        ("offset=1000449", "the offset 1000449 lies past the end of the file, which has 1000448 bytes"),
        ("size=1000", "the size 1000 is not a multiple of 512"),
        ("offset=512,size=1000448", "1000448 bytes from the offset 512 on reach past the end of the file"),
        ("offset=18446744073709551615", "lies past the end"),
        ("offset=512,size=18446744073709551104", "reach past the end"),
    ] {
        let said = place.ours_fails(&format!("convert {} @t", options(words)), 1);
        assert!(said.contains(message), "{words}: {said}");
        assert!(!theirs || place.theirs("qemu-img", &format!("convert {} @t", options(words))).code == 1);
    }
    for words in ["offset=-1", "size=1.5", "offset=x", "size=16E"] {
        place.ours_fails(&format!("info {}", options(words)), 2);
    }
    assert_eq!(fs::read(place.path("f")).unwrap(), bytes);
}

#[test]
fn what_is_written_into_a_part_stays_in_it() {
    let place = Place::new();
    let mut bytes = file(&place);
    fs::write(place.path("s"), vec![9; 1536]).unwrap();
    let target = |words: &str| {
        format!("convert -q -n -f raw --target-image-opts @s driver=raw,{words},file.filename=@f")
    };
    for words in ["offset=3000,size=1536", "offset=5001,size=2048", "offset=700000"] {
        place.ours_ok(&target(words));
        let offset: usize = words[7..].split(',').next().unwrap().parse().unwrap();
        bytes[offset..offset + 1536].fill(9);
        assert!(fs::read(place.path("f")).unwrap() == bytes, "{words}");
    }
    place.ours_fails(&target("offset=3000,size=1024"), 1);
    // One file cannot be both.
    let both = "convert -n --image-opts --target-image-opts driver=raw,size=512,file.filename=@f driver=raw,offset=512,size=512,file.filename=@f";
    assert!(place.ours_fails(both, 1).contains("it is part of the source"));
    assert!(fs::read(place.path("f")).unwrap() == bytes);
    let resize = |words: &str, size: &str| format!("resize -q --shrink {} {size}", options(words));
    for size in ["512", "4k"] {
        assert!(place.ours_fails(&resize("offset=1k,size=1k", size), 1).contains("its length is fixed"));
    }
    place.ours_ok(&resize("offset=1k", "2M"));
    assert_eq!(fs::metadata(place.path("f")).unwrap().len(), (2 << 20) + 1024);
    place.ours_ok(&resize("offset=1k", "4k"));
    assert!(fs::read(place.path("f")).unwrap() == bytes[..5120]);
}

#[test]
fn a_qcow2_image_may_lie_in_a_part() {
    let place = Place::new();
    let bytes = file(&place);
    fs::write(place.path("data"), &bytes[..300_032]).unwrap();
    place.ours_ok("convert -q -f raw -O qcow2 @data @i.qcow2");
    let mut whole = vec![5; 1000];
    whole.extend(fs::read(place.path("i.qcow2")).unwrap());
    let end = whole.len();
    whole.extend([6; 512]);
    whole.resize(whole.len() + 2_000_000, 0);
    fs::write(place.path("f"), &whole).unwrap();
    let name = "driver=qcow2,file.driver=raw,file.offset=1000,file.file.driver=file,file.file.filename=@f";
    assert_eq!(
        place.ours_ok(&format!("compare --image-opts driver=raw,file.filename=@data {name}")),
        "Images are identical.\n"
    );
    if have_qemu("a_qcow2_image_may_lie_in_a_part") {
        let line = format!("info --output=json --image-opts {name}");
        let virtual_size =
            |text: &str| text.lines().rfind(|line| line.contains("virtual-size")).map(str::to_owned);
        assert_eq!(virtual_size(&place.ours_ok(&line)), virtual_size(&place.img(&line)));
    }
    // The map tells where the data lies in the file itself.
    assert!(place.ours_ok(&format!("map --output=json --image-opts {name}")).contains("\"offset\": 328680"));
    // What is written grows the file behind, and never shows before it.
    fs::write(place.path("new"), vec![7; 300_032]).unwrap();
    place.ours_ok(&format!("convert -q -n -f raw --target-image-opts @new {name}"));
    let after = fs::read(place.path("f")).unwrap();
    assert!(after[..1000] == [5; 1000] && after[end..end + 512] == [6; 512]);
    assert_eq!(
        place.ours_ok(&format!("compare --image-opts driver=raw,file.filename=@new {name}")),
        "Images are identical.\n"
    );
    // A part that ends inside the image is an image that was cut short.
    let cut = name.replace("file.offset=1000", "file.offset=1000,file.size=65536");
    assert_ne!(place.ours(&format!("convert --image-opts {cut} @t")).code, 0);
}
