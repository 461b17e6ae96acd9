//! What is done to an image: guest requests and commands, in an order, in the words of `qemu-img`.

/// A request of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    /// This byte.
    Write(u8),
    /// The same in compressed clusters.
    Compressed(u8),
    Zero,
    Unmap,
    Discard,
}

/// Where it goes, in clusters of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Across,
    Clusters,
    Gap,
    Part,
    Disk,
}

/// The bytes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) at: u64,
    pub(super) len: u64,
}

/// One thing that is done.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Guest(Verb, Place),
    /// The words after `qemu-img`, separated by spaces. `''` is an empty one.
    Command(&'static str),
    /// The same; what it prints is JSON, equal for both but for what the host's file system takes.
    Look(&'static str),
}

/// Steps with a name. The first that is refused ends them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    pub(super) name: &'static str,
    pub(super) steps: &'static [Step],
}

use Step::{Command, Guest, Look};

/// An operation of one command, which is its name.
macro_rules! commands {
    ($($words:literal)*) => {
        [$(Operation { name: $words, steps: &[Command($words)] }),*]
    };
}

/// Guest requests.
const REQUESTS: [Operation; 12] = [
    Operation { name: "write", steps: &[Guest(Verb::Write(7), Place::Across)] },
    Operation { name: "write clusters", steps: &[Guest(Verb::Write(7), Place::Clusters)] },
    Operation { name: "write a part", steps: &[Guest(Verb::Write(7), Place::Part)] },
    Operation { name: "write everywhere", steps: &[Guest(Verb::Write(7), Place::Disk)] },
    Operation { name: "write compressed", steps: &[Guest(Verb::Compressed(7), Place::Gap)] },
    Operation { name: "zero", steps: &[Guest(Verb::Zero, Place::Across)] },
    Operation { name: "zero a part", steps: &[Guest(Verb::Zero, Place::Part)] },
    Operation { name: "zero with unmap", steps: &[Guest(Verb::Unmap, Place::Across)] },
    Operation { name: "zero everything", steps: &[Guest(Verb::Zero, Place::Disk)] },
    Operation { name: "unmap everything", steps: &[Guest(Verb::Unmap, Place::Disk)] },
    Operation { name: "discard", steps: &[Guest(Verb::Discard, Place::Clusters)] },
    Operation { name: "discard everything", steps: &[Guest(Verb::Discard, Place::Disk)] },
];

/// Single commands.
const COMMANDS: [Operation; 55] = commands! {
    "resize -q -f qcow2 image.qcow2 +1M"
    "resize -q -f qcow2 image.qcow2 +512"
    "resize -q -f qcow2 --preallocation=metadata image.qcow2 +200k"
    "resize -q -f qcow2 --shrink image.qcow2 -300k"
    "resize -q -f qcow2 --shrink image.qcow2 512"
    "resize -q -f qcow2 image.qcow2 -300k"
    "check -q -f qcow2 -r leaks image.qcow2"
    "check -q -f qcow2 -r all image.qcow2"
    "snapshot -c three image.qcow2"
    "snapshot -c one image.qcow2"
    "snapshot -a one image.qcow2"
    "snapshot -a 2 image.qcow2"
    "snapshot -d one image.qcow2"
    "snapshot -d two image.qcow2"
    "snapshot -a missing image.qcow2"
    "snapshot -d missing image.qcow2"
    "bitmap -f qcow2 --add image.qcow2 three"
    "bitmap -f qcow2 --add -g 4k image.qcow2 three"
    "bitmap -f qcow2 --add --disable image.qcow2 three"
    "bitmap -f qcow2 --add image.qcow2 one"
    "bitmap -f qcow2 --remove image.qcow2 one"
    "bitmap -f qcow2 --clear image.qcow2 one"
    "bitmap -f qcow2 --disable image.qcow2 one"
    "bitmap -f qcow2 --enable image.qcow2 two"
    "bitmap -f qcow2 --merge one image.qcow2 two"
    "bitmap -f qcow2 --merge missing image.qcow2 two"
    "bitmap -f qcow2 --add --merge one --merge two --disable image.qcow2 three"
    "commit -q -f qcow2 image.qcow2"
    "commit -q -f qcow2 -d image.qcow2"
    "commit -q -f qcow2 -b base.qcow2 image.qcow2"
    "rebase -q -f qcow2 -b other.qcow2 -F qcow2 image.qcow2"
    "rebase -q -f qcow2 -b '' image.qcow2"
    "rebase -q -f qcow2 -u -b other.qcow2 -F qcow2 image.qcow2"
    "rebase -q -f qcow2 -u -b '' image.qcow2"
    "amend -q -f qcow2 -o compat=0.10 image.qcow2"
    "amend -q -f qcow2 -o compat=1.1 image.qcow2"
    "amend -q -f qcow2 -o compat=1.1,refcount_bits=8 image.qcow2"
    "amend -q -f qcow2 -o lazy_refcounts=on image.qcow2"
    "amend -q -f qcow2 -o lazy_refcounts=off image.qcow2"
    "amend -q -f qcow2 -o refcount_bits=1 image.qcow2"
    "amend -q -f qcow2 -o refcount_bits=2 image.qcow2"
    "amend -q -f qcow2 -o refcount_bits=16 image.qcow2"
    "amend -q -f qcow2 -o refcount_bits=64 image.qcow2"
    "amend -q -f qcow2 -o size=10M image.qcow2"
    "amend -q -f qcow2 -o size=700k image.qcow2"
    "amend -q -f qcow2 -o data_file_raw=on image.qcow2"
    "amend -q -f qcow2 -o data_file_raw=off image.qcow2"
    "amend -q -f qcow2 -o data_file=other.raw image.qcow2"
    "amend -q -f qcow2 -o cluster_size=4096 image.qcow2"
    "amend -q -f qcow2 -o backing_file=other.qcow2 image.qcow2"
    "convert -q -f qcow2 -O qcow2 image.qcow2 out.qcow2"
    "convert -q -f qcow2 -O qcow2 -c image.qcow2 out.qcow2"
    "convert -q -f qcow2 -O qcow2 -l one image.qcow2 out.qcow2"
    "convert -q -f qcow2 -O qcow2 --bitmaps image.qcow2 out.qcow2"
    "dd -f qcow2 -O qcow2 bs=4096 skip=3 count=40 if=image.qcow2 of=out.qcow2"
};

