//! What `--output=json` prints, as types: each command's output is read into one that knows all members and
//! no other, and the schemas of the types are those in docs/schemas/.
//!
//! A member that is added or renamed fails here; `BLOCKMIRROR_UPDATE_SCHEMAS=1` writes the schemas anew.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(dead_code, reason = "members are read, not used")]

use std::fs;
use std::path::Path;

use schemars::{JsonSchema, schema_for};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::common::Place;
use crate::progress::Line;

/// What a copy has done: `mirror` and `convert`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Copied {
    /// The source, if it is one; otherwise there is `sources`.
    source: Option<String>,
    sources: Option<Vec<String>>,
    target: String,
    target_format: String,
    /// Length of the disk in bytes, as all figures.
    len: u64,
    copied: u64,
    zeroed: u64,
    skipped: u64,
    given_up: Vec<GivenUp>,
    /// Whether the target was flushed, by one that can.
    durable: bool,
    /// Seconds.
    elapsed: f64,
    granularity: u64,
    granularity_reason: Reason,
    /// With `--verify`.
    verified: Option<Verified>,
    /// Bytes that an interrupted run had copied, if one had.
    resumed: Option<u64>,
    /// Bytes that the target shares with the files of the source, and the calls that it took.
    shared: u64,
    clone_calls: u64,
}

/// A range that could not be copied.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct GivenUp {
    start: u64,
    length: u64,
    message: String,
}

/// Why a granularity was chosen.
#[derive(Deserialize, JsonSchema)]
struct Reason {
    kind: String,
}

/// What a verification has found to be equal.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Verified {
    mode: String,
    bytes: u64,
    /// With the mode `hash`.
    hash: Option<String>,
}

/// What a copy would do: `plan`, `mirror --dry-run` and `convert --dry-run`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Planned {
    source: Option<String>,
    sources: Option<Vec<String>>,
    target: String,
    sync: String,
    granularity: u64,
    granularity_reason: Reason,
    len: u64,
    copy: u64,
    zero: u64,
    skip: u64,
    copy_runs: u64,
    /// Bytes of the target's clusters, or blocks of 4 KiB, that the data touches.
    allocation: u64,
    /// If it is known.
    space: Option<PlannedSpace>,
    /// With `--speed`.
    time: Option<PlannedTime>,
    /// The guest's write that `write` and `whole-write` are about.
    small_write: u64,
    /// From the finest to the coarsest.
    granularities: Vec<Granularity>,
}

/// The space that a new target takes at most, and what there is.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PlannedSpace {
    needed: u64,
    free: u64,
    /// Why it may fit all the same, if it seems not to.
    guess: Option<String>,
}

/// How long the copy takes.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PlannedTime {
    /// Bytes per second.
    speed: u64,
    seconds: f64,
}

/// What a granularity costs.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Granularity {
    granularity: u64,
    /// Bytes for each bit of the job's own bitmap.
    unit: u64,
    /// Of all bitmaps of the job, at most.
    memory: u64,
    /// Bytes that are copied after a small write of the guest.
    write: u64,
    /// The same where whole granules are copied.
    whole_write: u64,
    /// Bytes that are allocated in the target where whole granules are copied.
    whole_allocation: u64,
    chosen: bool,
}

/// `compare`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Compared {
    identical: bool,
    images: Vec<Compares>,
    /// `content`, `virtual-size` or `status`.
    difference: Option<String>,
    offset: Option<u64>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Compares {
    filename: String,
    format: String,
    virtual_size: u64,
}

/// `hash`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Hashed {
    filename: String,
    format: String,
    virtual_size: u64,
    hash: String,
}

/// `measure`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Measured {
    required: u64,
    fully_allocated: u64,
    bitmaps: Option<u64>,
}

/// `check`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Checked {
    filename: String,
    format: String,
    check_errors: u64,
    image_end_offset: Option<u64>,
    total_clusters: Option<u64>,
    allocated_clusters: Option<u64>,
    compressed_clusters: Option<u64>,
    fragmented_clusters: Option<u64>,
    corruptions: Option<u64>,
    corruptions_fixed: Option<u64>,
    leaks: Option<u64>,
    leaks_fixed: Option<u64>,
}

/// A row of `map`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Mapped {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
    filename: Option<String>,
}

