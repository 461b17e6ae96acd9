//! Stream and commit follow the rules of all jobs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use blockmirror_block::BlockDevice;
use blockmirror_block::testing::{MemoryDisk, MemoryStorage};
use blockmirror_job::testing::{Features, Kind, OneThread, Setup, Subject, TestDisk};
use blockmirror_ops::{Base, CommitJob, Error, JobOptions, StreamJob};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2};

/// An empty overlay on `below`.
fn overlay(below: Arc<dyn BlockDevice>) -> Arc<Qcow2> {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(below.len());
    options.backing_file = Some(b"below".to_vec());
    options.create(&*storage, None).unwrap();
    Arc::new(OpenOptions::new().writable(true).backing(below).open(storage).unwrap())
}

mod stream {
    use super::*;

    struct Stream;

    impl Kind for Stream {
        fn features(&self) -> Features {
            OneThread::<Error, StreamJob>::FEATURES
        }

        fn start(&self, setup: Setup) -> Box<dyn Subject> {
            let disk = TestDisk::new(setup.disk);
            let image = overlay(disk.device());
            let job = StreamJob::start(image, None, JobOptions::from(setup)).unwrap();
            Box::new(OneThread::new(job.control().clone(), disk, job))
        }
    }

    blockmirror_job::conformance!(Stream);
}

mod commit {
    use super::*;

    struct Commit;

    impl Kind for Commit {
        fn features(&self) -> Features {
            OneThread::<Error, CommitJob>::FEATURES
        }

        fn start(&self, setup: Setup) -> Box<dyn Subject> {
            let disk = TestDisk::new(setup.disk);
            let top = disk.device();
            let base: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::new(top.len()));
            let base = Base { device: base, name: b"base".to_vec(), format: Some("raw".into()) };
            let overlay = overlay(Arc::clone(&top));
            let job = CommitJob::start(overlay, top, base, 1, JobOptions::from(setup)).unwrap();
            Box::new(OneThread::new(job.control().clone(), disk, job))
        }
    }

    blockmirror_job::conformance!(Commit);
}
