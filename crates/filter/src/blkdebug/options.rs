//! What blkdebug can be asked to do, and which of it makes sense.

use std::io;

use super::event::{Event, IoType};

/// Rules of one node.
pub const MAX_RULES: usize = 4096;
/// Alignments and sizes are below this.
const MAX_UNIT: u64 = 1 << 31;

/// Fails a request after an event. QEMU's `inject-error`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InjectError {
    /// What arms the rule.
    pub event: Event,
    /// The state in which it does; `None` and 0 are any.
    pub state: Option<i32>,
    /// The kind of request that fails; `None` is any but queries of extents.
    pub iotype: Option<IoType>,
    /// The system error it fails with. 0 fails nothing.
    pub errno: i32,
    /// Only requests that touch this sector of 512 bytes.
    pub sector: Option<u64>,
    /// Whether the rule is gone after it has failed one.
    pub once: bool,
    /// QEMU fails at once rather than a little later. Here every failure is at once.
    pub immediately: bool,
}

impl InjectError {
    /// Fails with an I/O error whatever comes after `event`.
    pub const fn new(event: Event) -> Self {
        Self { event, state: None, iotype: None, errno: 5, sector: None, once: false, immediately: false }
    }
}

/// Changes the state at an event. QEMU's `set-state`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetState {
    /// The event.
    pub event: Event,
    /// The state in which it matters; `None` and 0 are any.
    pub state: Option<i32>,
    /// The state afterwards. A node begins in state 1.
    pub new_state: i32,
}

/// The options of a node. Sizes of 0 mean that there is no such limit.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct BlkdebugOptions {
    /// Rules that fail requests.
    pub inject_error: Vec<InjectError>,
    /// Rules that change the state.
    pub set_state: Vec<SetState>,
    /// The alignment that is asked of requests; a power of two.
    pub align: u64,
    /// The largest request that is passed on; larger ones are cut.
    pub max_transfer: u64,
    /// Only zeroing aligned to this is passed on as such; the rest is written.
    pub opt_write_zero: u64,
    /// The longest zeroing that is passed on; longer ones are cut.
    pub max_write_zero: u64,
    /// Only discards aligned to this are passed on.
    pub opt_discard: u64,
    /// The longest discard that is passed on; longer ones are cut.
    pub max_discard: u64,
}

/// Why options are refused. Texts are those scripts know from QEMU, where it has one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlkdebugError {
    /// The file of rules cannot be read.
    #[error("Could not read blkdebug config file: {0}")]
    Read(io::Error),
    /// The file is not one of rules.
    #[error("{0}")]
    Config(String),
    /// A size that does not fit the others.
    #[error("Cannot meet constraints with {option} {value}")]
    Constraint {
        /// The option.
        option: &'static str,
        /// Its value.
        value: u64,
    },
    /// More than [`MAX_RULES`] rules.
    #[error("{count} rules are more than the {MAX_RULES} allowed")]
    TooManyRules {
        /// How many.
        count: usize,
    },
}

impl BlkdebugOptions {
    /// Tests the options on a child whose requests are best aligned to `request_alignment`.
    ///
    /// # Errors
    /// Sizes that contradict each other; too many rules.
    pub fn check(&self, request_alignment: u32) -> Result<(), BlkdebugError> {
        let count = self.inject_error.len() + self.set_state.len();
        if count > MAX_RULES {
            return Err(BlkdebugError::TooManyRules { count });
        }
        if self.align >= MAX_UNIT || (self.align != 0 && !self.align.is_power_of_two()) {
            return Err(BlkdebugError::Constraint { option: "align", value: self.align });
        }
        let align = self.align.max(request_alignment.into()).max(1);
        for (option, value, unit) in [
            ("max-transfer", self.max_transfer, align),
            ("opt-write-zero", self.opt_write_zero, align),
            ("max-write-zero", self.max_write_zero, align.max(self.opt_write_zero)),
            ("opt-discard", self.opt_discard, align),
            ("max-discard", self.max_discard, align.max(self.opt_discard)),
        ] {
            if value >= MAX_UNIT || !value.is_multiple_of(unit) {
                return Err(BlkdebugError::Constraint { option, value });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_to_fit_each_other() {
        let none = BlkdebugOptions::default();
        none.check(512).unwrap();
        for (options, alignment, why) in [
            (BlkdebugOptions { align: 100, ..none.clone() }, 1, "align 100"),
            (BlkdebugOptions { align: 1 << 32, ..none.clone() }, 1, "align 4294967296"),
            (BlkdebugOptions { align: 512, max_transfer: 1000, ..none.clone() }, 1, "max-transfer 1000"),
            (BlkdebugOptions { opt_discard: 100, ..none.clone() }, 512, "opt-discard 100"),
            (
                BlkdebugOptions { opt_write_zero: 4096, max_write_zero: 6144, ..none.clone() },
                1,
                "max-write-zero 6144",
            ),
        ] {
            let error = options.check(alignment).unwrap_err().to_string();
            assert_eq!(error, format!("Cannot meet constraints with {why}"));
        }
        BlkdebugOptions { opt_discard: 100, max_discard: 300, ..none }.check(1).unwrap();
    }
}
