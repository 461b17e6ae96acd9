//! The command and the image crates, held against QEMU's tools, in one program.

mod as_qemu_img;
mod check;
#[path = "../common/mod.rs"]
mod common;
mod consumer;
mod filters;
mod granularity;
mod locks;
mod no_extra_space;
mod odd_sizes;
mod read_matrix;
mod readme;
mod snapshots;
mod testdata;
mod write_matrix;
