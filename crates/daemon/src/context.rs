//! What jobs, exports and commands share: the graph with its objects and locks, which files may be opened,
//! and where events go. It knows nothing of what uses it; drivers open nodes in it.

mod lengths;
mod nodes;
mod written;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use blockmirror_image::{Format, ReferencePolicy, check_backing, directory_of, join_name};
use blockmirror_qmp::QmpError;
use serde_json::{Map, Value};

pub(crate) use written::{Place, WrittenPlaces};

use crate::Reply;
use crate::errors::qmp_error;
use crate::events::Events;
use crate::exported_bitmaps::ExportedBitmaps;
use crate::graph::Graph;
use crate::locks::{CommandLocks, LockedNodes};
use crate::object::Objects;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Context {
    /// Which nodes commands work on.
    pub(crate) locks: CommandLocks,
    pub(crate) objects: Objects,
    pub(crate) graph: Mutex<Graph>,
    pub(crate) exported_bitmaps: ExportedBitmaps,
    pub(crate) events: Events,
    pub(crate) written: Arc<WrittenPlaces>,
    /// Directories whose files images may refer to, beside their own.
    allowed: Vec<PathBuf>,
    /// The same, but not for data files, which may be written to.
    readable: Vec<PathBuf>,
}

impl Context {
    /// One with nothing in it.
    pub(crate) fn new(allowed: Vec<PathBuf>, readable: Vec<PathBuf>) -> Arc<Self> {
        Arc::new(Self {
            locks: CommandLocks::default(),
            objects: Objects::default(),
            graph: Mutex::default(),
            exported_bitmaps: ExportedBitmaps::default(),
            events: Events::default(),
            written: Arc::default(),
            allowed,
            readable,
        })
    }

    /// Locks the nodes that the arguments of a command name, with what they are connected to, and if asked
    /// for the exports.
    pub(crate) fn lock_nodes(&self, args: &Map<String, Value>, exports: bool) -> LockedNodes<'_> {
        self.locks.lock(&self.graph, args, exports)
    }

    /// Which files that the image at `path` names may be opened.
    pub(crate) fn policy_for(&self, path: &Path) -> Reply<ReferencePolicy> {
        let failed = |directory: &Path, e| QmpError::generic(format!("{}: {e}", directory.display()));
        let mut policy = ReferencePolicy::beside(path).map_err(|e| failed(path, e))?;
        for directory in &self.allowed {
            policy.allow_dir(directory).map_err(|e| failed(directory, e))?;
        }
        for directory in &self.readable {
            policy.allow_dir_to_read(directory).map_err(|e| failed(directory, e))?;
        }
        Ok(policy)
    }

    /// Refuses `backing` as the name of the backing file in the header of `image` if the chain would come
    /// back to the image, or to its data file `data`, or be too deep. A name that leads nowhere may stand
    /// there.
    pub(crate) fn check_backing(
        &self,
        image: &Path,
        data: Option<&Path>,
        backing: &str,
        format: Option<Format>,
    ) -> Reply<()> {
        let Some(backing) = join_name(image, backing.as_ref()) else { return Ok(()) };
        if !directory_of(&backing).is_dir() {
            return Ok(());
        }
        check_backing(image, data, &backing, format, &self.policy_for(&backing)?).map_err(qmp_error)
    }
}
