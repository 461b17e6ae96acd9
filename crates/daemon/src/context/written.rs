//! Files that were written in nodes which are closed by now: a log that an earlier process has left does not
//! know of it. Filled when nodes are closed, asked when a log is attached.

use std::collections::BTreeMap;

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

/// *Guards* which places were written, each with the log that knows of it, if one does. *Order*: leaf. *Not
/// under it*: I/O.
#[derive(Debug, Default)]
pub(crate) struct WrittenPlaces(Mutex<BTreeMap<Place, Option<String>>>);

impl WrittenPlaces {
    /// `nodes` are about to be closed.
    pub(crate) fn note_closed(&self, nodes: &[Node]) {
        for node in nodes.iter().filter(|node| node.device.was_written()) {
            let log = node.device.watch().armed_for().or_else(|| node.tap.log_name());
            let log = log.filter(|_| !node.device.watch().was_rewritten());
            let file = node.path.as_ref().and_then(FileId::of).map(|id| Place(format!("{id:?}")));
            let own = Place::of(node.file.as_deref(), &node.filename);
            let mut places = self.0.lock();
            for place in file.into_iter().chain([own]) {
                // What one log knows, another does not.
                let known = places.entry(place).or_insert_with(|| log.clone());
                if *known != log {
                    *known = None;
                }
            }
        }
    }

    /// Whether `place` was written, and the log `name` does not know of it.
    pub(crate) fn is_unknown_to(&self, name: &str, place: &Place) -> bool {
        self.0.lock().get(place).is_some_and(|log| log.as_deref() != Some(name))
    }
}
