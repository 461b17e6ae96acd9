//! Closing nodes that are out of the graph. Called by commands, by the ends of jobs and exports, and at the
//! end of the daemon.
//!
//! What must hold: it takes seconds at most, however many nodes there are and whatever has become of their
//! peers. A node whose image goes on writing metadata, slowly, has [`SLOW_LIMIT`].

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::BlockDevice;
use blockmirror_block::cancel::CancelSource;
use blockmirror_qcow2::Qcow2;
use tracing::{info, warn};

use super::{Node, NodeDevice, StoredBitmaps};

/// How long nodes may make no progress with their flush, and again to end a blocked flush.
const LIMIT: Duration = Duration::from_secs(2);
/// The same at the end of the daemon, which is over within three seconds if nothing goes on.
const LAST_LIMIT: Duration = Duration::from_millis(600);
/// How long a node may take that goes on.
const SLOW_LIMIT: Duration = Duration::from_secs(30);
/// How often it is looked whether nodes go on.
const LOOK: Duration = Duration::from_millis(20);

/// Closes nodes that a change of the graph has left without users: what was written reaches the disk, later
/// writes are refused, and files are free, whatever still holds something of a node. Those below which
/// nothing answers any more are abandoned after a while.
pub(crate) fn close_released(nodes: Vec<Node>) {
    close_within(nodes, LIMIT);
}

/// Closes nodes at the end of the daemon; users come before what they stand on.
pub(crate) fn close_all(nodes: Vec<Node>) {
    close_within(nodes, LAST_LIMIT);
}

/// There is no client to report a failure to; one that cares has flushed. Persistent bitmaps that cannot be
/// stored stay marked as in use.
fn flush(device: &NodeDevice, bitmaps: Option<&StoredBitmaps>) {
    if let Err(error) = device.flush() {
        warn!(%error, "what was written last may be lost: the flush of a node that is closed failed");
    }
    if let Some(bitmaps) = bitmaps
        && let Err(error) = bitmaps.store()
    {
        warn!(%error, "the persistent bitmaps of a node that is closed were not stored");
        // The last drop of the image must not wait for the same again.
        bitmaps.image.give_up_bitmaps();
    }
}

/// What has been done about a node whose flush does not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing yet.
    Waiting,
    /// Its own calls were cancelled.
    Cancelled,
    /// So was all that it has in flight.
    CutOff,
}

/// A node that is flushed, by a thread.
struct Closing {
    index: usize,
    device: Arc<NodeDevice>,
    image: Weak<Qcow2>,
    calls: CancelSource,
    stage: Stage,
    /// When it was last seen to go on, or when its stage began, and how far it was.
    since: Instant,
    progress: u64,
}

impl Closing {
    /// Begins to close `node`; `None` if it is done already. `done` is sent its index.
    fn start(index: usize, node: &Node, done: &Sender<usize>) -> Option<Self> {
        // One that was written before it became read-only may have bitmaps that are marked as in use.
        let bitmaps = node.stored_bitmaps().filter(|bitmaps| !bitmaps.is_empty());
        if node.read_only && bitmaps.is_none() {
            return None;
        }
        let calls = CancelSource::new();
        let work = {
            let (device, done, calls, bitmaps) =
                (Arc::clone(&node.device), done.clone(), calls.clone(), bitmaps.clone());
            move || {
                let _calls = calls.enter();
                flush(&device, bitmaps.as_ref());
                let _ = done.send(index);
            }
        };
        if thread::Builder::new().name("close".into()).spawn(work).is_err() {
            flush(&node.device, bitmaps.as_ref());
            return None;
        }
        let image = node.qcow2.as_ref().map(Arc::downgrade).unwrap_or_default();
        let device = Arc::clone(&node.device);
        let since = Instant::now();
        Some(Self { index, device, image, calls, stage: Stage::Waiting, since, progress: 0 })
    }

