//! Options about copies that are gone on with after an interruption: `mirror`, `convert`.

use std::path::PathBuf;

use blockmirror_ops::DEFAULT_CHECKPOINT_INTERVAL;
use clap::{Args, ValueEnum};

use super::size;

/// Whether and where a copy keeps a checkpoint.
#[derive(Clone, Debug, Args)]
pub(crate) struct CheckpointArgs {
    /// Keep in FILE how far the copy has come: the same command goes on there if it is killed or fails. A
    /// copy of 10G or more from files to a new file does so by itself, beside the temporary file of the
    /// target
    #[arg(long, value_name = "FILE", help_heading = "Interrupted copies")]
    pub(crate) checkpoint: Option<PathBuf>,

    /// Bytes of data between two checkpoints, up to 384M; at most twice as much is copied again [default:
    /// 384M]
    #[arg(long, value_name = "SIZE", value_parser = interval, allow_hyphen_values = true)]
    #[arg(help_heading = "Interrupted copies")]
    pub(crate) checkpoint_interval: Option<u64>,

    /// Discard the interrupted copy that the checkpoint leads to, and begin anew
    #[arg(long, help_heading = "Interrupted copies")]
    pub(crate) restart: bool,

    /// What of an interrupted copy is read again before it goes on: a sample of it where a block device or an
    /// export takes part (default), or all of it. Only the latter is sure to see that one of them was written
    /// meanwhile
    #[arg(long, value_name = "HOW", value_enum, help_heading = "Interrupted copies")]
    pub(crate) resume: Option<ResumeHow>,

    /// There is a checkpoint only where one is named.
    #[arg(skip)]
    pub(crate) only_if_named: bool,
}

/// How an interrupted copy is gone on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ResumeHow {
    /// one region in a hundred is read, if a block device or an export takes part
    Sample,
    /// all that was copied is read from source and target, and compared
    Verify,
}

/// At most what keeps the bound of 1 GiB that is copied again.
fn interval(text: &str) -> Result<u64, String> {
    let bytes = size(text).map_err(|e| e.to_string())?;
    match (1..=DEFAULT_CHECKPOINT_INTERVAL).contains(&bytes) {
        true => Ok(bytes),
        false => Err(format!("\"{text}\": must be between 1 and 384M")),
    }
}
