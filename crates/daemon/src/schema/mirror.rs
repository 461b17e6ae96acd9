//! The arguments of the commands that start a mirror, and those that other jobs share with them.

use blockmirror_mirror::{CopyMode, OnError, Reflink};

use crate::arguments::{Int64, choice};

choice! {
    pub(crate) enum Sync("MirrorSyncMode", "What is copied.", differs "there, mirrors refuse `incremental` \
     and `bitmap`") {
        Top = "top", "what the top image itself holds";
        Full = "full", "everything that the chain of images holds";
        None = "none", "only what is written from now on";
        Incremental = "incremental", "what a bitmap says has changed; the bitmap starts anew if the job \
         succeeds";
        Bitmap = "bitmap", "what a bitmap says has changed; `bitmap-mode` says what becomes of it";
    }
}

choice! {
    pub(crate) enum BitmapSync("BitmapSyncMode", "What becomes of the bitmap.") {
        OnSuccess = "on-success", "it starts anew if the job succeeds";
        Never = "never", "nothing";
        Always = "always", "it starts anew; if the job fails it keeps what the target does not have";
    }
}

choice! {
    pub(crate) enum ReflinkArg("MirrorReflink", "Whether blocks are shared with the source's files.") {
        Never = "never", "all data is copied" [ours];
        Auto = "auto", "the same, as a guest's write to a shared block allocates a new one" [ours];
        Always = "always", "what can be shared is; refused if nothing can" [ours];
    }
}

impl From<ReflinkArg> for Reflink {
    fn from(reflink: ReflinkArg) -> Self {
        match reflink {
            ReflinkArg::Never => Self::Never,
            ReflinkArg::Auto => Self::Auto,
            ReflinkArg::Always => Self::Always,
        }
    }
}

choice! {
    pub(crate) enum OnErrorArg("BlockdevOnError", "What happens when a request fails.") {
        Report = "report", "the job fails";
        Ignore = "ignore", "the job goes on, and tries the range again, twice a second at most; a stream or \
         commit fails in the end";
        Enospc = "enospc", "the job pauses if space ran out, and fails otherwise";
        Stop = "stop", "the job pauses";
        Auto = "auto", "the same as `enospc`";
    }
}

impl OnErrorArg {
    /// The policy; by default, errors are reported.
    pub(crate) fn policy(chosen: Option<Self>) -> OnError {
        match chosen {
            None | Some(Self::Report) => OnError::Report,
            Some(Self::Ignore) => OnError::Ignore,
            Some(Self::Enospc) => OnError::Enospc,
            Some(Self::Stop) => OnError::Stop,
            Some(Self::Auto) => OnError::Auto,
        }
    }
}

choice! {
    pub(crate) enum CopyModeArg("MirrorCopyMode", "When the target gets what is written meanwhile.") {
        Background = "background", "when its turn comes";
        WriteBlocking = "write-blocking", "at once: a write ends when both have it";
        Auto = "auto", "whichever serves: the job becomes ready whatever is written, and slows writes no \
         more than needed" [ours];
    }
}

impl From<CopyModeArg> for CopyMode {
    fn from(mode: CopyModeArg) -> Self {
        match mode {
            CopyModeArg::Background => Self::Background,
            CopyModeArg::WriteBlocking => Self::WriteBlocking,
            CopyModeArg::Auto => Self::Auto,
        }
    }
}

/// Declares the arguments of a command that starts a mirror: in braces its own ones, before, between and
/// after those that all such commands have.
macro_rules! mirror_arguments {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident $(($wire:literal, $about:literal))?
        { $($first:tt)* } contents { $($second:tt)* } pace { $($third:tt)* } end { $($last:tt)* }
    ) => {
        $crate::arguments::arguments! {
            $(#[$meta])*
            $vis struct $name $(($wire, $about))? {
                $($first)*
                replaces: Option<String> = "replaces", "the node whose users go over: the device, or one \
                 below filters on it"
                    [default "the device"];
                sync: Sync = "sync", "what is copied";
                bitmap: Option<String> = "bitmap", "the bitmap of the device for `sync` incremental and \
                 bitmap" [ours];
                bitmap_mode: Option<BitmapSync> = "bitmap-mode", "what becomes of the \
                 bitmap" [default "on-success", ours];
                $($second)*
                speed: Option<Int64> = "speed", "bytes per second" [default "0: no limit"];
                granularity: Option<u32> = "granularity", "bytes per bit of the dirty bitmap, a power of two \
                 between 512 and 64M; 0 is the default"
                    [default "the cluster size of the target, but at least 4096 and at most 65536; 65536 if \
                     it has none"];
                buf_size: Option<Int64> = "buf-size", "bytes that may be in flight, rounded up to a multiple \
                 of the granularity; 0 is the default"
                    [default "16 MiB"];
                on_source_error: Option<OnErrorArg> = "on-source-error", "what happens when reading \
                 fails" [default "report"];
                on_target_error: Option<OnErrorArg> = "on-target-error", "what happens when writing the \
                 target fails"
                    [default "report"];
                $($third)*
                copy_mode: Option<CopyModeArg> = "copy-mode", "when the target gets what is written meanwhile"
                    [default "background"];
                target_is_zero: Option<bool> = "target-is-zero", "whether all of the target reads as zeros \
                 and will when its backing file is attached, so that zeros are left out; an export is zeroed \
                 otherwise, whatever it says"
                    [default "false", ours];
                x_reflink: Option<ReflinkArg> = "x-reflink", "whether the target shares blocks with the \
                 source's files, in a file system that can: nothing is read or written for them, and each \
                 write to one of them, by the guest too, allocates a new block from then on"
                    [default "auto", ours];
                auto_finalize: Option<bool> = "auto-finalize", "whether the job ends without \
                 `job-finalize`" [default "true"];
                auto_dismiss: Option<bool> = "auto-dismiss", "whether it vanishes without \
                 `job-dismiss`" [default "true"];
                $($last)*
            }
        }
    };
}

pub(crate) use mirror_arguments;

mirror_arguments! {
    /// The arguments of `blockdev-mirror`, in a transaction too.
    pub(crate) struct MirrorArgs("BlockdevMirror", "A mirror.") {
        job_id: Option<String> = "job-id", "name of the job; has to be given";
        device: String = "device", "the node to copy from";
        target: String = "target", "the node to copy to; it has no other user";
    } contents {} pace {
        filter_node_name: Option<String> = "filter-node-name", "a free name; no node gets it, as none is \
         put in front";
    } end {
        x_log: Option<String> = "x-log", "a file in which the mirror keeps what the target lacks: the same \
         mirror with the same file goes on after the daemon was killed; with `sync` full only"
            [default "none", ours];
    }
}
