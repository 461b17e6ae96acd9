//! The command line of `blockmirror daemon`: the options of `qemu-storage-daemon`, with its names.

use std::path::PathBuf;

use clap::Args;

pub(super) const DAEMON_EXAMPLES: &str = "\
Options have the syntax of qemu-storage-daemon. They are processed in this
order: --object, --blockdev, --chardev, --nbd-server, --export, --monitor.

Examples:
  blockmirror daemon \\
    --blockdev driver=qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2 \\
    --nbd-server addr.type=unix,addr.path=/run/nbd.sock \\
    --export nbd,id=disk,node-name=disk,writable=on \\
    --chardev socket,id=qmp,path=/run/qmp.sock,server=on,wait=off --monitor chardev=qmp";

/// What `qemu-storage-daemon` takes, with its names.
#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    /// A user-creatable object: `throttle-group`, `tls-creds-x509`, `secret`
    #[arg(long = "object", value_name = "TYPE,id=ID,..")]
    pub(crate) objects: Vec<String>,

    /// A block node, with the options of the QMP command `blockdev-add`
    #[arg(long = "blockdev", value_name = "DRIVER,node-name=NAME,..")]
    pub(crate) blockdevs: Vec<String>,

    /// A character device for a monitor: a Unix socket, or standard input and output
    #[arg(long = "chardev", value_name = "socket|stdio,id=ID,..")]
    pub(crate) chardevs: Vec<String>,

    /// A QMP monitor on a chardev
    #[arg(long = "monitor", value_name = "chardev=ID")]
    pub(crate) monitors: Vec<String>,

    /// Address of the NBD server
    #[arg(long, value_name = "addr.type=..,..")]
    pub(crate) nbd_server: Option<String>,

    /// An NBD export of a node, with the options of `block-export-add`
    #[arg(long = "export", value_name = "nbd,id=ID,node-name=NAME,..")]
    pub(crate) exports: Vec<String>,

    /// A directory in which images may name backing and data files, in addition to their own; can be
    /// repeated. The environment variable BLOCKMIRROR_ALLOW_BACKING lists more (colon-separated), for backing
    /// files
    #[arg(long = "allow-backing", value_name = "DIR")]
    pub(crate) allowed: Vec<PathBuf>,

    /// Run in the background once setup is complete
    #[arg(long)]
    pub(crate) daemonize: bool,

    /// The process is in the background already
    #[arg(long, hide = true)]
    pub(crate) background: bool,

    /// Write the process id to this file once setup is complete
    #[arg(long, value_name = "PATH")]
    pub(crate) pidfile: Option<PathBuf>,
}
