//! `blockdev-create`: new files, and formats in files.

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::Storage;
use blockmirror_image::{CreateSettings, CreateSpec, Format};
use blockmirror_image_lock::Permission;
use blockmirror_qcow2::{Compression, CreateOptions, Preallocation, Version};
use blockmirror_qmp::schema::{BOOL, Command, Enum, INT, Object, SIZE, STR, Type, case, opt, req, value};
use blockmirror_qmp::{Args, QmpError, Session};
use serde_json::Value;

use super::Commands;
use super::schema::{BLOCKDEV_DRIVER, BLOCKDEV_REF};
use crate::Reply;
use crate::daemon::Daemon;
use crate::driver::{Inherited, is_read_only, qmp_error, refuse};
use crate::graph::{AttachmentId, JobRole, NO_CHANGE, Parent, Perms};
use crate::job::{AtEnd, Claims, JobOptions, SimpleJob};
use crate::new_image::CreatedFile;

static PREALLOCATION: Enum = Enum::new(
    "PreallocMode",
    "What is allocated from the beginning.",
    &[
        value("off", "nothing"),
        value("metadata", "the tables; refused for a file"),
        value("falloc", "the space is reserved"),
        value("full", "zeros are written"),
    ],
);
static VERSION: Enum = Enum::new(
    "BlockdevQcow2Version",
    "Version of the format.",
    &[value("v2", "for readers from before 2012"), value("v3", "the usual one")],
);
static COMPRESSION: Enum = Enum::new(
    "Qcow2CompressionType",
    "How compressed clusters are compressed.",
    &[value("zlib", "deflate"), value("zstd", "Zstandard")],
);

static FILE: Object = Object::new(
    "BlockdevCreateOptionsFile",
    "A file of the host. One that is there is replaced, unless it is in use.",
    &[
        req("filename", STR, "path"),
        req("size", SIZE, "length in bytes; rounded up to a multiple of 512"),
        opt("preallocation", Type::Enum(&PREALLOCATION), "what is allocated").default("off"),
        opt("nocow", BOOL, "refused if true").default("false"),
        opt("extent-size-hint", SIZE, "without effect"),
    ],
);
static ENCRYPT: Object =
    Object::new("QCryptoBlockCreateOptions", "Refused.", &[req("format", STR, "refused")]);
static QCOW2: Object = Object::new(
    "BlockdevCreateOptionsQcow2",
    "An image. What the node held is lost.",
    &[
        req("file", Type::Alternate(&BLOCKDEV_REF), "the node to put it in"),
        opt(
            "data-file",
            Type::Alternate(&BLOCKDEV_REF),
            "the node that gets the guest's data; what it holds stays, and shows with `data-file-raw` or preallocated clusters",
        ),
        opt("data-file-raw", BOOL, "whether that stays a valid raw image").default("false"),
        opt("extended-l2", BOOL, "32 subclusters in each cluster").default("false"),
        req("size", SIZE, "length of the disk in bytes"),
        opt("version", Type::Enum(&VERSION), "version of the format").default("v3"),
        opt("backing-file", STR, "name of the backing file, for the header"),
        opt("backing-fmt", Type::Enum(&BLOCKDEV_DRIVER), "its format"),
        opt("encrypt", Type::Object(&ENCRYPT), "refused"),
        opt("cluster-size", SIZE, "a power of two between 512 and 2M").default("65536"),
        opt("preallocation", Type::Enum(&PREALLOCATION), "what is allocated").default("off"),
        opt("lazy-refcounts", BOOL, "postpone refcount updates").default("false"),
        opt("refcount-bits", INT, "width of a refcount").default("16"),
        opt("compression-type", Type::Enum(&COMPRESSION), "how clusters are compressed").default("zlib"),
    ],
);
static OPTIONS: Object = Object::union(
    "BlockdevCreateOptions",
    "A new image.",
    &[req("driver", Type::Enum(&BLOCKDEV_DRIVER), "`file` or `qcow2`")],
    "driver",
    &[case("file", &FILE), case("qcow2", &QCOW2)],
)
.differs("other drivers are refused, and so is encryption");

