//! The table against `CreateOptions` and `Header`.

use blockmirror_block::testing::MemoryStorage;

use super::*;
use crate::create_options::Version;

#[test]
fn defaults_are_those_of_create_options() {
    let options = CreateOptions::new(1 << 20);
    for def in OPTIONS.iter().filter(|def| def.name != "size") {
        let default = def.default.map(|text| def.kind.parse(text).unwrap());
        assert_eq!(def.get(&options), default, "{}", def.name);
    }
}

#[test]
fn every_value_is_set_as_it_was_parsed() {
    let mut options = CreateOptions::new(1 << 20);
    for def in OPTIONS {
        assert!(std::ptr::eq(option(def.name).unwrap(), def) && option(def.qmp_name).is_some());
        let texts = match def.kind.values().as_str() {
            "SIZE" => vec!["32K".to_owned()],
            "NAME" | "FORMAT" => vec!["raw".to_owned()],
            values => values.split('|').map(str::to_owned).collect(),
        };
        for text in texts {
            let value = def.kind.parse(&text).unwrap();
            def.set(&mut options, value.clone()).unwrap();
            assert_eq!(def.get(&options), Some(value), "{}={text}", def.name);
        }
        let wrong =
            if def.kind == OptionKind::Flag { OptionValue::Number(1) } else { OptionValue::Flag(true) };
        assert!(def.set(&mut options, wrong).is_err(), "{}", def.name);
    }
}

#[test]
fn values_and_expectations_as_texts() {
    let of = |name: &str| option(name).map(|def| (def.kind.values(), def.kind.expected())).unwrap();
    assert_eq!(of("compat"), ("0.10|1.1|v2|v3".into(), "0.10, 1.1, v2 or v3".into()));
    assert_eq!(of("refcount_bits"), ("1|2|4|8|16|32|64".into(), "1, 2, 4, 8, 16, 32 or 64".into()));
    assert_eq!(of("lazy_refcounts"), ("on|off".into(), "on or off".into()));
    assert_eq!(of("preallocation").1, "off, metadata, falloc or full");
    let bits = option("refcount-bits").unwrap().kind;
    assert!(bits.parse("3").is_err() && bits.parse("128").is_err());
    let clusters = option("cluster-size").unwrap().kind;
    assert!(clusters.allows(512) && clusters.allows(2 << 20));
    assert!(!clusters.allows(256) && !clusters.allows(4 << 20) && !clusters.allows(3000));
}

#[test]
fn info_shows_what_an_image_was_created_with() {
    let mut options = CreateOptions::new(1 << 20);
    (options.lazy_refcounts, options.refcount_bits) = (true, 8);
    let header = |options: &CreateOptions| {
        let storage = MemoryStorage::new();
        options.create(&storage, None).unwrap();
        Header::read(&storage).unwrap()
    };
    let keys = |header: &Header| shown(header).map(|(key, _)| key).collect::<Vec<_>>().join(" ");
    let made = header(&options);
    assert_eq!(keys(&made), "compat compression-type lazy-refcounts refcount-bits corrupt extended-l2");
    assert!(shown(&made).any(|shown| shown == ("refcount-bits", OptionValue::Number(8))));
    assert!(shown(&made).any(|shown| shown == ("lazy-refcounts", OptionValue::Flag(true))));
    let old = CreateOptions { version: Version::V2, ..CreateOptions::new(1 << 20) };
    assert_eq!(keys(&header(&old)), "compat compression-type refcount-bits");
}
