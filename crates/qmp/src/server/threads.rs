//! One client from greeting to end, on three threads: one reads and runs what is out of band, one runs
//! commands one after the other, one writes.
//!
//! Who waits for whom: the reader waits for the runner when enough commands are queued; both wait for the
//! writer when too many answers are; the writer waits for the client. Closing the connection wakes all of
//! them, but not a handler that is stuck: that thread is left to itself.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::thread;

use serde_json::Value;

use super::connection::Connection;
use super::outgoing::Outgoing;
use crate::error::QmpError;
use crate::json::{self, JsonError, Parser};
use crate::protocol::{Request, Table, answer, is_oob};
use crate::session::Session;
use crate::sync::{Condvar, Mutex};

/// Commands that may wait behind the one that runs, once the client has asked for out of band execution. A
/// client that sends more keeps its own out of band commands from being read.
const QUEUE: usize = 8;

/// The threads of a session and what they share.
#[derive(Debug)]
pub(super) struct SessionThreads {
    session: Session,
    queue: Mutex<Queue>,
    changed: Condvar,
    outgoing: Outgoing,
    close: Close,
}

struct Close(Arc<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Close {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Close")
    }
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Result<Value, JsonError>>,
    running: bool,
    /// The client has said all it will say.
    ended: bool,
    /// Nothing else is to be begun.
    stopping: bool,
}

impl SessionThreads {
    /// Starts the threads of a session, which runs the commands of `table`. `ended` is called at its end.
    pub(super) fn start(
        id: u64,
        connection: Connection,
        table: Arc<Table>,
        ended: impl Fn() + Send + 'static,
    ) -> io::Result<Arc<Self>> {
        let Connection { reader, writer, close, peer } = connection;
        let session = Arc::new(Self {
            session: Session::new(id, peer),
            queue: Mutex::default(),
            changed: Condvar::new(),
            outgoing: Outgoing::default(),
            close: Close(close),
        });
        session.send(&table.greeting(), false);
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            thread::Builder::new().name(format!("qmp {id} {name}")).spawn(work).map(drop)
        };
        // Each thread passes its end on to the next even if it panics: a reader that is not ours may.
        let (writing, running, reading) = (Arc::clone(&session), Arc::clone(&session), Arc::clone(&session));
        let (running_table, reading_table) = (Arc::clone(&table), table);
        let started = spawn(
            "write",
            Box::new(move || {
                let _end = OnDrop(|| {
                    writing.kill();
                    ended();
                });
                writing.write(writer);
            }),
        )
        .and_then(|()| {
            spawn(
                "run",
                Box::new(move || {
                    let _end = OnDrop(|| running.outgoing.finish());
                    running.run(&running_table);
                }),
            )
        })
        .and_then(|()| {
            spawn(
                "read",
                Box::new(move || {
                    let _end = OnDrop(|| reading.end_of_input());
                    reading.read(reader, &reading_table);
                }),
            )
        });
        match started {
            Ok(()) => Ok(session),
            Err(error) => {
                session.stop();
                session.kill();
                Err(error)
            }
        }
    }

    /// The client, as handlers see it.
    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// Begins nothing else; ends once what runs is answered and all is written.
    pub(super) fn stop(&self) {
        self.queue.lock().stopping = true;
        self.changed.notify_all();
    }

    /// Ends at once.
    pub(super) fn kill(&self) {
        self.outgoing.kill();
        self.stop();
        (self.close.0)();
    }

    pub(super) fn event(&self, line: &Arc<str>) {
        self.outgoing.event(line);
    }

    fn send(&self, value: &Value, then_events: bool) {
        let mut line = json::to_string(value);
        line.push_str("\r\n");
        self.outgoing.answer(line, then_events);
    }

    /// The thread that reads.
    fn read(&self, mut reader: Box<dyn Read + Send>, table: &Table) {
        let mut parser = Parser::new(table.limits);
        let mut buffer = [0; 4096];
        loop {
            let mut input = match reader.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => break,
                Ok(n) => buffer.get(..n).unwrap_or_default(),
            };
            while let Some(item) = parser.next(&mut input) {
                if !self.accept(item, table) {
                    return;
                }
            }
        }
    }

    fn end_of_input(&self) {
        self.queue.lock().ended = true;
        self.changed.notify_all();
    }

    /// Queues a request, or runs it if it is out of band; `false` if the session is over.
    fn accept(&self, item: Result<Value, JsonError>, table: &Table) -> bool {
        let oob = self.session.oob();
        if oob && item.as_ref().is_ok_and(is_oob) {
            self.outgoing.wait_room();
            self.handle(item, table);
            return true;
        }
        let mut queue = self.queue.lock();
        queue.waiting.push_back(item);
        self.changed.notify_all();
        // Without out of band execution the next request is not even looked at before this one is answered:
        // it may be this one that switches it on.
        let queue = self.changed.wait_while(queue, |queue| {
            let full = if self.session.oob() {
                queue.waiting.len() >= QUEUE
            } else {
                queue.running || !queue.waiting.is_empty()
            };
            full && !queue.stopping
        });
        !queue.stopping
    }

    /// The thread that runs commands.
    fn run(&self, table: &Table) {
        loop {
            let mut queue = self.changed.wait_while(self.queue.lock(), |queue| {
                queue.waiting.is_empty() && !queue.ended && !queue.stopping
            });
            if queue.stopping {
                break;
            }
            let Some(item) = queue.waiting.pop_front() else { break };
            queue.running = true;
            self.changed.notify_all();
            drop(queue);
            self.outgoing.wait_room();
            self.handle(item, table);
            self.queue.lock().running = false;
            self.changed.notify_all();
        }
    }

    /// Answers one request.
    fn handle(&self, item: Result<Value, JsonError>, table: &Table) {
        let negotiated = self.session.negotiated();
        let request = item
            .map_err(|error| (None, QmpError::from(error)))
            .and_then(|v| Request::new(v, self.session.oob()));
        let answer = match request {
            Ok(mut request) => {
                let id = request.id.take();
                answer(id, table.run(&self.session, request))
            }
            Err((id, error)) => answer(id, Err(error)),
        };
        self.send(&answer, !negotiated && self.session.negotiated());
        self.session.do_deferred();
    }

    /// The thread that writes.
    fn write(&self, mut writer: Box<dyn Write + Send>) {
        while let Some(line) = self.outgoing.next() {
            if writer.write_all(line.text().as_bytes()).and_then(|()| writer.flush()).is_err() {
                break;
            }
        }
    }
}

/// Runs something when the thread ends, however it ends.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
