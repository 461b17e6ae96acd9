//! The commands, each file with the schema of its own.
//!
//! Commands about the same nodes run one after the other, whichever monitor they come from (`locks`);
//! `quit`, `blockdev-add`, the verbs of jobs and what only looks do not wait for others, nor others for them.

mod bitmap;
mod block;
mod chain;
mod create;
mod drive_mirror;
pub(crate) mod export;
mod hmp;
mod internal_snapshot;
mod job;
mod object;
mod query;
mod reopen;
mod resize;
mod snapshot;
mod transaction;

use std::path::PathBuf;
use std::sync::{Arc, Weak};

use blockmirror_qmp::schema::Command;
use blockmirror_qmp::{QmpError, Session, Table, Version};
use serde_json::Value;

use crate::arguments::Arguments;
use crate::context::Context;
use crate::events::EVENTS;
use crate::export::Exports;
use crate::job::Jobs;
use crate::quit::Quit;
use crate::{Deferred, Reply};

/// The version of QEMU whose commands these are.
const SPOKEN: (u32, u32, u32) = (10, 0, 0);

/// What commands work on.
#[derive(Debug)]
pub(crate) struct Services {
    pub(crate) context: Arc<Context>,
    pub(crate) exports: Arc<Exports>,
    pub(crate) jobs: Arc<Jobs>,
    pub(crate) quit: Quit,
}

impl Services {
    /// Those of a daemon with nothing in it. Files that images name are opened if they lie beside the image
    /// or in one of the `allowed` directories, or, but not as data files, in one of the `readable` ones.
    pub(crate) fn new(allowed: Vec<PathBuf>, readable: Vec<PathBuf>) -> Arc<Self> {
        let context = Context::new(allowed, readable);
        Arc::new(Self {
            exports: Exports::new(Arc::clone(&context)),
            jobs: Jobs::new(Arc::clone(&context)),
            context,
            quit: Quit::default(),
        })
    }
}

/// What a handler gets: what commands work on, the session, and the arguments.
pub(crate) type Handler<A> = fn(&Arc<Services>, &Session, A) -> Reply<Value>;

/// A handler whose command takes its time after what has to be done alone.
pub(crate) type DeferredHandler<A> = fn(&Arc<Services>, A) -> Reply<Deferred>;

/// Commands being put together.
pub(crate) struct Commands<'a> {
    table: &'a mut Table,
    services: Weak<Services>,
}

impl Commands<'_> {
    /// A command that runs alone on the nodes that its arguments name.
    pub(crate) fn add<A: Arguments + 'static>(
        &mut self,
        command: &'static Command,
        handler: Handler<A>,
    ) -> &mut Self {
        let services = Weak::clone(&self.services);
        self.table.command(command, move |session, args| {
            let services = services.upgrade().ok_or_else(gone)?;
            let _nodes = services.context.lock_nodes(args.map(), false);
            handler(&services, session, A::parse(args.map())?)
        });
        self
    }

    /// A command that also changes which exports there are.
    pub(crate) fn add_for_exports<A: Arguments + 'static>(
        &mut self,
        command: &'static Command,
        handler: Handler<A>,
    ) -> &mut Self {
        let services = Weak::clone(&self.services);
        self.table.command(command, move |session, args| {
            let services = services.upgrade().ok_or_else(gone)?;
            let _nodes = services.context.lock_nodes(args.map(), true);
            handler(&services, session, A::parse(args.map())?)
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
        let services = Weak::clone(&self.services);
        self.table.command(command, move |_, args| {
            let services = services.upgrade().ok_or_else(gone)?;
            let nodes = services.context.lock_nodes(args.map(), exports);
            let rest = handler(&services, A::parse(args.map())?);
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
        let services = Weak::clone(&self.services);
        self.table.command(command, move |session, args| {
            let services = services.upgrade().ok_or_else(gone)?;
            handler(&services, session, A::parse(args.map())?)
        });
        self
    }
}

fn gone() -> QmpError {
    QmpError::generic("The daemon is ending")
}

/// A table without commands of ours.
fn empty_table() -> Table {
    let (major, minor, micro) = SPOKEN;
    Table::new(Version::new(major, minor, micro, concat!("blockmirror ", env!("CARGO_PKG_VERSION"))))
}

/// All commands and events.
pub(crate) fn table(services: &Arc<Services>) -> Table {
    let mut table = empty_table();
    table.check_answers(cfg!(test));
    for event in EVENTS {
        table.event(event);
    }
    let mut commands = Commands { table: &mut table, services: Arc::downgrade(services) };
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
    internal_snapshot::register(&mut commands);
    chain::register(&mut commands);
    drive_mirror::register(&mut commands);
    hmp::register(&mut commands);
    reopen::register(&mut commands);
    table
}
