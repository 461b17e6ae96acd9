//! What a node remembers of its file: the host's last answer. Leaf; asked by [`super::host_size`].

use blockmirror_block::sync::Mutex;

/// What is known of a node's file.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HostSize {
    /// Its length in bytes, where the node is a file.
    pub(crate) len: Option<u64>,
    /// Bytes that it occupies, where the host can tell.
    pub(crate) allocated: Option<u64>,
}

/// What a node remembers of its file.
///
/// *Guards*: the last answer, and whether a thread waits for the next. *Order*: leaf. *Not under it*: I/O.
#[derive(Debug, Default)]
pub(crate) struct HostSizeCell(Mutex<(HostSize, bool)>);

impl HostSizeCell {
    /// The last answer.
    pub(crate) fn known(&self) -> HostSize {
        self.0.lock().0
    }

    /// Asks the host by `ask`, under no lock, unless another thread does.
    pub(super) fn ask(&self, ask: impl FnOnce() -> HostSize) {
        {
            let mut state = self.0.lock();
            if state.1 {
                return;
            }
            state.1 = true;
        }
        let answer = ask();
        *self.0.lock() = (answer, false);
    }
}
