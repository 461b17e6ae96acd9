//! The suite on a job that reads its disk once.

use blockmirror_block::ByteRange;

use super::{Features, Kind, OneThread, Setup, Subject, TestDisk};
use crate::error::testing::TestError;
use crate::{Job, JobOptions, Operation};

struct Reader;

impl Kind for Reader {
    fn features(&self) -> Features {
        OneThread::<TestError, Job<TestError>>::FEATURES
    }

    fn start(&self, setup: Setup) -> Box<dyn Subject> {
        let disk = TestDisk::new(setup.disk);
        let device = disk.device();
        let job = Job::start("test", device.len(), JobOptions::from(setup), move |worker| {
            let range = ByteRange::at(0, 4096);
            worker.next_step(1, range.len())?;
            while let Err(error) = device.read_at(&mut [0; 4096], range.start()) {
                worker.failed(Operation::Read, range, error)?;
                worker.next_step(1, range.len())?;
            }
            worker.done(range.len(), range.len());
            worker.last_step()
        });
        let job: Job<TestError> = job.unwrap();
        Box::new(OneThread::new(job.control().clone(), disk, job))
    }
}

crate::conformance!(Reader);
