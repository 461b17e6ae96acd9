//! Where QEMU and ours differ and QEMU is wrong, or does less: each with a name, and how to see it.
//!
//! A difference that is none of these makes a cell wrong. The task counts each, and names those that no cell
//! has shown, so that the table stays true.

use super::judge::{Difference, Kind};
use super::shape::{Compression, Shape, Snapshots};
use super::step::{Operation, Step};

/// A fault of QEMU's tools.
pub(super) struct Fault {
    pub(super) name: &'static str,
    /// Commands that show it.
    pub(super) how_to_see_it: &'static str,
    kinds: &'static [Kind],
    /// Whether it shows in a cell, which both programs have refused if that is set.
    shows: fn(&Shape, &Operation, bool) -> bool,
}

/// All that are known, of QEMU 10.0.
pub(super) const FAULTS: [Fault; 15] = [
    Fault {
        name: "amend to version 2 loses the bitmaps of the image, whose clusters leak",
        how_to_see_it: "bitmap --add a.qcow2 one; amend -o compat=0.10 a.qcow2; check a.qcow2",
        kinds: &[Kind::RefusedHere],
        shows: |shape, operation, _| shape.has_bitmaps() && does(operation, "compat=0.10"),
    },
    Fault {
        name: "a disk that grows over VM state that is left past its end shows it to the guest",
        how_to_see_it: "create -o cluster_size=4k a.qcow2 1M; qemu-io -c 'write -b -P 17 0 8k' a.qcow2; \
                        resize a.qcow2 8M; map a.qcow2",
        kinds: &[Kind::Disk, Kind::Info],
        shows: |shape, operation, _| shape.snapshots() == Snapshots::VmState && grows(operation),
    },
    Fault {
        name: "what is added to a disk counts as unchanged in its bitmaps, though it was cut off before",
        how_to_see_it: "bitmap --add a.qcow2 one; resize --shrink a.qcow2 -64k; resize a.qcow2 +64k",
        kinds: &[Kind::Bitmaps],
        shows: |shape, operation, _| shape.has_bitmaps() && grows(operation),
    },
    Fault {
        name: "check -r drops the snapshots of an image that has bitmaps",
        how_to_see_it: "snapshot -c one a.qcow2; bitmap --add a.qcow2 two; check -r leaks a.qcow2; \
                        snapshot -l a.qcow2",
        kinds: &[Kind::Info, Kind::VmState],
        shows: |shape, operation, _| {
            shape.has_bitmaps() && shape.snapshots() != Snapshots::None && does(operation, " -r ")
        },
    },
    Fault {
        name: "rebase of a version 2 image without a backing file shows the new one where the image had zeros",
        how_to_see_it: "create -o compat=0.10 a.qcow2 1M; rebase -b other.qcow2 -F qcow2 a.qcow2; map a.qcow2",
        kinds: &[Kind::Disk],
        shows: |shape, operation, _| {
            !shape.v3() && !shape.has_backing() && does(operation, "rebase -q -f qcow2 -b other.qcow2")
        },
    },
    Fault {
        name: "a snapshot whose references cannot be counted, and is refused, damages the image: leaks, wrong \
               refcounts, and of -a also the length of the disk",
        how_to_see_it: "create -o refcount_bits=1 a.qcow2 1M; qemu-io -c 'write 0 1M' a.qcow2; \
                        snapshot -c one a.qcow2; check a.qcow2",
        kinds: &[Kind::CheckOfTheirs, Kind::Disk, Kind::Snapshot, Kind::Info, Kind::VmState],
        shows: |shape, operation, refused| {
            let narrow = shape.refcount_bits() <= 8 || does(operation, "refcount_bits=");
            refused && narrow && (does(operation, "snapshot -c") || does(operation, "snapshot -a"))
        },
    },
    Fault {
        name: "amend to version 2 overwrites a snapshot's data where the disk has zeros in the same cluster",
        how_to_see_it: "qemu-io -c 'write -P 1 0 64k' a.qcow2; snapshot -c one a.qcow2; \
                        qemu-io -c 'write -z 0 64k' a.qcow2; amend -o compat=0.10 a.qcow2; \
                        snapshot -a one a.qcow2; qemu-io -c 'read -P 1 0 64k' a.qcow2",
        kinds: &[Kind::Snapshot],
        shows: |_, operation, _| operation.name == "snapshot, zero, snapshot, write, amend down",
    },
    Fault {
        name: "amend to version 2 keeps the zstd clusters of snapshots, which cannot be read then",
        how_to_see_it: "create -o compression_type=zstd a.qcow2 1M; qemu-io -c 'write -c 0 64k' a.qcow2; \
                        snapshot -c one a.qcow2; qemu-io -c 'write 0 64k' a.qcow2; \
                        amend -o compat=0.10 a.qcow2; convert -l one a.qcow2 b.qcow2",
        kinds: &[Kind::RefusedHere],
        shows: |shape, operation, _| {
            let is_zstd = shape.compression() == Compression::Zstd;
            is_zstd && shape.snapshots() != Snapshots::None && does(operation, "compat=0.10")
        },
    },
    Fault {
        name: "a disk that becomes shorter leaks the VM state past its end",
        how_to_see_it: "create -o cluster_size=4k a.qcow2 1M; qemu-io -c 'write -b 0 8k' a.qcow2; \
                        resize --shrink a.qcow2 512k; check a.qcow2",
        kinds: &[Kind::CheckOfTheirs],
        shows: |shape, operation, _| {
            let shrinks = ["--shrink", "size=700k", "snapshot -a"].iter().any(|words| does(operation, words));
            shape.snapshots() == Snapshots::VmState && shrinks
        },
    },
    Fault {
        name: "a version 2 disk cannot grow where its backing file is longer",
        how_to_see_it: "create base.qcow2 1M; create -o compat=0.10 -b base.qcow2 -F qcow2 a.qcow2 512k; \
                        resize a.qcow2 1M",
        kinds: &[Kind::DoneHere],
        shows: |shape, operation, _| {
            !shape.v3() && shape.has_backing() && operation.name == "shrink, write, grow"
        },
    },
    Fault {
        name: "what resize --preallocation=metadata adds shows what freed clusters held",
        how_to_see_it: "bitmap --add a.qcow2 one; qemu-io -c 'write 0 1M' a.qcow2; \
                        resize --preallocation=metadata a.qcow2 +200k; convert -O raw a.qcow2 a.raw",
        kinds: &[Kind::Disk],
        shows: |_, operation, _| does(operation, "--preallocation=metadata"),
    },
    Fault {
        name: "what a shrink cuts off inside a cluster shows again when the disk grows",
        how_to_see_it: "qemu-io -c 'write -P 5 0 64k' a.qcow2; resize --shrink a.qcow2 4k; resize a.qcow2 64k; \
                        qemu-io -c 'read -P 0 4k 60k' a.qcow2",
        kinds: &[Kind::Disk],
        shows: |_, operation, _| operation.name == "shrink, write, grow",
    },
    Fault {
        name: "a discard drops whole clusters only, where an image has subclusters",
        how_to_see_it: "create -o extended_l2=on a.qcow2 1M; qemu-io -c 'write 0 1M' -c 'discard 0 2k' a.qcow2; \
                        map a.qcow2",
        kinds: &[Kind::Disk],
        shows: |shape, operation, _| {
            let discards =
                operation.name.contains("discard everything") || operation.name.ends_with("discard");
            shape.has_subclusters() && discards
        },
    },
    Fault {
        name: "a compressed write that is refused counts as a change in the bitmaps",
        how_to_see_it: "create -o data_file=d a.qcow2 1M; bitmap --add a.qcow2 one; \
                        qemu-io -c 'write -c 0 64k' a.qcow2",
        kinds: &[Kind::Bitmaps],
        shows: |shape, operation, refused| {
            refused && shape.has_bitmaps() && operation.name == "write compressed"
        },
    },
    Fault {
        name: "convert -l copies a snapshot as long as the disk is now, not as it was then",
        how_to_see_it: "create a.qcow2 1M; snapshot -c one a.qcow2; resize --shrink a.qcow2 64k; \
                        convert -l one a.qcow2 b.qcow2; info b.qcow2",
        kinds: &[Kind::Disk, Kind::Info],
        shows: |shape, operation, _| shape.snapshots() != Snapshots::None && does(operation, "-l one"),
    },
];

/// The fault that explains a difference, if one does.
pub(super) fn explain(
    shape: &Shape,
    operation: &Operation,
    refused: bool,
    difference: &Difference,
) -> Option<usize> {
    let shows =
        |fault: &Fault| fault.kinds.contains(&difference.kind) && (fault.shows)(shape, operation, refused);
    FAULTS.iter().position(shows)
}

/// Whether a command of `operation` has `words`.
fn does(operation: &Operation, words: &str) -> bool {
    operation.steps.iter().any(|step| matches!(step, Step::Command(line) if line.contains(words)))
}

/// Whether the disk becomes longer.
fn grows(operation: &Operation) -> bool {
    does(operation, "image.qcow2 +") || does(operation, "size=10M")
}
