//! Limits of a command on images from strangers: `--limits`.

use std::str::FromStr;

use blockmirror_block::size::parse_size;
use clap::Args;

/// What a command on such images may take. The default is that of `untrusted`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Images of a chain.
    pub(crate) depth: u32,
    /// Bytes of a disk.
    pub(crate) size: u64,
    /// Bytes of memory.
    pub(crate) memory: u64,
    /// Seconds of processor time.
    pub(crate) time: u64,
    /// Whether the process is confined.
    pub(crate) sandbox: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { depth: 8, size: 64 << 40, memory: 1 << 30, time: 3600, sandbox: true }
    }
}

impl FromStr for Limits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        if parts.next() != Some("untrusted") {
            return Err(format!("\"{text}\": it begins with untrusted"));
        }
        let mut limits = Self::default();
        for part in parts {
            let wrong = |why: &str| format!("\"{part}\": {why}");
            let Some((key, value)) = part.split_once('=') else {
                match part {
                    "no-sandbox" => limits.sandbox = false,
                    _ => {
                        return Err(wrong(
                            "depth=N, size=SIZE, memory=SIZE, time=SECONDS or no-sandbox is expected",
                        ));
                    }
                }
                continue;
            };
            let bytes = || parse_size(value).map_err(|error| wrong(&error.to_string()));
            let number =
                || value.parse().ok().filter(|number| *number > 0).ok_or_else(|| wrong("a number from 1 on"));
            match key {
                "depth" => limits.depth = number()?,
                "size" => limits.size = bytes()?,
                "memory" => limits.memory = bytes()?,
                "time" => limits.time = number()?.into(),
                _ => return Err(wrong("there are depth, size, memory and time")),
            }
        }
        Ok(limits)
    }
}

/// The limits that a command has.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct LimitsArgs {
    /// For images from strangers. `untrusted`: they name files below --allow-backing alone, a chain has 8
    /// images, a disk 64 TiB, the command 1 GiB of memory and 3600 s of processor time, and a sandbox
    /// (Landlock, seccomp) leaves it the files that are named here. `untrusted,size=1T,time=60` sets other
    /// figures (depth, size, memory, time); `untrusted,no-sandbox` is for NBD, and for kernels without one
    #[arg(long, value_name = "untrusted[,KEY=VALUE..]", help_heading = "Limits")]
    pub(crate) limits: Option<Limits>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn limits_are_read() {
        assert_eq!("untrusted".parse(), Ok(Limits::default()));
        let all = "untrusted,depth=2,size=1T,memory=256M,time=60,no-sandbox".parse();
        let want = Limits { depth: 2, size: 1 << 40, memory: 256 << 20, time: 60, sandbox: false };
        assert_eq!(all, Ok(want));
        for wrong in
            ["", "trusted", "depth=2", "untrusted,", "untrusted,depth", "untrusted,depth=0", "untrusted,x=1"]
        {
            assert!(wrong.parse::<Limits>().is_err(), "{wrong}");
        }
        assert!("untrusted,time=-1".parse::<Limits>().is_err());
        assert!("untrusted,size=big".parse::<Limits>().is_err());
    }

    /// The help has the figures.
    #[test]
    fn the_help_says_what_the_defaults_are() {
        use clap::CommandFactory;
        let mut definition = crate::args::Cli::command();
        let check = definition.find_subcommand_mut("check").unwrap();
        let help = check.get_arguments().find(|argument| argument.get_id() == "limits").unwrap();
        let help = help.get_help().unwrap().to_string();
        let Limits { depth, size, memory, time, .. } = Limits::default();
        let figures = [
            format!("a chain has {depth} images"),
            format!("a disk {} TiB", size >> 40),
            format!("{} GiB of memory", memory >> 30),
            format!("{time} s of processor time"),
        ];
        for figure in figures {
            assert!(help.replace('\n', " ").contains(&figure), "{figure}: {help}");
        }
    }
}
