//! Files that were written in nodes which are closed by now, or without a node: a log that an earlier process
//! has left does not know of it. Filled when nodes are closed and images made, asked when a log is attached.

use std::collections::BTreeSet;
use std::path::Path;

use blockmirror_block::sync::Mutex;
use blockmirror_file::{FileId, FileStorage};

use crate::graph::Node;

/// What a node is, as long as the process lives: its file, or what it is called in answers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place(String);

impl Place {
    /// That of a node with this `file` or `filename`.
    pub(crate) fn of(file: Option<&FileStorage>, filename: &str) -> Self {
        Self(file.map_or_else(|| filename.to_owned(), |file| format!("{:?}", file.id())))
    }
}

/// *Guards* which places were written. *Order*: leaf. *Not under it*: I/O.
#[derive(Debug, Default)]
pub(crate) struct WrittenPlaces(Mutex<BTreeSet<Place>>);

impl WrittenPlaces {
    /// `nodes` are about to be closed.
    pub(crate) fn note_closed(&self, nodes: &[Node]) {
        for node in nodes.iter().filter(|node| node.device.was_written()) {
            let own = Place::of(node.file.as_deref(), &node.filename);
            self.0.lock().insert(own);
            if let Some(path) = &node.path {
                self.note_path(path);
            }
        }
    }

    /// What is at `path` is written without a node.
    pub(crate) fn note_path(&self, path: &Path) {
        if let Some(id) = FileId::of(path) {
            self.0.lock().insert(Place(format!("{id:?}")));
        }
    }

    /// Whether `place` was written.
    pub(crate) fn has(&self, place: &Place) -> bool {
        self.0.lock().contains(place)
    }
}
