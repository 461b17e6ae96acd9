//! `blockdev-create`: new files, and formats in files.

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::Storage;
use blockmirror_image::{CreateSettings, CreateSpec, Format};
use blockmirror_image_lock::Permission;
use blockmirror_qcow2::options::{OptionValue, option};
use blockmirror_qcow2::{CreateOptions, Preallocation, Version};
use blockmirror_qmp::schema::{Command, Object, Type};
use blockmirror_qmp::{QmpError, Session};
use serde_json::Value;

use super::{Commands, Services};
use crate::Reply;
use crate::arguments::{Argument, Arguments, Size, arguments, choice, variant};
use crate::context::Context;
use crate::driver::{DriverName, Inherited, NodeRef};
use crate::errors::{is_read_only, qmp_error, refuse};
use crate::graph::{AttachmentId, JobRole, NO_CHANGE, Parent, Perms};
use crate::job::{AtEnd, Claims, JobOptions, SimpleJob, job_span};
use crate::new_image::CreatedFile;

choice! {
    enum PreallocMode("PreallocMode", "What is allocated from the beginning.") {
        Off = "off", "nothing";
        Metadata = "metadata", "the tables; refused for a file";
        Falloc = "falloc", "the space is reserved";
        Full = "full", "zeros are written";
    }
}

choice! {
    enum VersionArg("BlockdevQcow2Version", "Version of the format.") {
        V2 = "v2", "for readers from before 2012";
        V3 = "v3", "the usual one";
    }
}

choice! {
    enum CompressionArg("Qcow2CompressionType", "How compressed clusters are compressed.") {
        Zlib = "zlib", "deflate";
        Zstd = "zstd", "Zstandard";
    }
}

arguments! {
    struct FileArgs("BlockdevCreateOptionsFile", "A file of the host. One that is there is replaced, unless \
     it is in use.") {
        filename: String = "filename", "path";
        size: Size = "size", "length in bytes; rounded up to a multiple of 512";
        preallocation: Option<PreallocMode> = "preallocation", "what is allocated" [default "off"];
        nocow: Option<bool> = "nocow", "refused if true" [default "false"];
        _extent_size_hint: Option<Size> = "extent-size-hint", "without effect";
    }
}

arguments! {
    struct Encrypt("QCryptoBlockCreateOptions", "Refused.") {
        _format: String = "format", "refused";
    }
}

arguments! {
    struct Qcow2Args("BlockdevCreateOptionsQcow2", "An image. What the node held is lost.") {
        file: NodeRef = "file", "the node to put it in";
        data_file: Option<NodeRef> = "data-file", "the node that gets the guest's data; what it holds \
         stays, and shows with `data-file-raw` or preallocated clusters";
        data_file_raw: Option<bool> = "data-file-raw", "whether that stays a valid raw \
         image" [default "false"];
        extended_l2: Option<bool> = "extended-l2", "32 subclusters in each cluster" [default "false"];
        size: Size = "size", "length of the disk in bytes";
        version: Option<VersionArg> = "version", "version of the format" [default "v3"];
        backing_file: Option<String> = "backing-file", "name of the backing file, for the header";
        backing_fmt: Option<DriverName> = "backing-fmt", "its format";
        encrypt: Option<Encrypt> = "encrypt", "refused";
        cluster_size: Option<Size> = "cluster-size", "a power of two between 512 and 2M" [default "65536"];
        preallocation: Option<PreallocMode> = "preallocation", "what is allocated" [default "off"];
        lazy_refcounts: Option<bool> = "lazy-refcounts", "postpone refcount updates" [default "false"];
        refcount_bits: Option<i64> = "refcount-bits", "width of a refcount" [default "16"];
        compression_type: Option<CompressionArg> = "compression-type", "how clusters are \
         compressed" [default "zlib"];
    }
}

arguments! {
    struct AnyImage {
        driver: DriverName = "driver", "`file` or `qcow2`";
    }
}

static OPTIONS: Object = Object::union(
    "BlockdevCreateOptions",
    "A new image.",
    AnyImage::MEMBERS,
    "driver",
    &[variant::<FileArgs>("file"), variant::<Qcow2Args>("qcow2")],
)
.differs("other drivers are refused, and so is encryption");

/// A new image.
#[derive(Clone, Debug)]
enum ImageArgs {
    File(FileArgs),
    Qcow2(Box<Qcow2Args>),
    /// By a driver that makes none.
    Other,
}

