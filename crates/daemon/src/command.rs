//! The commands, each file with the schema of its own.
//!
//! Commands about the same nodes run one after the other, whichever monitor they come from ([`locks`]);
//! `quit`, `blockdev-add`, the verbs of jobs and what only looks do not wait for others, nor others for them.

mod bitmap;
mod block;
mod chain;
mod create;
mod drive_mirror;
pub(crate) mod export;
mod hmp;
mod job;
pub(crate) mod locks;
mod object;
mod query;
mod reopen;
mod resize;
mod snapshot;
mod transaction;

use std::sync::{Arc, Weak};

use blockmirror_qmp::schema::Command;
use blockmirror_qmp::{QmpError, Session, Table, Version};
use serde_json::Value;

use crate::Reply;
use crate::arguments::Arguments;
use crate::daemon::Daemon;
use crate::events::EVENTS;

/// The version of QEMU whose commands these are.
const SPOKEN: (u32, u32, u32) = (10, 0, 0);

/// What a handler gets: the daemon, the session, and the arguments.
pub(crate) type Handler<A> = fn(&Arc<Daemon>, &Session, A) -> Reply<Value>;

/// The rest of a command, while which others may run.
pub(crate) type Deferred = Box<dyn FnOnce() -> Reply<Value>>;

/// A handler whose command takes its time after what has to be done alone.
pub(crate) type DeferredHandler<A> = fn(&Arc<Daemon>, A) -> Reply<Deferred>;

/// Commands being put together.
pub(crate) struct Commands<'a> {
    table: &'a mut Table,
    daemon: Weak<Daemon>,
}

impl Commands<'_> {
    /// A command that runs alone on the nodes that its arguments name.
    pub(crate) fn add<A: Arguments + 'static>(
        &mut self,
        command: &'static Command,
        handler: Handler<A>,
    ) -> &mut Self {
        let daemon = Weak::clone(&self.daemon);
        self.table.command(command, move |session, args| {
            let daemon = daemon.upgrade().ok_or_else(gone)?;
            let _nodes = daemon.locks.lock(&daemon.graph, args.map(), false);
            handler(&daemon, session, A::parse(args.map())?)
        });
        self
    }

    /// A command that also changes which exports there are.
    pub(crate) fn add_for_exports<A: Arguments + 'static>(
        &mut self,
        command: &'static Command,
        handler: Handler<A>,
    ) -> &mut Self {
        let daemon = Weak::clone(&self.daemon);
        self.table.command(command, move |session, args| {
            let daemon = daemon.upgrade().ok_or_else(gone)?;
            let _nodes = daemon.locks.lock(&daemon.graph, args.map(), true);
            handler(&daemon, session, A::parse(args.map())?)
        });
        self
    }

    /// A command that removes something: what its handler returns runs beside others, before the answer.
    pub(crate) fn add_deferred<A: Arguments + 'static>(
        &mut self,
        command: &'static Command,
        exports: bool,
        handler: DeferredHandler<A>,
    ) -> &mut Self {
        let daemon = Weak::clone(&self.daemon);
        self.table.command(command, move |_, args| {
            let daemon = daemon.upgrade().ok_or_else(gone)?;
            let nodes = daemon.locks.lock(&daemon.graph, args.map(), exports);
            let rest = handler(&daemon, A::parse(args.map())?);
            drop(nodes);
            rest?()
        });
        self
    }

    /// A command that only looks, or must neither wait nor keep others waiting: it opens files, or steers a
    /// job.
    pub(crate) fn add_quick<A: Arguments + 'static>(
        &mut self,
        command: &'static Command,
        handler: Handler<A>,
    ) -> &mut Self {
        let daemon = Weak::clone(&self.daemon);
        self.table.command(command, move |session, args| {
            let daemon = daemon.upgrade().ok_or_else(gone)?;
            handler(&daemon, session, A::parse(args.map())?)
        });
        self
    }
}

fn gone() -> QmpError {
    QmpError::generic("The daemon is ending")
}

/// A table without commands of ours.
pub(crate) fn empty_table() -> Table {
    let (major, minor, micro) = SPOKEN;
    Table::new(Version::new(major, minor, micro, concat!("blockmirror ", env!("CARGO_PKG_VERSION"))))
}

/// All commands and events.
pub(crate) fn table(daemon: &Arc<Daemon>) -> Table {
    let mut table = empty_table();
    table.check_answers(cfg!(test));
    for event in EVENTS {
        table.event(event);
    }
    let mut commands = Commands { table: &mut table, daemon: Arc::downgrade(daemon) };
    block::register(&mut commands);
    job::register(&mut commands);
    export::register(&mut commands);
    bitmap::register(&mut commands);
    object::register(&mut commands);
    query::register(&mut commands);
    transaction::register(&mut commands);
    resize::register(&mut commands);
    create::register(&mut commands);
    snapshot::register(&mut commands);
    chain::register(&mut commands);
    drive_mirror::register(&mut commands);
    hmp::register(&mut commands);
    reopen::register(&mut commands);
    table
}
