//! `copy-on-read`: what is read from the layers below stays in the image.

use std::sync::Arc;

use blockmirror_filter::CopyOnRead;

use super::Driver;
use super::schema::NodeRef;
use crate::Reply;
use crate::arguments::arguments;
use crate::driver::{Opened, Opening};
use crate::errors::{is_read_only, refuse};
use crate::graph::Kind;

arguments! {
    pub(super) struct CopyOnReadArgs("BlockdevOptionsCor", "Copies up what is read.") {
        file: NodeRef = "file", "the node";
        bottom: Option<String> = "bottom", "refused";
    }
}

/// Copies up what is read.
pub(super) struct CopyOnReadDriver;

impl Driver for CopyOnReadDriver {
    const NAME: &'static str = "copy-on-read";
    const DOC: &'static str = "copies up what is read, before another node";
    const REOPENS: bool = false;
    const WRITES_ON_READ: bool = true;
    type Options = CopyOnReadArgs;

    fn kind(_: bool) -> Kind {
        Kind::Filter
    }

    fn open(opening: &mut Opening<'_>, options: CopyOnReadArgs) -> Reply<Opened> {
        refuse(options.bottom.is_some(), "copy-on-read", "bottom")?;
        let file = opening.child(&options.file, opening.common.for_file())?;
        if file.read_only {
            return Err(is_read_only());
        }
        let read_only = opening.common.read_only;
        let link = file.below_filter();
        let device = Arc::new(CopyOnRead::new(Arc::clone(&link) as _));
        let children = vec![file.filter_link("file", false, &link)];
        Ok(Opened { path: file.path, read_only, children, ..Opened::leaf(device, file.filename) })
    }
}
