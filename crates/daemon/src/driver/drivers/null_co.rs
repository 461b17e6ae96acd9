//! `null-co`: a disk without bytes.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_filter::{DEFAULT_NULL_SIZE, NullDisk};
use blockmirror_qmp::QmpError;

use super::Driver;
use crate::Reply;
use crate::arguments::arguments;
use crate::driver::{Opened, Opening};
use crate::graph::Kind;

arguments! {
    pub(super) struct NullArgs("BlockdevOptionsNull", "Nothing.") {
        size: Option<i64> = "size", "length in bytes" [default "1 GiB"];
        latency_ns: Option<u64> = "latency-ns", "how long each request takes" [default "0"];
        read_zeroes: Option<bool> = "read-zeroes", "whether reads give zeros" [default "false"];
    }
}

/// Nothing: reads are zeros or undefined, writes vanish.
pub(super) struct NullCo;

impl Driver for NullCo {
    const NAME: &'static str = "null-co";
    const DOC: &'static str = "nothing: reads are zeros or undefined, writes vanish";
    type Options = NullArgs;

    fn kind(_: bool) -> Kind {
        Kind::Protocol
    }

    fn open(_: &mut Opening<'_>, options: NullArgs) -> Reply<Opened> {
        let size = options.size.map_or(Ok(DEFAULT_NULL_SIZE), u64::try_from);
        let size = size.map_err(|_| QmpError::generic("Invalid size"))?;
        let disk = NullDisk::new(size)
            .latency(Duration::from_nanos(options.latency_ns.unwrap_or(0)))
            .read_zeroes(options.read_zeroes.unwrap_or(false));
        Ok(Opened::leaf(Arc::new(disk), "null-co://".to_owned()))
    }
}
