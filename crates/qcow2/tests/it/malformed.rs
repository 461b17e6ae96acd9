//! Malformed images: one for each refusal and each named cap of the format, and what becomes of it when it is
//! opened for reading, opened for writing, and checked.
//!
//! A row spoils a sound image in one place. Its answers are text in a snapshot: kind, type, operation, file
//! and offset of each error. `complete` holds the table against the sources and LIMITS.md: a cap, a type of
//! error or a refusal without a row fails.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod answers;
mod bitmaps;
mod complete;
mod data;
mod extensions;
mod header;
mod refcounts;
mod requests;
mod row;
mod snapshots;
mod tables;

use std::fmt::Write;

use self::answers::Answers;
use self::row::Row;

/// A group of the table, and its rows.
type Group = (&'static str, fn() -> Vec<Row>);

const GROUPS: [Group; 8] = [
    ("header", header::rows),
    ("extensions", extensions::rows),
    ("tables", tables::rows),
    ("data", data::rows),
    ("refcounts", refcounts::rows),
    ("snapshots", snapshots::rows),
    ("bitmaps", bitmaps::rows),
    ("requests", requests::rows),
];

fn table() -> impl Iterator<Item = Row> {
    GROUPS.iter().flat_map(|(_, rows)| rows())
}

#[test]
fn each_malformed_image_is_answered_by_a_typed_error() {
    for (group, rows) in GROUPS {
        let mut text = String::new();
        for row in rows() {
            write!(text, "{}\n{}\n", row.name, Answers::of(&row)).unwrap();
        }
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_path("malformed/snapshots");
        settings.set_prepend_module_to_snapshot(false);
        settings.bind(|| insta::assert_snapshot!(group, text));
    }
}

/// A name says which row it is.
#[test]
fn the_rows_have_names_of_their_own() {
    let mut names: Vec<_> = table().map(|row| row.name).collect();
    names.sort_unstable();
    let twice: Vec<_> = names.windows(2).filter(|pair| pair[0] == pair[1]).collect();
    assert!(twice.is_empty(), "{twice:?}");
}
