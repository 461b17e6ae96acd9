//! What the host says of files: how long they are and what they occupy. Asked by queries, outside of the
//! graph's lock.
//!
//! What must hold: a file that hangs delays an answer for a moment, once; there is never more than one thread
//! that waits for it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::Storage;
use blockmirror_block::sync::{Condvar, Mutex};

use super::host_size_cell::{HostSize, HostSizeCell};
use super::{Graph, Node};

/// How long one file may take to answer.
const FILE_LIMIT: Duration = Duration::from_millis(300);
/// How long all files may take.
const QUERY_LIMIT: Duration = Duration::from_secs(1);

/// A file to be asked.
struct Question {
    storage: Arc<dyn Storage>,
    is_file: bool,
    cell: Arc<HostSizeCell>,
}

impl Question {
    /// Asks the host, unless another thread does.
    fn ask(&self) {
        self.cell.ask(|| {
            let len = if self.is_file { self.storage.len().ok() } else { None };
            HostSize { len, allocated: self.storage.allocated_bytes().ok().flatten() }
        });
    }
}

/// How many of the questions have been answered.
#[derive(Debug, Default)]
struct Answered {
    count: Mutex<usize>,
    changed: Condvar,
}

/// The questions of a query, gathered under the graph's lock.
pub(crate) struct HostSizes(Vec<Question>);

impl HostSizes {
    /// Those about all nodes.
    pub(crate) fn of(graph: &Graph) -> Self {
        let question = |node: &&Node| {
            let storage = Arc::clone(node.storage.as_ref()?);
            Some(Question { storage, is_file: node.file.is_some(), cell: Arc::clone(&node.host_size) })
        };
        Self(graph.nodes().iter().filter_map(question).collect())
    }

    /// Asks them, for a moment: what does not answer keeps its last answer. Not to be called under a lock.
    pub(crate) fn ask(self) {
        let until = Instant::now() + QUERY_LIMIT;
        let questions: Arc<Vec<_>> = Arc::new(self.0);
        let mut next = 0;
        while next < questions.len() && Instant::now() < until {
            let answered = Arc::new(Answered::default());
            let (asked, done) = (Arc::clone(&questions), Arc::clone(&answered));
            let work = move || {
                for question in &asked[next..] {
                    question.ask();
                    *done.count.lock() += 1;
                    done.changed.notify_all();
                }
            };
            if thread::Builder::new().name("host size".into()).spawn(work).is_err() {
                return;
            }
            let all = questions.len() - next;
            let mut count = answered.count.lock();
            while *count < all {
                let before = *count;
                count = answered.changed.wait_timeout(count, FILE_LIMIT).0;
                if *count == before {
                    break;
                }
            }
            // One that hangs is left behind; another thread asks those after it.
            next += *count + 1;
        }
    }
}
