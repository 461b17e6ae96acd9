//! The command lines of `blockmirror dd` and `blockmirror bench`.

use std::path::PathBuf;

use blockmirror_image::{CacheMode, Format, NodeOptions};
use blockmirror_ops::MAX_BENCH_DEPTH;
use clap::builder::RangedI64ValueParser;
use clap::{Args, ValueEnum};

use super::{AccessArgs, ProgressArgs, TargetArgs, size};

pub(super) const DD_EXAMPLES: &str = "\
Examples:
  blockmirror dd if=disk.qcow2 of=disk.raw
  blockmirror dd -O qcow2 bs=1M skip=16 count=80 if=disk.raw of=part.qcow2";

pub(super) const BENCH_EXAMPLES: &str = "\
Examples:
  blockmirror bench -d 16 -s 64K disk.qcow2
  blockmirror bench -w -t none --flush-interval 64 --pattern 1 scratch.raw";

#[derive(Debug, Args)]
#[command(override_usage = "blockmirror dd [OPTIONS] [bs=SIZE] [count=N] [skip=N] if=FILE of=FILE")]
pub(crate) struct DdArgs {
    /// if=FILE, the image to copy; of=FILE, the image to create; bs=SIZE, bytes of a block [default: 512];
    /// count=N, at which block of the input the copy ends; skip=N, at which it begins
    #[arg(value_name = "NAME=VALUE")]
    pub(crate) operands: Vec<String>,

    /// The input's path, from its operand; the other fields likewise.
    #[arg(skip)]
    pub(crate) input: PathBuf,

    #[arg(skip)]
    pub(crate) node: NodeOptions,

    #[arg(skip)]
    pub(crate) output: PathBuf,

    /// Format of the input; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Format of the output
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    pub(crate) output_format: Format,

    #[command(flatten)]
    pub(crate) access: AccessArgs,

    #[command(flatten)]
    pub(crate) existing: TargetArgs,

    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// The image
    pub(crate) file: PathBuf,

    /// What its name says besides path and format.
    #[arg(skip)]
    pub(crate) node: NodeOptions,

    /// Format of the image; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Number of requests
    #[arg(short = 'c', long, value_name = "N", default_value_t = 75_000, value_parser = positive())]
    pub(crate) count: u32,

    /// Requests in flight, up to 1024
    #[arg(short = 'd', long, value_name = "N", default_value_t = 64, value_parser = depth())]
    pub(crate) depth: u32,

    /// Bytes of a request
    #[arg(short = 's', long, value_name = "SIZE", default_value = "4K", value_parser = request)]
    pub(crate) buffer_size: u32,

    /// Offset of the first request
    #[arg(short = 'o', long, value_name = "SIZE", default_value = "0", value_parser = size)]
    pub(crate) offset: u64,

    /// From the start of one request to the next, modulo the disk's size [default: the bytes of a request]
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = size)]
    pub(crate) step_size: Option<u64>,

    /// Write instead of reading: what the image holds is lost
    #[arg(short = 'w', long)]
    pub(crate) write: bool,

    /// The byte to write
    #[arg(long, value_name = "BYTE", default_value = "0", value_parser = pattern)]
    pub(crate) pattern: u8,

    /// Flush after this many writes, not fewer than are in flight; 0 for never
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) flush_interval: u32,

    /// Do not wait for the writes in flight before a flush
    #[arg(long)]
    pub(crate) no_drain: bool,

    /// Cache mode of the image: `none` and `directsync` bypass the host's page cache, `writethrough` and
    /// `directsync` make each write durable at once [default: writeback]
    #[arg(short = 't', long, value_name = "CACHE", default_value = "writeback", hide_default_value = true)]
    pub(crate) cache: CacheMode,

    /// Accepted for compatibility with qemu-img and ignored: each request in flight has a thread
    #[arg(short = 'i', long, value_enum, value_name = "AIO")]
    pub(crate) aio: Option<Aio>,

    /// Accepted for compatibility with qemu-img and ignored, as -i native is
    #[arg(short = 'n', long)]
    pub(crate) native: bool,

    /// Write to a block device that is mounted or in use
    #[arg(long)]
    pub(crate) force: bool,

    #[command(flatten)]
    pub(crate) access: AccessArgs,

    /// Print errors only
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
}

/// QEMU's ways of doing asynchronous I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Aio {
    Threads,
    Native,
    IoUring,
}

fn positive() -> RangedI64ValueParser<u32> {
    RangedI64ValueParser::new().range(1..=i64::from(i32::MAX))
}

fn depth() -> RangedI64ValueParser<u32> {
    RangedI64ValueParser::new().range(1..=i64::from(MAX_BENCH_DEPTH))
}

fn request(text: &str) -> Result<u32, String> {
    let bytes = size(text).map_err(|error| error.to_string())?;
    match u32::try_from(bytes) {
        Ok(bytes @ 1..=0x7fff_ffff) => Ok(bytes),
        _ => Err(format!("\"{text}\": must be between 1 and {}", i32::MAX)),
    }
}

fn pattern(text: &str) -> Result<u8, String> {
    let byte = size(text).map_err(|error| error.to_string())?;
    u8::try_from(byte).map_err(|_| format!("\"{text}\": must be between 0 and 255"))
}