    /// Does what it is time for; false if there is nothing else to be done. `until` is the end of all
    /// patience.
    fn advance(&mut self, now: Instant, limit: Duration, until: Instant) -> bool {
        let progress = self.image.upgrade().map_or(0, |image| image.metadata_progress());
        if progress > self.progress && now < until {
            (self.progress, self.since) = (progress, now);
        }
        let limit = match self.stage {
            Stage::Waiting => limit,
            Stage::Cancelled => limit / 4,
            Stage::CutOff => limit - limit / 4,
        };
        if now.duration_since(self.since) < limit {
            return true;
        }
        self.since = now;
        match self.stage {
            Stage::Waiting => {
                self.calls.cancel();
                self.stage = Stage::Cancelled;
            }
            Stage::Cancelled => {
                // What a filter stands on has users of its own.
                if self.device.device().forwards_to().is_none() {
                    self.device.cancel_in_flight();
                }
                self.stage = Stage::CutOff;
            }
            Stage::CutOff => return false,
        }
        true
    }
}

/// Waits for nodes that are flushed. Returns those that hang.
fn wait_for(mut closing: Vec<Closing>, is_done: &Receiver<usize>, limit: Duration) -> Vec<usize> {
    let until = Instant::now() + SLOW_LIMIT;
    let mut hanging = Vec::new();
    while !closing.is_empty() {
        if let Ok(index) = is_done.recv_timeout(LOOK) {
            closing.retain(|node| node.index != index);
            continue;
        }
        let now = Instant::now();
        closing.retain_mut(|node| {
            let goes_on = node.advance(now, limit, until);
            if !goes_on {
                hanging.push(node.index);
            }
            goes_on
        });
    }
    hanging
}

fn close_within(nodes: Vec<Node>, limit: Duration) {
    let (done, is_done) = mpsc::channel();
    let closing = nodes.iter().enumerate().filter_map(|(index, node)| Closing::start(index, node, &done));
    let hanging = wait_for(closing.collect(), &is_done, limit);
    for (index, node) in nodes.into_iter().enumerate() {
        info!(name = node.name, hangs = hanging.contains(&index), "node closed");
        node.device.set_read_only(true);
        if let Some(image) = node.qcow2.as_ref().filter(|_| hanging.contains(&index)) {
            image.give_up_bitmaps();
        }
        let Some(file) = node.file else { continue };
        if hanging.contains(&index) {
            // It may be waited for in vain; without a thread it is closed with the process.
            let _ = thread::Builder::new().name("close".into()).spawn(move || file.close());
        } else {
            let _ = file.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use blockmirror_block::WriteFlags;
    use blockmirror_block::testing::MemoryStorage;
    use blockmirror_qcow2::{CreateOptions, OpenOptions};

    use super::*;
    use crate::graph::DeviceOptions;

    /// An image on a disk that took longer than 0.6 s to store its bitmaps was cut off at `quit`.
    #[test]
    fn a_node_is_cut_off_when_it_makes_no_progress() {
        let storage = Arc::new(MemoryStorage::new());
        CreateOptions::new(1 << 20).create(&*storage, None).unwrap();
        let image = Arc::new(OpenOptions::new().writable(true).open(storage).unwrap());
        let (limit, start) = (Duration::from_secs(1), Instant::now());
        let mut node = Closing {
            index: 0,
            device: NodeDevice::new(Arc::clone(&image) as _, DeviceOptions::default()),
            image: Arc::downgrade(&image),
            calls: CancelSource::new(),
            stage: Stage::Waiting,
            since: start,
            progress: image.metadata_progress(),
        };
        let _calls = node.calls.enter();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let until = at(5.0);
        for step in 1..5 {
            image.write_at(&[1; 512], 0, WriteFlags::FUA).unwrap();
            assert!(node.advance(at(0.9 * f64::from(step)), limit, until));
            assert_eq!(node.stage, Stage::Waiting, "it goes on, slowly");
        }
        assert!(node.advance(at(4.5), limit, until));
        assert_eq!(node.stage, Stage::Waiting);
        image.write_at(&[1; 512], 0, WriteFlags::FUA).unwrap();
        assert!(node.advance(at(5.0), limit, until));
        assert_eq!(node.stage, Stage::Cancelled, "it went on, but for too long");
        assert!(blockmirror_block::cancel::is_cancelled());
        assert!(node.advance(at(5.2), limit, until) && node.stage == Stage::Cancelled);
        assert!(node.advance(at(5.3), limit, until) && node.stage == Stage::CutOff);
        assert!(node.advance(at(6.0), limit, until));
        assert!(!node.advance(at(6.1), limit, until));
    }
}