static BLOCKDEV_CREATE: Command = Command::new(
    "blockdev-create",
    "Starts a job of type `create` that makes a file, or an image in a node. It stays until `job-dismiss`.",
    &[req("job-id", STR, "name of the job"), req("options", Type::Object(&OPTIONS), "what is made")],
);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands.add(&BLOCKDEV_CREATE, blockdev_create);
}

/// What a job holds of the nodes that it writes.
#[derive(Default)]
struct Held {
    attachments: Vec<AttachmentId>,
    claims: Vec<Claims>,
}

type Work = Box<dyn FnOnce() -> Result<(), String> + Send>;

fn blockdev_create(daemon: &Arc<Daemon>, session: &Session, args: &Args) -> Reply<Value> {
    let id = args.str("job-id")?.to_owned();
    let options = Args::new(args.object("options")?.clone());
    let driver = options.str("driver")?;
    if !matches!(driver, "file" | "qcow2") {
        return Err(QmpError::generic("Driver does not support blockdev-create"));
    }
    let _reserved = daemon.jobs.reserve(&id)?;
    let job = JobOptions { id, kind: "create", speed: 0, auto_finalize: true, auto_dismiss: false };
    let mut held = Held::default();
    // Errors are reported by the job, as clients expect.
    let work = match driver {
        "file" => file(daemon, &options),
        _ => qcow2(daemon, &job.id, &options, &mut held),
    };
    let handle = match work {
        Ok(work) => SimpleJob::start(&job, work),
        Err(error) => SimpleJob::failed(&job, error.desc),
    };
    let at_end: AtEnd = Box::new(move |daemon| {
        let Held { attachments, claims } = held;
        drop(claims);
        daemon.rewritten_below(&attachments);
        daemon.detach_all(&attachments);
    });
    daemon.add_job(Some(session), job, Box::new(handle), at_end);
    Ok(Value::Null)
}

fn preallocation(options: &Args) -> Reply<Preallocation> {
    Ok(match options.opt_str("preallocation")? {
        Some("metadata") => Preallocation::Metadata,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        _ => Preallocation::Off,
    })
}

fn file(daemon: &Arc<Daemon>, options: &Args) -> Reply<Work> {
    if options.opt_bool("nocow")?.unwrap_or(false) {
        return Err(QmpError::generic("Driver 'file' does not support the option 'nocow'"));
    }
    let (path, size) = (options.str("filename")?.to_owned(), options.u64("size")?);
    let mut settings = CreateSettings::default();
    settings.preallocation = Some(match preallocation(options)? {
        Preallocation::Metadata => {
            return Err(QmpError::generic("Unsupported preallocation mode 'metadata'"));
        }
        other => other,
    });
    let spec = CreateSpec::new(Format::Raw, size, settings);
    let daemon = Arc::clone(daemon);
    Ok(Box::new(move || {
        let created = CreatedFile::create_with(&daemon, &path, &spec, || Ok(()));
        let named = created.and_then(|mut created| {
            created.give_name()?;
            created.keep();
            Ok(())
        });
        named.map_err(|error| error.desc)
    }))
}

