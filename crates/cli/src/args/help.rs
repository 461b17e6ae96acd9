//! The command line of `blockmirror help`, and the texts on topics.
//!
//! The help of the program ends with some of them ([`after_help`]), so that each text is written once.

use clap::Args;

/// What `blockmirror help` takes.
#[derive(Debug, Args)]
pub(crate) struct HelpArgs {
    /// A command, or a topic: `blockmirror help` lists both
    #[arg(value_name = "COMMAND|TOPIC")]
    pub(crate) subject: Vec<String>,
}

/// A text that concerns several commands.
pub(crate) struct Topic {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) text: &'static str,
}

/// In the order in which they are listed.
pub(crate) const TOPICS: &[Topic] = &[
    Topic { name: "images", about: "how the command line names images", text: IMAGES },
    Topic { name: "granularity", about: "the unit of a copy, and where it comes from", text: GRANULARITY },
    Topic { name: "targets", about: "what becomes of a target that exists", text: TARGETS },
    Topic { name: "resume", about: "copies that go on where they were interrupted", text: RESUME },
    Topic { name: "exit-codes", about: "what the exit code of each command says", text: EXIT_CODES },
    Topic { name: "scripts", about: "JSON, progress, signals and the environment", text: SCRIPTS },
];

pub(crate) const EXIT_CODES: &str = "\
Exit codes:
    0  success (compare: the images are identical)
    1  failure (compare: the images differ; ctl complete, abort, watch: a job did not end as asked)
    2  usage error, nothing was touched (compare: the images could not be compared)
    3  copied, except for failed ranges, which are listed (`ignore`, --salvage; qemu-img: 0)
       check: 0 no errors, 1 not checked, 2 corrupt, 3 leaks only, 63 nothing to check (raw)
    4  refused (inspect: what was found is listed)
    5  copied, but the target differs from the source (--verify): it is kept, the ranges are listed
    6  ended by a signal; what is copied is kept, and the same command goes on there
  141  the reader closed standard output (a copy continues)
128+N  ended by signal N: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP; an unfinished target has
       been removed (ctl: jobs continue; serve and the daemon exit with 0)";

const SCRIPTS: &str = "\
With --output=json an error is one JSON object on a line of standard error: class, message,
exit-code; operation, path, offset and errno where they are known. With --progress=json it is in
the last object on standard error, and no other text is there.

SIGUSR1 makes a copy, a comparison or a check print a line of progress.

Environment:
  RUST_LOG=LEVEL                     log to standard error: error, warn, info, debug or trace;
                                     --log-format=json writes one object a line
  BLOCKMIRROR_ALLOW_BACKING=DIR:..   directories in or below which backing and data files may be
                                     opened for reading, besides that of the image; absolute paths
  NOTIFY_SOCKET                      set by the service manager: readiness and progress go there";

const IMAGES: &str = "\
Sizes take the suffixes K, M, G, T, P and E (or KiB etc.): powers of 1024.

An image is a path or the URI of an NBD export:
  nbd://HOST[:PORT]/EXPORT  nbd+unix:///EXPORT?socket=PATH  and nbds://, nbds+unix:// with TLS,
  with ?tls-certificates=DIR (ca-cert.pem, client-cert.pem, client-key.pem) and &tls-hostname=NAME.
A file with such a name is written ./nbd:... Or it is the command of an NBD server that runs for
this command alone, in brackets that are words of their own:
  [ qemu-nbd -r -f vmdk disk.vmdk ]    [ nbdkit --filter=xz file disk.raw.xz ]
What it serves is raw unless a format is given; a file named [ is written ./[. An existing image
can also be named file:PATH, json:{..} or, with --image-opts, driver=FORMAT,file.filename=PATH.";

const GRANULARITY: &str = "\
A copy moves a disk in units of one size, the granularity. Whatever part of a unit holds data, the
whole unit is copied; a guest write of one byte makes a whole unit dirty.

By default it is the cluster size of the target image, between 4 KiB and 64 KiB, and 64 KiB where
the target has no clusters (raw, NBD). A larger unit would fill clusters that the source never
touched, and the target would need more space than its source. A smaller one costs memory: one bit
for each unit.

--granularity SIZE sets it: a power of two from 512 bytes to 64 MiB. --dry-run prints the one that
a copy would use, and why, and what would be copied.";

const TARGETS: &str = "\
A new image is written to a temporary file beside the target, flushed, and renamed once it is
complete. Until then an existing file keeps its contents; a copy that fails removes the temporary
file. A rename would lose something where the target is a link or has several names, or where its
ownership cannot be kept: such a file is overwritten in place, and a note says so.

  --no-clobber   refuse a target that exists
  --atomic       replace an existing file by a rename, or fail
  --in-place     overwrite an existing file in place; a failure leaves it unusable
  -n             do not create: copy into the image, device or export that is there
  --force        write to a block device that is mounted or in use; overwrite an existing data file
  --clean        remove temporary files that interrupted runs left";

const RESUME: &str = "\
A copy of 10 GiB or more from files to a new file keeps a checkpoint: a log, beside the temporary
file of the target, of the regions that are on stable storage. After a kill, a power cut or Ctrl-C
the same command goes on there. It refuses to if a file of the source has changed since.

  --checkpoint FILE   keep a checkpoint in FILE: for a smaller copy, and for one from or to a block
                      device or an NBD export
  --restart           discard the interrupted copy, and begin anew
  --resume=sample     read one region in a hundred again before going on, where a device or an
                      export takes part (the default)
  --resume=verify     read all that was copied again, from source and target, and compare
  --clean             remove temporary files that interrupted runs left

Exit code 6 says that a signal ended the copy and that the same command goes on.";

/// What the help of the program ends with.
pub(crate) fn after_help() -> String {
    let scripts = SCRIPTS.split("\n\nEnvironment:").next().unwrap_or(SCRIPTS);
    format!(
        "{EXIT_CODES}\n\n{scripts}\n\n{IMAGES}\n\nTopics, for `help TOPIC`: {}.",
        topic_names().join(", ")
    )
}

/// The topic of that name.
pub(crate) fn topic(name: &str) -> Option<&'static Topic> {
    TOPICS.iter().find(|topic| topic.name == name)
}

/// The names of all.
pub(crate) fn topic_names() -> Vec<&'static str> {
    TOPICS.iter().map(|topic| topic.name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_fit_a_terminal_and_are_no_commands() {
        let definition = crate::definition();
        for topic in TOPICS {
            assert!(definition.find_subcommand(topic.name).is_none(), "{}", topic.name);
            for line in topic.text.lines() {
                assert!(line.chars().count() <= super::super::HELP_WIDTH, "{}: {line}", topic.name);
            }
        }
    }
}