impl Argument for ImageArgs {
    const TYPE: Type = Type::Object(&OPTIONS);

    fn read(value: &Value) -> Option<Self> {
        Some(match AnyImage::parse(value.as_object()?).ok()?.driver.name() {
            "file" => Self::File(FileArgs::read(value)?),
            "qcow2" => Self::Qcow2(Box::new(Qcow2Args::read(value)?)),
            _ => Self::Other,
        })
    }
}

arguments! {
    struct CreateArgs {
        job_id: String = "job-id", "name of the job";
        options: ImageArgs = "options", "what is made";
    }
}

static BLOCKDEV_CREATE: Command = Command::new(
    "blockdev-create",
    "Starts a job of type `create` that makes a file, or an image in a node. It stays until `job-dismiss`.",
    CreateArgs::MEMBERS,
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

fn blockdev_create(services: &Arc<Services>, session: &Session, args: CreateArgs) -> Reply<Value> {
    if matches!(args.options, ImageArgs::Other) {
        return Err(QmpError::generic("Driver does not support blockdev-create"));
    }
    let _reserved = services.jobs.reserve(&args.job_id)?;
    let span = job_span(&args.job_id, "create");
    let job = JobOptions {
        id: args.job_id,
        kind: "create",
        speed: 0,
        auto_finalize: true,
        auto_dismiss: false,
        span,
    };
    let mut held = Held::default();
    // Errors are reported by the job, as clients expect.
    let work = match args.options {
        ImageArgs::File(options) => file(&services.context, options),
        ImageArgs::Qcow2(options) => qcow2(&services.context, &job.id, *options, &mut held),
        ImageArgs::Other => Err(QmpError::generic("Driver does not support blockdev-create")),
    };
    let handle = match work {
        Ok(work) => {
            // A log must not say anything of what is about to be written.
            services.context.rewritten_below(&held.attachments);
            SimpleJob::start(&job, work)
        }
        Err(error) => SimpleJob::failed(&job, error.desc),
    };
    let at_end: AtEnd = Box::new(move |context| {
        let Held { attachments, claims } = held;
        drop(claims);
        context.rewritten_below(&attachments);
        context.detach_all(&attachments);
    });
    services.jobs.add_job(Some(session), job, Box::new(handle), at_end);
    Ok(Value::Null)
}

fn file(context: &Arc<Context>, options: FileArgs) -> Reply<Work> {
    if options.nocow == Some(true) {
        return Err(QmpError::generic("Driver 'file' does not support the option 'nocow'"));
    }
    let (path, size) = (options.filename, options.size.0);
    let mut settings = CreateSettings::default();
    if options.preallocation == Some(PreallocMode::Metadata) {
        return Err(QmpError::generic("Unsupported preallocation mode 'metadata'"));
    }
    settings.preallocation = options.preallocation.and_then(|mode| Preallocation::from_name(mode.name()));
    let spec = CreateSpec::new(Format::Raw, size, settings);
    let context = Arc::clone(context);
    Ok(Box::new(move || {
        let created = CreatedFile::create_with(&context, &path, &spec, || Ok(()));
        let named = created.and_then(|mut created| {
            created.give_name()?;
            created.keep();
            Ok(())
        });
        named.map_err(|error| error.desc)
    }))
}

fn qcow2(context: &Arc<Context>, id: &str, options: Qcow2Args, held: &mut Held) -> Reply<Work> {
    refuse(options.encrypt.is_some(), "qcow2", "encrypt")?;
    let mut new = qcow2_options(&options)?;
    let file = hold(context, id, options.file, held)?;
    let data = options.data_file.map(|data| hold(context, id, data, held)).transpose()?;
    new.data_file = data.as_ref().map(|(_, name)| name.clone().into_bytes());
    new.keep_data = true;
    new.check().map_err(qmp_error)?;
    if let Some(backing) = &options.backing_file {
        let format = options.backing_fmt.and_then(|format| format.name().parse().ok());
        let nodes = [Some(&file), data.as_ref()].into_iter().flatten();
        let mut paths = nodes.map(|(_, name)| Path::new(name));
        if let Some(image) = paths.next() {
            context.check_backing(image, paths.next(), backing, format)?;
        }
    }
    let (file, data) = (file.0, data.map(|(data, _)| data));
    Ok(Box::new(move || {
        new.create(&*file, data.as_deref()).map_err(|error| error.to_string())?;
        file.flush().map_err(|error| error.to_string())?;
        data.map_or(Ok(()), |data| data.flush()).map_err(|error| error.to_string())
    }))
}

fn qcow2_options(options: &Qcow2Args) -> Reply<CreateOptions> {
    let size = options.size.0;
    if !size.is_multiple_of(512) {
        return Err(QmpError::generic("Image size must be a multiple of 512 bytes"));
    }
    let mut new = CreateOptions::new(size);
    for (name, value) in given(options) {
        if let Some((option, value)) = option(name).zip(value) {
            if let OptionValue::Number(number) = value
                && !option.kind.allows(number)
            {
                return Err(out_of_range(name));
            }
            option.set(&mut new, value).map_err(qmp_error)?;
        }
    }
    if new.lazy_refcounts && new.version == Version::V2 {
        return Err(QmpError::generic(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or \
             greater)",
        ));
    }
    Ok(new)
}