fn qcow2(daemon: &Arc<Daemon>, id: &str, options: &Args, held: &mut Held) -> Reply<Work> {
    refuse(options, "qcow2", &["encrypt"])?;
    let new = qcow2_options(options)?;
    let file = hold(daemon, id, options, "file", held)?
        .ok_or_else(|| QmpError::generic("A block device must be specified for \"file\""))?;
    let data = hold(daemon, id, options, "data-file", held)?;
    let mut new = new;
    new.data_file = data.as_ref().map(|(_, name)| name.clone().into_bytes());
    new.keep_data = true;
    new.check().map_err(qmp_error)?;
    if let Some(backing) = options.opt_str("backing-file")? {
        let format = options.opt_str("backing-fmt")?.and_then(|format| format.parse().ok());
        let nodes = [Some(&file), data.as_ref()].into_iter().flatten();
        let mut paths = nodes.map(|(_, name)| Path::new(name));
        if let Some(image) = paths.next() {
            daemon.check_backing(image, paths.next(), backing, format)?;
        }
    }
    let (file, data) = (file.0, data.map(|(data, _)| data));
    Ok(Box::new(move || {
        new.create(&*file, data.as_deref()).map_err(|error| error.to_string())?;
        file.flush().map_err(|error| error.to_string())?;
        data.map_or(Ok(()), |data| data.flush()).map_err(|error| error.to_string())
    }))
}

fn qcow2_options(options: &Args) -> Reply<CreateOptions> {
    if !options.u64("size")?.is_multiple_of(512) {
        return Err(QmpError::generic("Image size must be a multiple of 512 bytes"));
    }
    let mut new = CreateOptions::new(options.u64("size")?);
    if options.opt_str("version")? == Some("v2") {
        new.version = Version::V2;
    }
    if options.opt_str("compression-type")? == Some("zstd") {
        new.compression = Compression::Zstd;
    }
    new.cluster_size = options.opt_u64("cluster-size")?.unwrap_or(new.cluster_size);
    if !new.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&new.cluster_size) {
        return Err(QmpError::generic("Cluster size must be a power of two between 512 and 2048k"));
    }
    if let Some(bits) = options.opt_i64("refcount-bits")? {
        let bits = u32::try_from(bits).ok().filter(|bits| bits.is_power_of_two() && *bits <= 64);
        new.refcount_bits = bits.ok_or_else(|| {
            QmpError::generic("Refcount width must be a power of two and may not exceed 64 bits")
        })?;
    }
    new.extended_l2 = options.opt_bool("extended-l2")?.unwrap_or(false);
    new.lazy_refcounts = options.opt_bool("lazy-refcounts")?.unwrap_or(false);
    if new.lazy_refcounts && new.version == Version::V2 {
        return Err(QmpError::generic(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ));
    }
    new.preallocation = preallocation(options)?;
    new.data_file_raw = options.opt_bool("data-file-raw")?.unwrap_or(false);
    new.backing_file = options.opt_str("backing-file")?.map(|name| name.as_bytes().to_vec());
    new.backing_format = options.opt_str("backing-fmt")?.map(str::to_owned);
    Ok(new)
}

/// Holds the node that the member `role` refers to, or opens it; what an image can be put in, and its name
/// for headers.
fn hold(
    daemon: &Arc<Daemon>,
    id: &str,
    options: &Args,
    role: &str,
    held: &mut Held,
) -> Reply<Option<(Arc<dyn Storage>, String)>> {
    let name = match options.get(role) {
        None => return Ok(None),
        Some(Value::String(name)) => name.clone(),
        Some(Value::Object(options)) => daemon.open_node(options, Inherited::default())?,
        Some(_) => return Err(QmpError::generic("A block device is given by its name or its options")),
    };
    let mut graph = daemon.graph.lock();
    let parent = Parent::Job { id: id.to_owned(), kind: "create", role: JobRole::Other };
    let (perm, shared_perm) = (Perms::READ_WRITE.with(Permission::WriteUnchanged), NO_CHANGE);
    held.attachments.push(graph.attach(&name, parent, perm, shared_perm)?);
    let node = graph.find(&name)?;
    if node.read_only {
        return Err(is_read_only());
    }
    let storage = node.storage.clone();
    let storage = storage.ok_or_else(|| {
        QmpError::generic(format!("Node '{name}' cannot hold an image: only files and filters on files can"))
    })?;
    let name_in_headers = node.name_in_headers();
    drop(graph);
    held.claims.push(daemon.claim_devices(&name)?);
    Ok(Some((storage, name_in_headers)))
}
