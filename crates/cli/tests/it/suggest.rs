//! What a mistyped command, option, value, format or key may have been meant to be.

use crate::common::Place;

#[test]
fn a_word_that_is_nearly_right_is_asked_about() {
    let place = Place::new();
    for (line, meant) in [
        ("covert @a @b", "convert"),
        ("convert --sped 5 @a @b", "--speed"),
        ("info --output=jsno @a", "json"),
        ("convert -O qcow @a @b", "qcow2"),
        ("create -f qcow2 -F ra -b @a @b", "raw"),
        ("create -f qcow2 -o clustersize=4k @a 1M", "cluster_size"),
        ("create -f raw -o prealloc=full @a 1M", "preallocation"),
        ("amend -f qcow2 -o refcount=8 @a", "refcount_bits"),
    ] {
        let said = place.ours_fails(line, 2);
        let said = said.strip_suffix(" (see --help)").unwrap_or(&said);
        assert!(said.ends_with(&format!("; did you mean {meant}?")), "{line}: {said}");
    }
    for line in ["frobnicate", "convert --xyzzy @a @b", "convert -O vmdk @a @b", "create -o x=1 @a 1M"] {
        assert!(!place.ours_fails(line, 2).contains("did you mean"), "{line}");
    }
    // What other programs match under the other name is as it was.
    assert_eq!(place.ours("qemu-img convert -O qcow @a @b").err, "qemu-img: Unknown file format 'qcow'\n");
}

#[test]
fn the_help_of_commands_and_topics_is_asked_for_by_name() {
    let place = Place::new();
    assert_eq!(place.ours("help convert").out, place.ours("convert --help").out);
    assert_eq!(place.ours("help ctl mirror").out, place.ours("ctl x mirror --help").out);
    let overview = place.ours("help").out;
    let topics = overview.split_once("Topics").expect("topics are listed").1;
    let topics: Vec<_> = topics.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    assert!(topics.len() > 3, "{overview}");
    for topic in topics {
        let said = place.ours(&format!("help {topic}"));
        assert_eq!((said.code, said.err.as_str()), (0, ""), "{topic}");
        assert!(said.out.lines().count() > 3, "{topic}: {}", said.out);
    }
    assert!(place.ours_fails("help exitcodes", 2).contains("did you mean exit-codes?"));
    assert!(place.ours_fails("help ctl miror", 2).contains("\"ctl miror\"; did you mean mirror?"));
    assert_eq!(place.ours("qemu-img help").code, 1);
    let said = place.ours_fails("--log-format=text", 2);
    assert!(said.ends_with("no command is given (`blockmirror help` lists them)"), "{said}");
    let said = place.ours_fails("ctl", 2);
    assert!(said.contains("usage: blockmirror ctl [OPTIONS] <SOCKET> <COMMAND>"), "{said}");
}

#[test]
fn a_raw_target_whose_name_says_qcow2_is_pointed_out() {
    let place = Place::new();
    place.ours("create -q -f raw @a.raw 1M");
    let said = place.ours("convert @a.raw @b.qcow2").err;
    let note = "it becomes a raw image, whatever its name says; -O qcow2 makes a qcow2 image";
    assert!(said.contains(note), "{said}");
    assert!(place.ours("mirror @a.raw @c.vmdk").err.contains("whatever its name says"));
    for line in [
        "convert -O raw @a.raw @d.qcow2",
        "convert -O qcow2 @a.raw @e.qcow2",
        "mirror @e.qcow2 @f.qcow2",
        "convert @a.raw @g.img",
        "qemu-img convert @a.raw @h.qcow2",
    ] {
        assert!(!place.ours(line).err.contains("whatever its name"), "{line}");
    }
}
