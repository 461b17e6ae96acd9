//! The command line of `blockmirror bitmap`. Its actions are done in the order in which they are given, so
//! they are read from the places of the options.

use std::path::PathBuf;

use blockmirror_image::{BitmapAction, BitmapOptions, Format, NodeOptions};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Args, FromArgMatches};

use super::{LockArgs, size};

pub(super) const BITMAP_EXAMPLES: &str = "\
Examples:
  blockmirror bitmap --add disk.qcow2 backup-1
  blockmirror bitmap --add -g 4K --disable disk.qcow2 backup-2
  blockmirror bitmap --clear --merge backup-1 disk.qcow2 backup-2
  blockmirror bitmap --merge backup-1 -b overlay.qcow2 -F qcow2 disk.qcow2 backup-1
  blockmirror bitmap --remove disk.qcow2 backup-1";

#[derive(Debug, Args)]
#[command(override_usage = "blockmirror bitmap <ACTION>... [OPTIONS] <FILE> <BITMAP>")]
pub(crate) struct BitmapArgs {
    #[command(flatten)]
    pub(crate) actions: Actions,

    /// The image, which must not be in use
    pub(crate) file: PathBuf,

    /// What its name says besides path and format.
    #[arg(skip)]
    pub(crate) node: NodeOptions,

    /// The name of the bitmap
    pub(crate) bitmap: String,

    /// Format of the image, raw or qcow2; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// The image that has the bitmaps to merge; by default the same image
    #[arg(short = 'b', long, value_name = "FILE", requires = "merge")]
    pub(crate) source_file: Option<PathBuf>,

    /// The same of `source_file`.
    #[arg(skip)]
    pub(crate) source_node: NodeOptions,

    /// Format of that image; detected if omitted
    #[arg(short = 'F', long, value_name = "FMT", requires = "source_file")]
    pub(crate) source_format: Option<Format>,

    #[command(flatten)]
    pub(crate) lock: LockArgs,

    /// Treat the image's name as options: driver=FORMAT,file.filename=PATH
    #[arg(long)]
    pub(crate) image_opts: bool,

    /// Write to a block device that is mounted or in use
    #[arg(long)]
    pub(crate) force: bool,

    /// Also open backing and data files in or below this directory; so does BLOCKMIRROR_ALLOW_BACKING, for
    /// backing files
    #[arg(long, value_name = "DIR")]
    pub(crate) allow_backing: Vec<PathBuf>,
}

/// What is to be done, in the order of the command line.
#[derive(Clone, Debug, Default)]
pub(crate) struct Actions(pub(crate) Vec<BitmapAction>);

/// The options that are actions without a value, and their help.
const PLAIN: [(&str, &str); 5] = [
    ("add", "Make the bitmap, with no bit set"),
    ("remove", "Remove the bitmap"),
    ("clear", "Clear all bits"),
    ("enable", "Record what is written from now on"),
    ("disable", "Record nothing any more; the bits are kept"),
];

impl Args for Actions {
    fn augment_args(command: clap::Command) -> clap::Command {
        let plain = |(name, help): (&'static str, &'static str)| {
            // Each occurrence has a place.
            let arg = Arg::new(name).long(name).help(help).action(ArgAction::Append).num_args(0);
            arg.default_missing_value("true").value_parser(clap::value_parser!(bool))
        };
        let merge = Arg::new("merge").long("merge").value_name("BITMAP").action(ArgAction::Append);
        let granularity = Arg::new("granularity").short('g').long("granularity").value_name("SIZE");
        let granularity = granularity.value_parser(size).requires("add");
        let names = PLAIN.iter().map(|(name, _)| *name).chain(["merge"]);
        command
            .args(PLAIN.map(plain))
            .arg(merge.help("Set the bits that are set in that bitmap"))
            .arg(granularity.help(
                "With --add: bytes per bit, a power of two from 512 to 2G [default: the cluster size, between 4K \
                 and 64K]",
            ))
            .group(ArgGroup::new("action").args(names).multiple(true).required(true))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut options = BitmapOptions::new();
        if let Some(granularity) = matches.get_one::<u64>("granularity") {
            options = options.granularity(*granularity);
        }
        let mut found = Vec::new();
        for (name, _) in PLAIN {
            let action = match name {
                "add" => BitmapAction::Add(options),
                "remove" => BitmapAction::Remove,
                "clear" => BitmapAction::Clear,
                "enable" => BitmapAction::Enable,
                "disable" => BitmapAction::Disable,
                other => return Err(clap::Error::raw(ErrorKind::UnknownArgument, other)),
            };
            let given = matches.value_source(name) == Some(ValueSource::CommandLine);
            let places = matches.indices_of(name).filter(|_| given).into_iter().flatten();
            found.extend(places.map(|place| (place, action.clone())));
        }
        let sources = matches.get_many::<String>("merge").into_iter().flatten();
        let places = matches.indices_of("merge").into_iter().flatten();
        found.extend(places.zip(sources.map(|source| BitmapAction::Merge(source.clone()))));
        found.sort_by_key(|(place, _)| *place);
        Ok(Self(found.into_iter().map(|(_, action)| action).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Cli, Command};
    use super::*;

    #[test]
    fn actions_keep_their_order() {
        let line = "blockmirror bitmap --clear --merge a -g 4K --add --merge b --clear disk b0";
        let Command::Bitmap(args) = Cli::parse_from(line.split(' ')).command else { panic!("not bitmap") };
        let merge = |name: &str| BitmapAction::Merge(name.to_owned());
        let add = BitmapAction::Add(BitmapOptions::new().granularity(4096));
        let expected = [BitmapAction::Clear, merge("a"), add, merge("b"), BitmapAction::Clear];
        assert_eq!(args.actions.0, expected);
        assert_eq!((args.file.to_str(), args.bitmap.as_str()), (Some("disk"), "b0"));
    }
}
