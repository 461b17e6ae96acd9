//! A stranger who embeds the libraries: only published APIs of `qcow2`, `bitmap`, `ratelimit` and `mirror`,
//! and the facade `blockmirror`, with what they return as text, so that a change to it is seen in review.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use blockmirror::Convert;
use blockmirror::image::Format;
use blockmirror_bitmap::{Cursor, DirtyBitmap};
use blockmirror_block::testing::{MemoryDisk, MemoryStorage};
use blockmirror_block::{BlockDevice, ByteRange, Visit, WriteFlags, ZeroFlags};
use blockmirror_mirror::{GranularityChoice, MirrorJob, MirrorOptions, PlanTarget, plan};
use blockmirror_qcow2::{CreateOptions, Header, OpenOptions};
use blockmirror_ratelimit::RateLimiter;
use insta::assert_snapshot;

/// The extents of a whole disk, a line each.
fn map(device: &dyn BlockDevice) -> String {
    let mut text = String::new();
    device
        .extents(ByteRange::new(0, device.len()), &mut |e| {
            let (range, kind, depth) = (e.range, e.kind, e.depth);
            writeln!(text, "{range} {kind:?} depth {depth}").unwrap();
            Visit::Continue(())
        })
        .unwrap();
    text
}

#[test]
fn a_bitmap_of_a_huge_disk() {
    let mut dirty = DirtyBitmap::new(8 << 40, 64 << 10).unwrap();
    dirty.set(0..1);
    dirty.set((3 << 40) + 5..(3 << 40) + 70_000);
    dirty.set((8 << 40) - 1..8 << 40);
    dirty.clear(0..65_536);
    let mut cursor = Cursor::new(0);
    let mut text = String::new();
    while let Some(run) = cursor.next_run(&dirty, 1 << 20) {
        writeln!(text, "{run:?}").unwrap();
        dirty.clear(run);
    }
    writeln!(text, "clean: {}, {} granules", dirty.is_clean(), dirty.granules()).unwrap();
    assert_snapshot!(text, @r"
      3298534883328..3298535014400
      8796092956672..8796093022208
      clean: true, 134217728 granules
    ");
    assert_snapshot!(DirtyBitmap::new(1 << 20, 3000).unwrap_err(), @"granularity 3000 is not a power of two");
}

#[test]
fn a_rate_limit_on_a_clock_of_our_own() {
    let mut limit = RateLimiter::new(10 << 20);
    let mut now = Duration::ZERO;
    let mut text = format!("quota {}\n", limit.quota());
    for bytes in [1 << 20, 1 << 20, 3 << 20, 4096] {
        let wait = limit.account(now, bytes);
        writeln!(text, "at {now:?}: {bytes} bytes, wait {wait:?}").unwrap();
        now += wait;
    }
    limit.set_speed(now, 0);
    writeln!(text, "unlimited: wait {:?}", limit.account(now, 1 << 40)).unwrap();
    assert_snapshot!(text, @r"
      quota 1048576
      at 0ns: 1048576 bytes, wait 100ms
      at 100ms: 1048576 bytes, wait 100ms
      at 200ms: 3145728 bytes, wait 300ms
      at 500ms: 4096 bytes, wait 0ns
      unlimited: wait 0ns
    ");
}

#[test]
fn a_qcow2_image_in_memory() {
    let storage = Arc::new(MemoryStorage::new().named("disk.qcow2"));
    let mut options = CreateOptions::new(1 << 20);
    options.cluster_size = 4096;
    options.create(&*storage, None).unwrap();
    let header = Header::read(&*storage).unwrap();
    assert_snapshot!(format!("{header:#?}"), @r#"
      Header {
          version: 3,
          cluster_bits: 12,
          virtual_size: 1048576,
          l1_offset: 12288,
          l1_entries: 1,
          refcount_table_offset: 4096,
          refcount_table_clusters: 1,
          refcount_order: 4,
          incompatible: 0,
          compatible: 0,
          autoclear: 0,
          extended_l2: false,
          compression: Deflate,
          backing: None,
          data_file: None,
          snapshot_count: 0,
          snapshots_offset: 0,
          bitmaps: None,
          feature_names: [
              0:0 "dirty bit",
              0:1 "corrupt bit",
              0:2 "external data file",
              0:3 "compression type",
              0:4 "extended L2 entries",
              1:0 "lazy refcounts",
              2:0 "bitmaps",
              2:1 "raw external data",
          ],
          header_length: 112,
          unknown_fields: [],
          unknown_extensions: [],
      }
    "#);
    let disk = OpenOptions::new().writable(true).open(Arc::clone(&storage) as _).unwrap();
    disk.write_at(&[1; 5000], 10_000, WriteFlags::NONE).unwrap();
    disk.write_zeroes(ByteRange::new(40_960, 49_152), ZeroFlags::MAY_UNMAP).unwrap();
    disk.flush().unwrap();
    assert_snapshot!(map(&disk), @r"
      0..8192 Unallocated depth 0
      8192..16384 Data depth 0
      16384..1048576 Unallocated depth 0
    ");
    let mut byte = [9];
    disk.read_at(&mut byte, 14_999).unwrap();
    assert_eq!(byte, [1]);
    assert_snapshot!(disk.read_at(&mut byte, 1 << 20).unwrap_err(), @"read: disk.qcow2 at 1048576: 1 bytes at 1048576 reach past the end at 1048576");
    assert_snapshot!(format!("{:#?}", disk.geometry()), @r"
      Geometry {
          cluster_size: Some(
              4096,
          ),
          subcluster_size: None,
          request_alignment: 1,
          zero_cost: Metadata,
          discard: Frees,
          writable: true,
          forgetful: false,
          can_flush: true,
          backing: Possible,
      }
    ");
}

#[test]
fn a_granularity_and_its_reason() {
    let mut text = String::new();
    for cluster in [None, Some(512), Some(16 << 10), Some(2 << 20)] {
        writeln!(text, "{cluster:?}: {}", GranularityChoice::new(None, cluster).unwrap()).unwrap();
    }
    for explicit in [1 << 20, 511, 3000, 128 << 20] {
        match GranularityChoice::new(Some(explicit), None) {
            Ok(choice) => writeln!(text, "{explicit}: {choice}").unwrap(),
            Err(error) => writeln!(text, "{explicit}: {error}").unwrap(),
        }
    }
    assert_snapshot!(text, @r"
      None: 64 KiB (the target has no clusters)
      Some(512): 4 KiB (the target's cluster size is 512 bytes; the default stays between 4 KiB and 64 KiB)
      Some(16384): 16 KiB (the target's cluster size)
      Some(2097152): 64 KiB (the target's cluster size is 2 MiB; the default stays between 4 KiB and 64 KiB)
      1048576: 1 MiB (as asked)
      511: granularity 511: must be between 512 and 67108864 (64 MiB)
      3000: granularity 3000: must be a power of two
      134217728: granularity 134217728: must be between 512 and 67108864 (64 MiB)
    ");
}

#[test]
fn a_mirror_job_from_plan_to_end() {
    let source = MemoryDisk::new(4 << 20).named("source");
    source.write_at(&[7; 100_000], 65_536, WriteFlags::NONE).unwrap();
    source.write_at(&[8; 512], (4 << 20) - 512, WriteFlags::NONE).unwrap();
    let source: Arc<dyn BlockDevice> = Arc::new(source);

    let storage = Arc::new(MemoryStorage::new().named("target.qcow2"));
    CreateOptions::new(4 << 20).create(&*storage, None).unwrap();
    let target: Arc<dyn BlockDevice> =
        Arc::new(OpenOptions::new().writable(true).open(Arc::clone(&storage) as _).unwrap());

    // One thread: where in the image the last cluster lies does not depend on luck.
    let options = MirrorOptions::new().threads(NonZeroUsize::MIN);
    let planned = plan(&*source, PlanTarget::Existing(&*target), &options).unwrap();
    assert_snapshot!(planned, @r"
      granularity: 64 KiB (the target's cluster size)
      copy: 100864 bytes in 2 runs
      zero: 0 bytes
      skip: 4093440 bytes
    ");
    let job = MirrorJob::start(Arc::clone(&source), Arc::clone(&target), options).unwrap();
    let outcome = job.wait().unwrap();
    let (copied, zeroed, skipped) = (outcome.copied, outcome.zeroed, outcome.skipped);
    assert_snapshot!(format!("{}: copied {copied}, zeroed {zeroed}, skipped {skipped}", outcome.granularity), @"64 KiB (the target's cluster size): copied 100864, zeroed 0, skipped 4093440");
    assert!(outcome.given_up.is_empty());
    let (mut ours, mut theirs) = (vec![0; 4 << 20], vec![1; 4 << 20]);
    target.read_at(&mut ours, 0).unwrap();
    source.read_at(&mut theirs, 0).unwrap();
    assert!(ours == theirs);
    assert_snapshot!(map(&*target), @r"
      0..65536 Unallocated depth 0
      65536..167936 Data depth 0
      167936..196608 Zero depth 0
      196608..4128768 Unallocated depth 0
      4128768..4190208 Zero depth 0
      4190208..4194304 Data depth 0
    ");
}

#[test]
fn a_target_of_another_length_is_refused_with_both_lengths() {
    let source = Arc::new(MemoryDisk::new(1 << 20).named("source"));
    let target = Arc::new(MemoryDisk::new(2 << 20).named("target"));
    let error = MirrorJob::start(source, target, MirrorOptions::new()).unwrap_err();
    assert_snapshot!(error, @"source source has 1048576 bytes, target target has 2097152: they must be equal");
}

/// `error` and its causes as a report prints them, a line each; no line has the text of a cause that follows
/// it.
fn prints_each_cause_once(error: &(dyn std::error::Error + 'static)) {
    let chain: Vec<_> =
        std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect();
    for (index, line) in chain.iter().enumerate() {
        for cause in &chain[index + 1..] {
            assert!(!line.contains(cause), "{error:?}: a report prints \"{cause}\" twice");
        }
    }
}

fn system() -> std::io::Error {
    std::io::Error::from_raw_os_error(5)
}

fn below() -> blockmirror_block::Error {
    blockmirror_block::Error::io("read", system()).in_file("disk")
}

/// Errors had their cause in the line and returned it from `source()` as well, so that reports that follow
/// the chain printed it twice. Of each crate those that have a cause.
#[test]
fn an_error_prints_its_cause_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    prints_each_cause_once(&below());
    prints_each_cause_once(&below().because("of something else"));
    prints_each_cause_once(&std::io::Error::from(below()));
    // Of `file`, and with the lock held by this test, of `image-lock`.
    let options = blockmirror_file::FileOptions::new().writable(true);
    prints_each_cause_once(&options.open(&path).unwrap_err());
    std::fs::write(&path, [0; 4096]).unwrap();
    let held = options.open(&path).unwrap();
    let locked = options.open(&path).unwrap_err();
    assert!(locked.to_string().contains("locked by this process itself"), "{locked}");
    prints_each_cause_once(&locked);
    drop(held);
    {
        use blockmirror_qcow2::{Error, WriteRefusal};
        for error in [
            || Error::NotWritable(WriteRefusal::Corrupt),
            || Error::NotQcow2 { found: Vec::new() },
            || Error::Unfinished,
        ] {
            prints_each_cause_once(&error());
            let line = error().to_string();
            let up = error().in_file(&"disk".into());
            assert_eq!(up.to_string(), format!("open qcow2 image: disk: {line}"));
            assert!(up.cause().is_some(), "{up}: the cause stays in reach");
            prints_each_cause_once(&up);
        }
        prints_each_cause_once(&Error::Storage(below()));
    }
    {
        use blockmirror_image::{
            CreateSettings, Error, Format, OptionError, ReferencePolicy, ReferenceRefusal, Role,
        };
        let reason = ReferenceRefusal::from(system());
        prints_each_cause_once(&reason);
        let error = ReferencePolicy::any().resolve(&path, Role::Backing, "base".as_ref()).unwrap_err();
        prints_each_cause_once(&error);
        prints_each_cause_once(&Error::from(error));
        prints_each_cause_once(&Error::from(below()));
        prints_each_cause_once(&Error::Directory { path: path.clone(), cause: system() });
        let cause: OptionError = CreateSettings::default().parse(Format::Raw, "size=1Q").unwrap_err();
        prints_each_cause_once(&cause);
        prints_each_cause_once(&Error::Option { path: path.clone(), cause });
        let uri = blockmirror_image::OpenOptions::new().open("nbd://host:port:1/").unwrap_err();
        prints_each_cause_once(&uri);
    }
}

#[test]
fn an_error_of_a_client_or_a_job_prints_its_cause_once() {
    let dir = tempfile::tempdir().unwrap();
    {
        use blockmirror_nbd::server::ServerError;
        use blockmirror_nbd::{ClientError, ClientOptions, NbdUri};
        prints_each_cause_once(&ClientError::Connect(Arc::new(system())));
        prints_each_cause_once(&ClientError::Lost(Arc::new(system())));
        prints_each_cause_once(&ServerError::Listen { address: "here".into(), cause: system() });
        prints_each_cause_once(&ServerError::System { what: "start a thread", cause: system() });
        let error = ClientOptions::new(NbdUri::unix(dir.path().join("none"), "")).open().unwrap_err();
        assert!(matches!(error.cause().unwrap().downcast_ref(), Some(ClientError::Connect(_))), "{error}");
        prints_each_cause_once(&error);
    }
    {
        use blockmirror_qmp::client::{Client, ClientError};
        prints_each_cause_once(&ClientError::Io { what: "send".into(), cause: system() });
        prints_each_cause_once(
            &Client::connect(dir.path().join("none"), Duration::from_secs(1)).unwrap_err(),
        );
    }
    prints_each_cause_once(&blockmirror_filter::BlkdebugError::Read(system()));
    for error in [blockmirror_mirror::Error::Target(below()), blockmirror_mirror::Error::Source(below())] {
        prints_each_cause_once(&error);
    }
}

/// `text` without the folder, and without the time that a copy took.
fn masked(text: &str, folder: &std::path::Path) -> String {
    let text = text.replace(&format!("{}/", folder.display()), "");
    let lines = text.lines().map(|line| match line.split_once("elapsed: ") {
        Some((indent, _)) => format!("{indent}elapsed: ..\n"),
        None => format!("{line}\n"),
    });
    lines.collect()
}

#[test]
fn a_conversion_in_five_lines() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut disk = vec![0; 1 << 20];
    disk[..5000].fill(1);
    std::fs::write(path("disk.raw"), disk).unwrap();

    let cancel = AtomicBool::new(false);
    let mut reports = 0;
    let outcome = Convert::new(path("disk.raw"), path("disk.qcow2"))
        .target_format(Format::Qcow2)
        .run(&cancel, |_| reports += 1)
        .unwrap();
    assert!(reports > 0);
    assert_snapshot!(masked(&format!("{outcome:#?}"), folder.path()), @r"
      ConvertOutcome {
          format: Qcow2,
          len: 1048576,
          durable: true,
          copy: Outcome {
              ending: Copied,
              granularity: GranularityChoice {
                  bytes: 65536,
                  reason: TargetCluster {
                      cluster_size: 65536,
                      clamped: false,
                  },
              },
              copied: 65536,
              zeroed: 0,
              skipped: 983040,
              shared: 0,
              clone_calls: 0,
              given_up: [],
              unmapped: [],
              elapsed: ..
          },
          resumed: 0,
          verified: None,
      }
    ");

    let again = Convert::new(path("disk.qcow2"), path("disk.qcow2")).run(&cancel, |_| {}).unwrap_err();
    assert_snapshot!(
        masked(&again.to_string(), folder.path()),
        @"copy: disk.qcow2: it is part of the source disk.qcow2"
    );
    let missing = Convert::new(path("missing"), path("new")).run(&cancel, |_| {}).unwrap_err();
    assert_snapshot!(
        masked(&missing.to_string(), folder.path()),
        @"open: missing: No such file or directory (os error 2)"
    );
    cancel.store(true, std::sync::atomic::Ordering::Relaxed);
    let cancelled = Convert::new(path("disk.raw"), path("new")).run(&cancel, |_| {}).unwrap_err();
    assert!(cancelled.is_cancelled() && !path("new").exists());
}
