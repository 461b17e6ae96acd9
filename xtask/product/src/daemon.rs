//! `cargo xtask daemon` and `check`: the same as the commands of `blockmirror`, for the benchmark, which
//! starts this very program.

use std::ffi::OsString;
use std::process::ExitCode;

use blockmirror_testing::Outcome;

use crate::Task;

/// Run `blockmirror daemon`
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct DaemonTask {
    /// What `blockmirror daemon` takes
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

impl Task for DaemonTask {
    fn run(self) -> Outcome<ExitCode> {
        let words = ["blockmirror", "daemon"].map(OsString::from);
        Ok(blockmirror_cli::run_here(words.into_iter().chain(self.args)))
    }
}

/// Run `blockmirror check`
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct CheckTask {
    /// What `blockmirror check` takes
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

impl Task for CheckTask {
    fn run(self) -> Outcome<ExitCode> {
        let words = ["blockmirror", "check"].map(OsString::from);
        Ok(blockmirror_cli::run_here(words.into_iter().chain(self.args)))
    }
}