/// `info`; with `--backing-chain` an array of it, from the top down.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Info {
    children: Vec<Child>,
    virtual_size: u64,
    filename: String,
    format: String,
    actual_size: Option<u64>,
    cluster_size: Option<u64>,
    dirty_flag: Option<bool>,
    backing_filename: Option<String>,
    full_backing_filename: Option<String>,
    backing_filename_format: Option<String>,
    snapshots: Option<Vec<Snapshot>>,
    format_specific: Option<FormatSpecific>,
    x_blockmirror_cut_short: Option<CutShort>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Child {
    name: String,
    info: Box<Info>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Snapshot {
    id: String,
    name: String,
    vm_state_size: u64,
    date_sec: u64,
    date_nsec: u64,
    vm_clock_sec: u64,
    vm_clock_nsec: u64,
    icount: Option<u64>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct FormatSpecific {
    r#type: String,
    data: Specifics,
}

/// Of a qcow2 image; a file has none of them.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Specifics {
    compat: Option<String>,
    compression_type: Option<String>,
    lazy_refcounts: Option<bool>,
    refcount_bits: Option<u32>,
    corrupt: Option<bool>,
    extended_l2: Option<bool>,
    data_file: Option<String>,
    data_file_raw: Option<bool>,
    bitmaps: Option<Vec<Bitmap>>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Bitmap {
    name: String,
    granularity: u64,
    flags: Vec<String>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct CutShort {
    file_length: u64,
    first_missing: u64,
    missing: u64,
    complete: Option<bool>,
}

/// `inspect`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Inspected {
    filename: String,
    /// The format that was given, else the one that was detected.
    format: String,
    file_length: u64,
    /// What the disk begins with: `gpt`, `mbr`, `iso`, `luks`.
    contents: Vec<String>,
    snapshots: u64,
    bitmaps: u64,
    findings: Vec<Found>,
    /// `accepted` or `refused`.
    verdict: String,
    /// Bytes of the disk, if known.
    virtual_size: Option<u64>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Found {
    /// One of the names that `inspect --help` lists.
    kind: String,
    message: String,
    /// Whether `--allow` names it.
    allowed: bool,
}

/// A failure under `--output=json`: one line of the standard error.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Failed {
    /// `usage`, `mismatch`, `interrupted`, `failed`, or what kind of error a file or a disk had. Of a line
    /// that is no failure: `note` or `warning`, without an exit code.
    pub(crate) class: String,
    pub(crate) message: String,
    pub(crate) exit_code: Option<u8>,
    operation: Option<String>,
    path: Option<String>,
    offset: Option<u64>,
    errno: Option<i32>,
}

#[test]
fn the_schemas_are_those_of_the_documentation() {
    let schemas = [
        ("copied", schema_for!(Copied)),
        ("planned", schema_for!(Planned)),
        ("compared", schema_for!(Compared)),
        ("hashed", schema_for!(Vec<Hashed>)),
        ("measured", schema_for!(Measured)),
        ("checked", schema_for!(Checked)),
        ("mapped", schema_for!(Vec<Mapped>)),
        ("info", schema_for!(Info)),
        ("inspected", schema_for!(Inspected)),
        ("failed", schema_for!(Failed)),
        ("progress", schema_for!(Line)),
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/schemas");
    for (name, schema) in schemas {
        let path = folder.join(format!("{name}.json"));
        let text = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        if std::env::var_os("BLOCKMIRROR_UPDATE_SCHEMAS").is_some() {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&path, &text).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap_or_default(), text, "{}", path.display());
    }
}

fn read<T: DeserializeOwned>(place: &Place, line: &str) -> T {
    let said = place.ours(line);
    serde_json::from_str(&said.out).unwrap_or_else(|error| panic!("{line}: {error}: {said:?}"))
}

#[test]
fn each_output_has_the_members_of_its_schema_and_no_other() {
    let place = Place::new();
    fs::write(place.path("raw"), vec![7; 200_000]).unwrap();
    fs::write(place.path("raw2"), vec![8; 200_192]).unwrap();
    let copied: Copied = read(&place, "convert --output=json -f raw -O qcow2 @raw @base");
    assert!(copied.source.is_some() && copied.verified.is_none());
    let copied: Copied = read(&place, "mirror --output=json -f raw --verify=hash @raw @raw2 @two");
    assert!(copied.sources.is_some() && copied.verified.is_some_and(|verified| verified.hash.is_some()));
    let planned: Planned = read(&place, "plan --speed 1M --output=json -f raw @raw @new");
    assert!(planned.time.is_some() && planned.granularities.len() == 18);
    let _: Planned = read(&place, "convert --dry-run --output=json -f raw @raw @new");
    place.ours_ok("create -q -f qcow2 -b base -F qcow2 @top");
    place.ours_ok("bitmap --add @top b");
    place.ours_ok("snapshot -q -c s @top");
    let compared: Compared = read(&place, "compare --output=json @base @top");
    assert!(compared.identical);
    let compared: Compared = read(&place, "compare --output=json -f raw @raw2 @top");
    assert!(compared.difference.is_some() && compared.offset.is_some());
    let hashed: Vec<Hashed> = read(&place, "hash --output=json @raw @top");
    assert_eq!(hashed.len(), 2);
    let _: Measured = read(&place, "measure --output=json -O qcow2 @base");
    let measured: Measured = read(&place, "measure --output=json -O qcow2 @top");
    assert!(measured.bitmaps.is_some());
    let _: Checked = read(&place, "check --output=json @top");
    let mapped: Vec<Mapped> = read(&place, "map --output=json @top");
    assert!(!mapped.is_empty());
    let info: Info = read(&place, "info --output=json @raw");
    assert!(info.format_specific.is_none());
    let chain: Vec<Info> = read(&place, "info --output=json --backing-chain @top");
    assert!(chain[0].snapshots.is_some() && chain[0].backing_filename.is_some());
    let inspected: Inspected = read(&place, "inspect --output=json @top");
    assert_eq!((inspected.findings.len(), inspected.virtual_size), (1, Some(200_192)));
    place.ours_ok("create -q -f qcow2 -o data_file=data,data_file_raw=on @external 1M");
    let info: Info = read(&place, "info --output=json @external");
    assert!(info.format_specific.is_some_and(|specific| specific.data.data_file.is_some()));
}

#[test]
fn under_json_an_error_is_an_object_on_a_line() {
    let place = Place::new();
    fs::write(place.path("raw"), vec![7; 65_536]).unwrap();
    fs::write(place.path("rules"), "[inject-error]\nevent = \"read_aio\"\nsector = \"8\"\n").unwrap();
    let fails = |line: &str, code: i32| -> Failed {
        let ran = place.ours(line);
        assert_eq!((ran.code, ran.err.lines().count()), (code, 1), "{line}: {ran:?}");
        let failed: Failed = serde_json::from_str(&ran.err).unwrap();
        assert_eq!(failed.exit_code.map(i32::from), Some(code), "{line}: {ran:?}");
        failed
    };
    for line in
        ["info --output=json @missing", "convert --output json @missing @t", "hash --output=json @missing"]
    {
        let failed = fails(line, 1);
        assert_eq!((&*failed.class, failed.errno), ("not-found", Some(2)), "{line}");
        assert!(failed.path.is_some_and(|path| path.ends_with("/missing")), "{line}");
        assert_eq!(failed.operation.as_deref(), Some("open"), "{line}");
    }
    let failed = fails("convert --output=json -f raw blkdebug:@rules:@raw @t", 1);
    assert_eq!((&*failed.class, failed.errno), ("io", Some(5)));
    assert!(failed.message.starts_with("copy: "), "{}", failed.message);
    assert_eq!(fails("convert --output=json --nonsense", 2).class, "usage");
    assert_eq!(fails("compare --output=json @raw @missing", 2).class, "not-found");
    // What does not end the command has a class of its own.
    let ran = place.ours("convert --output=json --salvage -f raw blkdebug:@rules:@raw @t");
    assert_eq!(ran.code, 3, "{ran:?}");
    let remark: Value = serde_json::from_str(ran.err.lines().next().unwrap()).unwrap();
    assert_eq!(remark["class"], "warning");
    // Without it, and under the name of another program, a line is for people.
    assert!(place.ours("info @missing").err.starts_with("blockmirror: "));
    assert!(place.ours("qemu-img info --output=json @missing").err.starts_with("qemu-img: "));
}
