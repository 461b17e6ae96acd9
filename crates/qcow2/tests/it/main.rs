//! The integration tests of this crate, in one program.

mod amend;
mod backing;
mod check;
mod check_bounds;
mod common;
mod compressed;
mod copy_up;
mod create;
mod cut_short;
mod dirty_bit;
mod empty;
mod fault;
mod header;
mod hostile;
mod late_writes;
mod model;
mod overlap;
mod overwrite;
mod qemu;
mod raw_image;
mod regressions;
mod repair;
mod resize;
mod shrink_again;
mod stress;
mod tables;
