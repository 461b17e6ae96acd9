//! Closing nodes that are out of the graph. Called by commands, by the ends of jobs and exports, and at the
//! end of the daemon.
//!
//! What must hold: it takes seconds at most, however many nodes there are and whatever has become of their
//! peers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::BlockDevice;
use blockmirror_block::cancel::CancelSource;
use tracing::{info, warn};

use super::{Node, NodeDevice, StoredBitmaps};

/// How long nodes may take to flush, and again to end a blocked flush.
const LIMIT: Duration = Duration::from_secs(2);
/// The same at the end of the daemon, which is over within three seconds.
const LAST_LIMIT: Duration = Duration::from_millis(600);

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
    if let Some(Err(error)) = bitmaps.map(StoredBitmaps::store) {
        warn!(%error, "the persistent bitmaps of a node that is closed were not stored");
    }
}

fn close_within(nodes: Vec<Node>, limit: Duration) {
    let (done, is_done) = mpsc::channel();
    let flushes = CancelSource::new();
    let mut flushing = BTreeSet::new();
    for (index, node) in nodes.iter().enumerate() {
        // One that was written before it became read-only may have bitmaps that are marked as in use.
        let bitmaps = node.stored_bitmaps().filter(|bitmaps| !bitmaps.is_empty());
        if node.read_only && bitmaps.is_none() {
            continue;
        }
        let (device, done, flushes) = (Arc::clone(&node.device), done.clone(), flushes.clone());
        let stored = bitmaps.clone();
        let work = move || {
            let _calls = flushes.enter();
            flush(&device, stored.as_ref());
            let _ = done.send(index);
        };
        if thread::Builder::new().name("close".into()).spawn(work).is_ok() {
            flushing.insert(index);
        } else {
            flush(&node.device, bitmaps.as_ref());
        }
    }
    let mut wait = |limit: Duration| {
        let until = Instant::now() + limit;
        while !flushing.is_empty()
            && let Ok(index) = is_done.recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            flushing.remove(&index);
        }
        flushing.clone()
    };
    if !wait(limit).is_empty() {
        flushes.cancel();
    }
    for index in wait(limit / 4) {
        // What a filter stands on has users of its own.
        if nodes[index].device.device().forwards_to().is_none() {
            nodes[index].device.cancel_in_flight();
        }
    }
    // Whether they have ended or not, there is nothing else to be done.
    let hanging = wait(limit - limit / 4);
    for (index, node) in nodes.into_iter().enumerate() {
        info!(name = node.name, hangs = hanging.contains(&index), "node closed");
        node.device.set_read_only(true);
        let Some(file) = node.file else { continue };
        if hanging.contains(&index) {
            // It may be waited for in vain; without a thread it is closed with the process.
            let _ = thread::Builder::new().name("close".into()).spawn(move || file.close());
        } else {
            let _ = file.close();
        }
    }
}
