//! Reading compressed clusters: fetch the stream, decompress it, keep the result for the next small read.
//!
//! Called by `read` for each compressed cluster that a request touches. A request for a whole cluster
//! decompresses straight into the caller's buffer; only parts of clusters go through the cache, so a long
//! sequential copy does not turn it over. Compressed clusters are never written in place; where one takes the
//! place of another that no entry points at any more, what was kept of that is forgotten first.

use std::collections::VecDeque;
use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use blockmirror_block::{Error, Result};

use crate::context::ImageContext;
use crate::decompress::Decoder;
use crate::format::entry::CompressedRun;
use crate::format::header::Compression;
use crate::offset::ClusterSize;

/// Bytes of decompressed clusters that are kept, and how many clusters at most: they are searched one by one.
const CACHE_BYTES: usize = 4 << 20;
const CACHE_CLUSTERS: usize = 64;

/// Everything one thread needs to decompress clusters.
#[derive(Debug)]
struct Worker {
    decoder: Decoder,
    /// The stream as it was fetched: at most twice the cluster, as far as a descriptor can say.
    stream: Vec<u8>,
}

/// The decoders of an open image, and the clusters they last gave.
#[derive(Debug)]
pub(crate) struct Decompressors {
    compression: Compression,
    cluster: ClusterSize,
    /// Workers at rest; there are never more than threads that have read at the same time.
    idle: Mutex<Vec<Worker>>,
    /// Decompressed clusters, the last used at the back.
    recent: Mutex<VecDeque<(CompressedRun, Arc<[u8]>)>>,
}

impl Decompressors {
    pub(crate) fn new(compression: Compression, cluster: ClusterSize) -> Self {
        Self { compression, cluster, idle: Mutex::default(), recent: Mutex::default() }
    }

    /// Fills `buf` from the compressed cluster at `run`, starting `within` bytes into it. The bytes lie
    /// inside one cluster.
    pub(crate) fn read(
        &self,
        ctx: &ImageContext,
        run: CompressedRun,
        within: usize,
        buf: &mut [u8],
    ) -> Result<()> {
        // At most 2 MiB.
        let size = self.cluster.bytes() as usize;
        if buf.len() == size {
            return self.decode(ctx, run, buf);
        }
        let cluster = match self.cached(run) {
            Some(cluster) => cluster,
            None => {
                let mut cluster = vec![0; size];
                self.decode(ctx, run, &mut cluster)?;
                let cluster: Arc<[u8]> = cluster.into();
                self.keep(run, Arc::clone(&cluster));
                cluster
            }
        };
        buf.copy_from_slice(&cluster[within..within + buf.len()]);
        Ok(())
    }

    fn decode(&self, ctx: &ImageContext, run: CompressedRun, cluster: &mut [u8]) -> Result<()> {
        let error = |e: crate::Error| Error::from(e).at(run.offset.0).or_in_file(&ctx.name);
        let idle = self.idle.lock().pop();
        let mut worker = match idle {
            Some(worker) => worker,
            None => Worker { decoder: Decoder::new(self.compression).map_err(error)?, stream: Vec::new() },
        };
        worker.stream.resize(run.len as usize, 0);
        // Compressed clusters lie in the image file even where there is a data file.
        let result = ctx
            .storage
            .read_at(&mut worker.stream, run.offset.0)
            .and_then(|()| worker.decoder.decode(&worker.stream, cluster).map_err(error));
        self.idle.lock().push(worker);
        result
    }

    /// What was kept of other clusters in these places is not theirs.
    pub(crate) fn forget(&self, runs: impl Iterator<Item = CompressedRun>) {
        let mut recent = self.recent.lock();
        if !recent.is_empty() {
            runs.for_each(|run| recent.retain(|(key, _)| *key != run));
        }
    }

    fn cached(&self, run: CompressedRun) -> Option<Arc<[u8]>> {
        let mut recent = self.recent.lock();
        let index = recent.iter().rposition(|(key, _)| *key == run)?;
        let entry = recent.remove(index)?;
        let cluster = Arc::clone(&entry.1);
        recent.push_back(entry);
        Some(cluster)
    }

    fn keep(&self, run: CompressedRun, cluster: Arc<[u8]>) {
        let room = (CACHE_BYTES / cluster.len().max(1)).clamp(1, CACHE_CLUSTERS);
        let mut recent = self.recent.lock();
        if recent.iter().any(|(key, _)| *key == run) {
            return;
        }
        while recent.len() >= room {
            recent.pop_front();
        }
        recent.push_back((run, cluster));
    }
}
