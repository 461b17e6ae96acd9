//! `--limits=untrusted`: confines the process before the command opens an image.
//!
//! Called when names are settled and no thread is started, and once more by a copy when all is open. From
//! here on the kernel lets the command open the files that its command line names, and make new ones where it
//! has a target; headers are parsed inside. What must hold: a file that is allowed here was typed, and does
//! not come out of an image; and what uses a file that is written is looked for before ([`unseen`]), because
//! from inside other processes cannot be seen.

mod unseen;

use std::path::{Path, PathBuf};

use blockmirror_image::{CreateSettings, Format, directory_of, is_uri, join_name};
use blockmirror_ops::PreparedConvert;
use blockmirror_sandbox::{Sandbox, SandboxError};

use self::unseen::{Unseen, Written};
use crate::args::{AccessArgs, Command, CopyArgs, Limits, TargetArgs};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::lock_policy;

/// Confines the process if `command` asks for it.
pub(crate) fn enter(console: &Console<'_>, command: &Command) -> Outcome<()> {
    let Some(limits) = limits(command) else { return Ok(()) };
    if limits.sandbox && matches!(command, Command::Serve(_)) {
        return Err(Failure::usage(
            "--limits: no server listens in the sandbox; untrusted,no-sandbox goes without it",
        ));
    }
    if !console.owns_process {
        return Err(Failure::failed("--limits: it confines the process, which is not the command's own"));
    }
    let files = Files::of(command)?;
    let sandbox = files.sandbox.memory(limits.memory).cpu_seconds(limits.time);
    if !limits.sandbox {
        return sandbox.limit_resources().map_err(Failure::failed);
    }
    if let Some(uri) = files.uri {
        return Err(Failure::usage(format_args!(
            "--limits: {}: no server is connected to from the sandbox; untrusted,no-sandbox goes without it",
            uri.display()
        )));
    }
    files.unseen.check()?;
    sandbox.enter().map_err(|error| match error {
        SandboxError::NoLandlock(_) | SandboxError::Seccomp(_) | SandboxError::Machine(_) => {
            Failure::failed(format_args!("{error}; --limits=untrusted,no-sandbox goes without it"))
        }
        error => Failure::failed(error),
    })
}

/// Leaves a copy the files that it has open, and their names, before its threads start: beside the target lie
/// files of others. A checkpoint is made later; then the target's directory stays open.
pub(crate) fn narrow(args: &CopyArgs, prepared: &PreparedConvert) -> Outcome<()> {
    let confined = args.access.limits.limits.is_some_and(|limits| limits.sandbox);
    let keeps_checkpoint = prepared.resumable().is_some() || args.checkpoint.checkpoint.is_some();
    if !confined || keeps_checkpoint {
        return Ok(());
    }
    let mut files = Files::default();
    args.names.iter().for_each(|name| files.read(&name.path));
    files.references(&args.access)?;
    // Opened once more when the copy starts.
    typed_paths(args, &typed_settings(args).backing_file, &args.backing).for_each(|file| files.read(&file));
    let written: Vec<_> = prepared.partial_paths().into_iter().chain([args.target.clone()]).collect();
    written.iter().for_each(|file| files.write(file));
    for file in written.iter().chain(&args.verify.ranges).chain(&args.report) {
        files.add(file, |sandbox, path| sandbox.rename_in(directory_of(path)));
    }
    files.sandbox.narrow_thread().map_err(Failure::failed)
}

/// The limits that `command` has.
fn limits(command: &Command) -> Option<Limits> {
    let args = match command {
        Command::Mirror(args) => args.copy.access.limits,
        Command::Convert(args) => args.copy.access.limits,
        Command::Dd(args) => args.access.limits,
        Command::Info(args) => args.access.limits,
        Command::Map(args) => args.access.limits,
        Command::Measure(args) => args.access.limits,
        Command::Compare(args) => args.access.limits,
        Command::Hash(args) => args.access.limits,
        Command::Bench(args) => args.access.limits,
        Command::Serve(args) => args.access.limits,
        Command::Inspect(args) => args.limits,
        Command::Check(args) => args.limits,
        _ => return None,
    };
    args.limits
}

/// What a command line names.
struct Files {
    sandbox: Sandbox,
    /// The first name that is no file.
    uri: Option<PathBuf>,
    unseen: Unseen,
}

impl Default for Files {
    /// What says how the process itself is: its mounts, its descriptors, which signals it ignores, how many
    /// processors it may use.
    fn default() -> Self {
        Self {
            sandbox: Sandbox::new().read("/proc/self").read("/sys/fs/cgroup"),
            uri: None,
            unseen: Unseen::default(),
        }
    }
}

