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
