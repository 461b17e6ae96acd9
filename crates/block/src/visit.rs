//! The answer of a visitor, to devices and storages that hand out extents.

use std::ops::ControlFlow;

/// What a visitor of extents answers: go on, or stop here.
pub type Visit = ControlFlow<()>;
