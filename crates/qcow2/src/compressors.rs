//! The encoders of an open image, kept for the next write: making one costs more than compressing a cluster.

use blockmirror_block::sync::Mutex;

use crate::compress::Encoder;
use crate::format::header::Compression;

/// Everything one thread needs to compress clusters.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) encoder: Encoder,
    /// The streams of a batch, one behind the other.
    pub(crate) out: Vec<u8>,
}

/// The encoders of an open image.
#[derive(Debug)]
pub(crate) struct Compressors {
    compression: Compression,
    /// *Guards* workers at rest, of which there are never more than threads that have written at the same
    /// time. Leaf lock.
    idle: Mutex<Vec<Worker>>,
}

impl Compressors {
    pub(crate) fn new(compression: Compression) -> Self {
        Self { compression, idle: Mutex::default() }
    }

    /// A worker for one batch.
    pub(crate) fn take(&self) -> Worker {
        let idle = self.idle.lock().pop();
        idle.unwrap_or_else(|| Worker { encoder: Encoder::new(self.compression), out: Vec::new() })
    }

    /// The batch is written.
    pub(crate) fn put_back(&self, worker: Worker) {
        self.idle.lock().push(worker);
    }
}
