//! Whether a copy shares blocks with its source: an option of `blockmirror mirror` and `blockmirror convert`.

use blockmirror_mirror::Reflink;
use clap::{Args, ValueEnum};

use crate::failure::{Failure, Outcome};

#[derive(Debug, Args)]
pub(crate) struct ReflinkArgs {
    /// Share blocks with the source's files in place of copying, where both lie in one file system that can
    /// do that; zeros that were written are shared, too
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto", help_heading = "Copying")]
    reflink: When,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum When {
    /// what can be shared is; with -S, --verify=hash or readback, or a target that is to be
    /// preallocated, nothing is
    Auto,
    /// what can be shared is; a target that can share nothing at all is refused; not with -S, nor with
    /// --verify=hash or readback
    Always,
    /// nothing is shared
    Never,
}

impl ReflinkArgs {
    /// What to do; `seeks_zeros`: -S was given, so that nothing may be shared that has not been searched.
    pub(crate) fn choice(&self, seeks_zeros: bool) -> Outcome<Reflink> {
        match self.reflink {
            When::Always if seeks_zeros => Err(Failure::usage(
                "--reflink=always: cannot be combined with -S, which searches what is copied",
            )),
            When::Auto if seeks_zeros => Ok(Reflink::Never),
            When::Auto => Ok(Reflink::Auto),
            When::Always => Ok(Reflink::Always),
            When::Never => Ok(Reflink::Never),
        }
    }
}
