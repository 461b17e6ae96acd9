//! Damaged qcow2 images, for `cargo xtask fuzz`: for the program of this package, and for the comparison with
//! `qemu-img` in `xtask/product/`.

pub mod corpus;
