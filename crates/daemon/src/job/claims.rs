//! Block devices that jobs write are claimed while they do: one that is mounted, or that another device
//! stands on, is not overwritten, nor is a file below a loop device that is. Called where a mirror, a commit
//! or a `blockdev-create` starts.
//!
//! What must hold: a job claims what it fills, and nothing else does: not the nodes of guests, not the
//! sources of jobs. A claim lasts no longer than its job. Devices are not opened under the graph lock.

use std::sync::Arc;

use blockmirror_file::FileStorage;

use crate::Reply;
use crate::context::Context;
use crate::errors::qmp_error;

/// Block devices that are claimed until this is dropped.
#[derive(Debug, Default)]
#[must_use = "dropping it gives the claims up"]
pub(crate) struct Claims(Vec<Arc<FileStorage>>);

impl Claims {
    /// Claims the block devices that the node `name` lives in, backing files aside; of files it is checked
    /// that no loop device on them is in use.
    ///
    /// # Errors
    /// One of them is in use; none is claimed then.
    pub(crate) fn of_node(context: &Context, name: &str) -> Reply<Self> {
        let files: Vec<_> =
            context.graph.lock().lives_in(name).into_iter().filter_map(|node| node.file.clone()).collect();
        let mut claims = Self::default();
        for file in files {
            file.claim().map_err(qmp_error)?;
            claims.0.push(file);
        }
        Ok(claims)
    }
}

impl Drop for Claims {
    fn drop(&mut self) {
        self.0.iter().for_each(|file| file.unclaim());
    }
}
