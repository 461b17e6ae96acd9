//! The command line of `blockmirror serve`.

use std::path::PathBuf;

use blockmirror_image::{CacheMode, Format, ImageName, SnapshotRef};
use clap::Args;

use super::snapshot::source_snapshot;
use super::{AccessArgs, Switch};

pub(super) const SERVE_EXAMPLES: &str = "\
The URI of each export is printed on a line of its own, once clients can connect.
SIGTERM and SIGINT end the server; requests that run are answered, and what was
written is flushed, before it ends with exit code 0.

Examples:
  blockmirror serve disk.qcow2
  blockmirror serve --socket /run/disk.sock --writable disk.qcow2
  blockmirror serve --port 0 --once a.qcow2 b.qcow2
  blockmirror serve --snapshot monday --socket s.sock disk.qcow2
  blockmirror serve --bitmap backup-1 --socket s.sock disk.qcow2
  blockmirror serve --port 10809 --bind :: --tls-certificates /etc/pki/blockmirror disk.raw
  nbdcopy -- [ blockmirror serve disk.qcow2 ] copy.raw";

/// What `blockmirror serve` takes.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The images to serve
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) files: Vec<PathBuf>,

    /// The parsed names of the images.
    #[arg(skip)]
    pub(crate) images: Vec<ImageName>,

    /// Format of the images, raw or qcow2; detected if omitted. A raw image that is writable needs it
    #[arg(short = 'f', long, value_name = "FMT", help_heading = "Images")]
    pub(crate) format: Option<Format>,

    /// Let clients write
    #[arg(short = 'w', long, help_heading = "Images")]
    pub(crate) writable: bool,

    /// Serve an internal snapshot of each image in place of its disk: its id or name, or
    /// `snapshot.id=ID,snapshot.name=NAME`
    #[arg(short = 'l', long, value_name = "SNAPSHOT", value_parser = source_snapshot, help_heading = "Images")]
    #[arg(conflicts_with_all = ["writable", "bitmaps"])]
    pub(crate) snapshot: Option<SnapshotRef>,

    /// Serve a persistent bitmap of each image as the context `qemu:dirty-bitmap:NAME`; can be repeated
    #[arg(short = 'B', long = "bitmap", value_name = "NAME", help_heading = "Images")]
    pub(crate) bitmaps: Vec<String>,

    /// Cache mode: `none` and `directsync` bypass the host's page cache, `writethrough` and `directsync`
    /// make each write durable at once [default: writeback]
    #[arg(long, value_name = "CACHE", default_value = "writeback", hide_default_value = true)]
    #[arg(help_heading = "Images")]
    pub(crate) cache: CacheMode,

    /// Write to block devices that are mounted or in use
    #[arg(long, requires = "writable", help_heading = "Images")]
    pub(crate) force: bool,

    #[command(flatten)]
    pub(crate) access: AccessArgs,

    /// Listen at a Unix socket, which only the user who runs the server can connect to. A socket that no
    /// server listens at is replaced [default: blockmirror-PID.sock in $XDG_RUNTIME_DIR or /tmp; under a
    /// service manager that opens sockets, those]
    #[arg(short = 'k', long, value_name = "PATH", help_heading = "Server", conflicts_with = "port")]
    pub(crate) socket: Option<PathBuf>,

    /// Listen at a TCP port of this host; 0 for any that is free
    #[arg(short = 'p', long, value_name = "PORT", help_heading = "Server")]
    pub(crate) port: Option<u16>,

    /// Host name or address to listen at. One that other hosts reach needs TLS, or --no-tls
    #[arg(short = 'b', long, value_name = "HOST", default_value = "127.0.0.1", help_heading = "Server")]
    #[arg(requires = "port")]
    pub(crate) bind: String,

    /// Name of an export; given once for each image, in their order [default: the file's name; for one image
    /// the empty name, which clients use that name none]
    #[arg(short = 'x', long = "name", value_name = "NAME", help_heading = "Server")]
    pub(crate) names: Vec<String>,

    /// End when the last client has disconnected. Clients that only list the exports do not count
    #[arg(long, help_heading = "Server")]
    pub(crate) once: bool,

    /// Maximum number of clients; further ones wait. 0 for no limit
    #[arg(short = 'e', long, value_name = "N", default_value_t = 100, help_heading = "Server")]
    pub(crate) max_connections: u32,

    /// Write the process id to this file once clients can connect
    #[arg(long, value_name = "PATH", help_heading = "Server")]
    pub(crate) pid_file: Option<PathBuf>,

    /// Require TLS, with the certificates in this directory: ca-cert.pem, server-cert.pem, server-key.pem
    #[arg(long, value_name = "DIR", help_heading = "TLS")]
    pub(crate) tls_certificates: Option<PathBuf>,

    /// Whether clients need a certificate that ca-cert.pem has signed
    #[arg(long, value_enum, value_name = "WHETHER", default_value = "on", help_heading = "TLS")]
    #[arg(requires = "tls_certificates")]
    pub(crate) tls_verify_peer: Switch,

    /// Serve hosts of the network without TLS: they can read, and with --writable write, without a password
    #[arg(long, conflicts_with = "tls_certificates", help_heading = "TLS")]
    pub(crate) no_tls: bool,
}
