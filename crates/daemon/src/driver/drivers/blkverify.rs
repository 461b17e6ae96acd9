//! `blkverify`: compares a disk with a raw one.

use std::sync::Arc;

use blockmirror_filter::Blkverify;

use super::Driver;
use super::schema::NodeRef;
use crate::Reply;
use crate::arguments::arguments;
use crate::driver::{Opened, Opening};
use crate::errors::qmp_error;
use crate::graph::Kind;

arguments! {
    pub(super) struct BlkverifyArgs(
        "BlockdevOptionsBlkverify",
        "Compares a disk with a raw one.",
        differs "a difference fails the read (QEMU ends); the two have the same length"
    ) {
        test: NodeRef = "test", "the node under test";
        raw: NodeRef = "raw", "the node to compare it with";
    }
}

/// Compares a disk with a raw one.
pub(super) struct BlkverifyDriver;

impl Driver for BlkverifyDriver {
    const NAME: &'static str = "blkverify";
    const DOC: &'static str = "compares a disk with a raw one";
    const REOPENS: bool = false;
    type Options = BlkverifyArgs;

    fn kind(_: bool) -> Kind {
        Kind::Filter
    }

    fn open(opening: &mut Opening<'_>, options: BlkverifyArgs) -> Reply<Opened> {
        let raw = opening.child(&options.raw, opening.common.for_file())?;
        let test = opening.child(&options.test, opening.common.for_file())?;
        let read_only = opening.common.read_only || raw.read_only || test.read_only;
        let (to_raw, to_test) = (raw.below_filter(), test.below_filter());
        let device = Blkverify::new(Arc::clone(&to_test) as _, Arc::clone(&to_raw) as _);
        let device = Arc::new(device.map_err(qmp_error)?);
        // The raw one first: it is what this is a filter on.
        let children =
            vec![raw.filter_link("raw", read_only, &to_raw), test.filter_link("test", read_only, &to_test)];
        let filename = format!("blkverify:{}:{}", raw.filename, test.filename);
        Ok(Opened { read_only, children, ..Opened::leaf(device, filename) })
    }
}
