//! What the feature `serde` writes: field by field, so that a change of a name shows.

#![cfg(feature = "serde")]
#![allow(clippy::unwrap_used, reason = "in a test a failure is the point")]

use blockmirror_block::{ByteRange, Extent, ExtentKind, Geometry};
use serde_json::json;

#[test]
fn ranges_are_written_and_read_and_a_reversed_one_is_refused() {
    let range = ByteRange::new(512, 4096);
    let text = serde_json::to_string(&range).unwrap();
    assert_eq!(text, r#"{"start":512,"end":4096}"#);
    assert_eq!(serde_json::from_str::<ByteRange>(&text).unwrap(), range);
    assert!(serde_json::from_str::<ByteRange>(r#"{"start":9,"end":3}"#).is_err());
}

#[test]
fn extents_and_geometries_are_written() {
    let extent = Extent::new(ByteRange::new(0, 512), ExtentKind::Zero).at_depth(1);
    let expected = json!({
        "range": {"start": 0, "end": 512},
        "kind": "zero",
        "depth": 1,
        "compressed": false,
        "host": null,
        "mapped-hole": false,
        "partial": false,
    });
    assert_eq!(serde_json::to_value(&extent).unwrap(), expected);
    let expected = json!({
        "cluster-size": null,
        "subcluster-size": null,
        "request-alignment": 1,
        "zero-cost": "data",
        "discard": "ignored",
        "writable": true,
        "forgetful": false,
        "can-flush": true,
        "backing": "none",
    });
    assert_eq!(serde_json::to_value(Geometry::plain()).unwrap(), expected);
}
