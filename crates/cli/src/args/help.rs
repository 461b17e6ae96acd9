//! The command line of `blockmirror help`.

use clap::Args;

/// What `blockmirror help` takes.
#[derive(Debug, Args)]
pub(crate) struct HelpArgs {
    /// A command, or a topic: `blockmirror help` lists both
    #[arg(value_name = "COMMAND|TOPIC")]
    pub(crate) subject: Vec<String>,
}
