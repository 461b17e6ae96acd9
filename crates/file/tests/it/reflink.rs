//! Clones of blocks between host files, on file systems that have them. Needs root, loop devices, `mkfs.xfs`
//! and `mkfs.btrfs`; skipped visibly without.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::testing::{Fault, FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_block::{ErrorKind, HostRun, Storage};
use blockmirror_file::{FileOptions, FileStorage};
use blockmirror_testing::LoopFs;

const BLOCK: u64 = 4096;

fn create(path: impl AsRef<Path>) -> FileStorage {
    FileOptions::new().create_new(true).open(path).unwrap()
}

/// A file of ten blocks and a bit, each with its number plus one in it.
fn source(dir: &Path) -> Arc<dyn Storage> {
    let file = create(dir.join("source"));
    for number in 0..10 {
        file.write_at(&[number as u8 + 1; BLOCK as usize], number * BLOCK).unwrap();
    }
    file.write_at(&[0xff; 100], 10 * BLOCK).unwrap();
    Arc::new(file)
}

fn block(file: &dyn Storage, number: u64) -> u8 {
    let mut bytes = [0; BLOCK as usize];
    file.read_at(&mut bytes, number * BLOCK).unwrap();
    assert_eq!(bytes, [bytes[0]; BLOCK as usize], "block {number}");
    bytes[0]
}

#[test]
fn whole_blocks_are_cloned_and_nothing_else() {
    for fs in LoopFs::with_reflinks("whole_blocks_are_cloned_and_nothing_else") {
        let source = source(fs.path());
        let run = |offset| HostRun { storage: Arc::clone(&source), offset };
        let target = create(fs.path().join("target"));
        target.write_at(&[0x77; 8 * BLOCK as usize], 0).unwrap();
        assert_eq!(target.clone_block(&*source), Some(BLOCK));
        assert_eq!(target.clone_range(2 * BLOCK, &run(4 * BLOCK), 3 * BLOCK).unwrap(), 1);
        assert_eq!(
            (0..8).map(|at| block(&target, at)).collect::<Vec<_>>(),
            [119, 119, 5, 6, 7, 119, 119, 119]
        );
        // Past the end it grows; and nothing at all, which the kernel would take for all, is nothing.
        target.clone_range(100 * BLOCK, &run(0), BLOCK).unwrap();
        assert_eq!((target.len().unwrap(), block(&target, 100)), (101 * BLOCK, 1));
        assert_eq!(target.clone_range(0, &run(0), 0).unwrap(), 0);
        for (offset, from, len) in [
            (512, 0, BLOCK),
            (0, 512, BLOCK),
            (0, 0, BLOCK + 512),
            (0, 10 * BLOCK, BLOCK),
            (0, 1 << 40, BLOCK),
        ] {
            let refused = target.clone_range(offset, &run(from), len).unwrap_err();
            assert!(refused.kind() == ErrorKind::Unsupported && refused.was_refused(), "{refused}");
        }
        assert_eq!(block(&target, 0), 119);
        drop(target);
        let read_only = FileOptions::new().open(fs.path().join("target")).unwrap();
        assert_eq!(read_only.clone_block(&*source), None);
        assert_eq!(read_only.clone_range(0, &run(0), BLOCK).unwrap_err().kind(), ErrorKind::ReadOnly);
    }
}

#[test]
fn a_source_is_durable_before_its_blocks_are_shared() {
    for fs in LoopFs::with_reflinks("a_source_is_durable_before_its_blocks_are_shared") {
        let faults = Faults::new();
        let source = FaultStorage::new(source(fs.path()), faults.clone());
        let target = create(fs.path().join("target"));
        assert_eq!(target.clone_block(&source), Some(BLOCK));
        assert_eq!(faults.seen(OpKind::Flush), 1);
        faults.inject(Fault::on(OpKind::Flush));
        assert_eq!(target.clone_block(&source), None, "what may be lost is not shared");
    }
}

#[test]
fn files_that_cannot_share_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let run = HostRun { storage: Arc::new(MemoryStorage::with_contents(&[1; 8192])), offset: 0 };
    let target = create(dir.path().join("target"));
    assert_eq!(target.clone_block(&*run.storage), None, "no host file");
    assert_eq!(target.clone_range(0, &run, BLOCK).unwrap_err().kind(), ErrorKind::Unsupported);
    for fs in LoopFs::with_reflinks("files_that_cannot_share_say_so") {
        let source = source(fs.path());
        assert_eq!(target.clone_block(&*source), None, "another file system");
        let run = HostRun { storage: source, offset: 0 };
        let refused = target.clone_range(0, &run, BLOCK).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        assert_eq!(target.len().unwrap(), 0);
    }
}