/// What is given of the options that have a row in the table of the format. The data file is a node.
fn given(options: &Qcow2Args) -> [(&'static str, Option<OptionValue>); 10] {
    let flag = |on: Option<bool>| on.map(OptionValue::Flag);
    let text = |text: Option<&str>| text.map(|text| OptionValue::Text(text.into()));
    let choice = |name, value: Option<&str>| (name, option(name).and_then(|row| row.kind.parse(value?).ok()));
    [
        ("cluster-size", options.cluster_size.map(|size| OptionValue::Number(size.0))),
        // No width is negative, nor is it zero.
        (
            "refcount-bits",
            options.refcount_bits.map(|bits| OptionValue::Number(bits.try_into().unwrap_or(0))),
        ),
        choice("version", options.version.map(VersionArg::name)),
        choice("compression-type", options.compression_type.map(CompressionArg::name)),
        choice("preallocation", options.preallocation.map(PreallocMode::name)),
        ("extended-l2", flag(options.extended_l2)),
        ("lazy-refcounts", flag(options.lazy_refcounts)),
        ("data-file-raw", flag(options.data_file_raw)),
        ("backing-file", text(options.backing_file.as_deref())),
        ("backing-fmt", text(options.backing_fmt.map(|format| format.name()))),
    ]
}

/// A number that its option does not allow, in QEMU's words.
fn out_of_range(name: &str) -> QmpError {
    QmpError::generic(if name == "cluster-size" {
        "Cluster size must be a power of two between 512 and 2048k"
    } else {
        "Refcount width must be a power of two and may not exceed 64 bits"
    })
}

/// Holds the node that `child` refers to, or opens it; what an image can be put in, and its name for headers.
fn hold(
    context: &Arc<Context>,
    id: &str,
    child: NodeRef,
    held: &mut Held,
) -> Reply<(Arc<dyn Storage>, String)> {
    let (name, opened) = match child {
        NodeRef::Name(name) => (name, None),
        NodeRef::Options(options) => {
            let opened = context.open_node(&options, Inherited::default())?;
            (opened.name.clone(), Some(opened))
        }
    };
    let mut graph = context.graph.lock();
    let parent = Parent::Job { id: id.to_owned(), kind: "create", role: JobRole::Other };
    let (perm, shared_perm) = (Perms::READ_WRITE.with(Permission::WriteUnchanged), NO_CHANGE);
    match graph.attach(&name, parent, perm, shared_perm) {
        Ok(attachment) => held.attachments.push(attachment),
        Err(error) => {
            let released = opened.map(|opened| graph.undo(&opened)).unwrap_or_default();
            drop(graph);
            context.close(released);
            return Err(error);
        }
    }
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
    held.claims.push(Claims::of_node(context, &name)?);
    Ok((storage, name_in_headers))
}

#[cfg(test)]
mod tests {
    use blockmirror_qcow2::options::OPTIONS;

    use super::*;

    /// An option of the format that QMP forgot would be silently missing there.
    #[test]
    fn every_option_of_the_format_can_be_given() {
        let none = Qcow2Args::read(&serde_json::json!({"file": "f", "size": 512})).unwrap();
        let given = given(&none);
        for option in OPTIONS {
            let name = option.qmp_name;
            assert!(Qcow2Args::MEMBERS.iter().any(|member| member.name == name), "{name}");
            let by_itself = matches!(name, "size" | "data-file");
            assert_eq!(given.iter().any(|(given, _)| *given == name), !by_itself, "{name}");
        }
        assert_eq!(qcow2_options(&none).unwrap(), CreateOptions::new(512));
    }
}