/// What reads only.
const LOOKS: [Operation; 3] = [
    Operation { name: "check", steps: &[Look("check -f qcow2 --output=json image.qcow2")] },
    Operation { name: "info", steps: &[Look("info -f qcow2 --output=json image.qcow2")] },
    Operation { name: "measure", steps: &[Look("measure -f qcow2 -O qcow2 --output=json image.qcow2")] },
];

/// What one operation leaves, changed by the next.
const SEQUENCES: [Operation; 12] = [
    Operation {
        name: "snapshot, write, apply, delete",
        steps: &[
            Command("snapshot -c three image.qcow2"),
            Guest(Verb::Write(8), Place::Across),
            Command("snapshot -a three image.qcow2"),
            Guest(Verb::Write(9), Place::Part),
            Command("snapshot -d three image.qcow2"),
        ],
    },
    Operation {
        name: "snapshot, discard, delete, discard",
        steps: &[
            Command("snapshot -c three image.qcow2"),
            Guest(Verb::Discard, Place::Clusters),
            Command("snapshot -d three image.qcow2"),
            Guest(Verb::Discard, Place::Disk),
        ],
    },
    Operation {
        name: "apply, snapshot, write",
        steps: &[
            Command("snapshot -a one image.qcow2"),
            Command("snapshot -c three image.qcow2"),
            Guest(Verb::Write(8), Place::Across),
        ],
    },
    Operation {
        name: "snapshot, resize, write, apply",
        steps: &[
            Command("snapshot -c three image.qcow2"),
            Command("resize -q -f qcow2 image.qcow2 +1M"),
            Guest(Verb::Write(8), Place::Across),
            Command("snapshot -a three image.qcow2"),
        ],
    },
    Operation {
        name: "shrink, write, grow",
        steps: &[
            Command("resize -q -f qcow2 --shrink image.qcow2 -500k"),
            Guest(Verb::Write(8), Place::Across),
            Command("resize -q -f qcow2 image.qcow2 +700k"),
        ],
    },
    Operation {
        name: "add a bitmap, write, disable it, write",
        steps: &[
            Command("bitmap -f qcow2 --add -g 4k image.qcow2 three"),
            Guest(Verb::Write(8), Place::Part),
            Command("bitmap -f qcow2 --disable image.qcow2 three"),
            Guest(Verb::Write(9), Place::Across),
        ],
    },
    Operation {
        name: "zero, discard, write a part",
        steps: &[
            Guest(Verb::Zero, Place::Clusters),
            Guest(Verb::Discard, Place::Gap),
            Guest(Verb::Write(8), Place::Across),
            Guest(Verb::Unmap, Place::Part),
        ],
    },
    Operation {
        name: "amend down, write, amend up, write",
        steps: &[
            Command("amend -q -f qcow2 -o compat=0.10 image.qcow2"),
            Guest(Verb::Write(8), Place::Across),
            Command("amend -q -f qcow2 -o compat=1.1 image.qcow2"),
            Guest(Verb::Unmap, Place::Clusters),
        ],
    },
    Operation {
        name: "snapshot, zero, snapshot, write, amend down",
        steps: &[
            Command("snapshot -c three image.qcow2"),
            Guest(Verb::Zero, Place::Clusters),
            Command("snapshot -c four image.qcow2"),
            Guest(Verb::Write(8), Place::Across),
            Command("amend -q -f qcow2 -o compat=0.10 image.qcow2"),
        ],
    },
    Operation {
        name: "delete a snapshot, write everywhere, amend down",
        steps: &[
            Command("snapshot -d one image.qcow2"),
            Guest(Verb::Write(8), Place::Disk),
            Command("amend -q -f qcow2 -o compat=0.10 image.qcow2"),
        ],
    },
    Operation {
        name: "amend refcounts, snapshot, write",
        steps: &[
            Command("amend -q -f qcow2 -o refcount_bits=4 image.qcow2"),
            Command("snapshot -c three image.qcow2"),
            Guest(Verb::Write(8), Place::Across),
        ],
    },
    Operation {
        name: "write, commit, write",
        steps: &[
            Guest(Verb::Write(8), Place::Across),
            Command("commit -q -f qcow2 image.qcow2"),
            Guest(Verb::Write(9), Place::Part),
        ],
    },
];

/// Every operation.
pub(super) fn operations() -> impl Iterator<Item = Operation> {
    REQUESTS.into_iter().chain(COMMANDS).chain(LOOKS).chain(SEQUENCES)
}