impl Files {
    /// The files that `command` may open.
    fn of(command: &Command) -> Outcome<Self> {
        let mut files = Self::default();
        match command {
            Command::Mirror(args) => files.copy(&args.copy)?,
            Command::Convert(args) => files.copy(&args.copy)?,
            Command::Dd(args) => {
                files.read(&args.input);
                files.target(&args.output, args.existing);
                files.references(&args.access)?;
            }
            Command::Info(args) => files.source(&args.file, &args.access)?,
            Command::Map(args) => files.source(&args.file, &args.access)?,
            Command::Measure(args) => {
                args.file.iter().for_each(|file| files.read(file));
                files.references(&args.access)?;
            }
            Command::Compare(args) => {
                files.source(&args.first, &args.access)?;
                files.read(&args.second);
                args.ranges.iter().for_each(|file| files.create(file));
            }
            Command::Hash(args) => {
                args.images.iter().for_each(|(path, ..)| files.read(path));
                files.references(&args.access)?;
            }
            Command::Bench(args) if args.write => {
                files.changed(&args.file, Written::InPlace);
                files.references(&args.access)?;
            }
            Command::Bench(args) => files.source(&args.file, &args.access)?,
            Command::Inspect(args) => files.read(&args.file),
            Command::Check(args) if args.repair.is_some() => files.changed(&args.file, Written::InPlace),
            Command::Check(args) => files.read(&args.file),
            _ => {}
        }
        Ok(files)
    }

    fn add(&mut self, path: &Path, allow: impl FnOnce(Sandbox, &Path) -> Sandbox) {
        if is_uri(path) {
            self.uri.get_or_insert_with(|| path.to_owned());
            return;
        }
        let sandbox = std::mem::take(&mut self.sandbox);
        self.sandbox = allow(sandbox, path);
        if is_device(path) {
            self.see_devices();
        }
    }

    /// What uses a device or a file, as far as that is not a process, and what lies below it.
    fn see_devices(&mut self) {
        self.sandbox = std::mem::take(&mut self.sandbox).read("/sys").read("/proc/swaps");
    }

    fn read(&mut self, path: &Path) {
        self.add(path, |sandbox, path| sandbox.read(path));
    }

    fn write(&mut self, path: &Path) {
        self.see_devices();
        self.add(path, |sandbox, path| sandbox.write(path));
    }

    /// A file that may be there, and is written as `how` says.
    fn changed(&mut self, path: &Path, how: Written) {
        self.write(path);
        self.unseen.add(path, how);
    }

    /// A file that is made.
    fn create(&mut self, path: &Path) {
        self.add(path, |sandbox, path| sandbox.create_in(directory_of(path)));
    }

    /// A file that is made, written, or replaced by one beside it.
    fn target(&mut self, path: &Path, existing: TargetArgs) {
        self.unseen.clean |= existing.clean;
        self.changed(path, Written::target(existing, is_device(path)));
        if !is_device(path) && !is_uri(path) {
            self.create(path);
            // A link is followed, and what it leads to replaced. The new file gets the attributes of the old.
            if let Ok(real) = std::fs::canonicalize(path) {
                self.create(&real);
                self.sandbox = std::mem::take(&mut self.sandbox).change_attributes();
            }
        }
    }

    /// Where images may name files.
    fn references(&mut self, args: &AccessArgs) -> Outcome<()> {
        for directory in args.allow_backing.iter().chain(&lock_policy::lasting_directories()?) {
            self.read(directory);
        }
        Ok(())
    }

    /// An image that is read, with what it may name.
    fn source(&mut self, path: &Path, args: &AccessArgs) -> Outcome<()> {
        self.read(path);
        self.references(args)
    }

    fn copy(&mut self, args: &CopyArgs) -> Outcome<()> {
        args.names.iter().for_each(|name| self.read(&name.path));
        match args.no_create {
            true => self.changed(&args.target, Written::existing_image(args.existing)),
            false => self.target(&args.target, args.existing),
        }
        let settings = typed_settings(args);
        typed_paths(args, &settings.backing_file, &args.backing).for_each(|file| self.read(&file));
        let data = typed_paths(args, &settings.data_file, &None);
        data.for_each(|file| self.target(&file, args.existing));
        let made = args.checkpoint.checkpoint.iter().chain(&args.verify.ranges).chain(&args.report);
        made.for_each(|file| self.create(file));
        args.verify.only.iter().for_each(|file| self.read(file));
        self.references(&args.access)
    }
}

/// What `-o` says, as far as it can be read: the command reports the rest.
fn typed_settings(args: &CopyArgs) -> CreateSettings {
    let mut settings = CreateSettings::default();
    let format = args.target_format.unwrap_or(Format::Qcow2);
    let _ = args.target_options.iter().try_for_each(|text| settings.parse(format, text));
    settings
}

/// What names of other files say in the header of the target.
fn typed_paths<'a>(
    args: &'a CopyArgs,
    one: &'a Option<String>,
    other: &'a Option<String>,
) -> impl Iterator<Item = PathBuf> + 'a {
    one.iter().chain(other).filter_map(|name| join_name(&args.target, name.as_ref()))
}

fn is_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device())
}
