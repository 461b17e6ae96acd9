//! Copies that are not waited for: what they hold is the same, and the result says that it is not durable.

use std::fs;

use serde_json::Value;

use crate::common::Place;
use crate::copy::source;

#[test]
fn a_copy_that_is_not_flushed_says_so() {
    let place = Place::new();
    source(&place);
    for options in ["-O raw", "-O qcow2", "-O qcow2 --in-place", "-n -O qcow2"] {
        let line = format!("convert {options} @source @t");
        let done: Value =
            serde_json::from_str(&place.ours_ok(&format!("{line} --no-sync --output=json"))).unwrap();
        assert_eq!(done["durable"], false, "{options}");
        assert_eq!(place.ours_ok("compare @source @t"), "Images are identical.\n");
        let said = place.ours_ok(&format!("{line} --no-sync"));
        assert!(said.trim_end().ends_with(" s, not durable"), "{options}: {said}");
        let done: Value = serde_json::from_str(&place.ours_ok(&format!("{line} --output=json"))).unwrap();
        assert_eq!(done["durable"], true, "{options}");
        let said = place.ours_ok(&line);
        assert!(!said.contains("durable"), "{options}: {said}");
    }
    assert_eq!(place.names(), ["source", "t"]);
    for other in [
        "--require-flush",
        "--checkpoint=@c",
        "--checkpoint-interval=1M",
        "--restart",
        "--atomic",
        "-t writethrough",
        "-t directsync",
    ] {
        let said = place.ours_error(&format!("convert --no-sync {other} @source @u"), 2);
        assert!(said.contains("--no-sync"), "{other}: {said}");
    }
    assert!(fs::metadata(place.path("u")).is_err());
}
