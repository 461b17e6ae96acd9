//! Files that images name: which of them may be opened.
//!
//! An image's header is data from wherever the image came from, and a name in it (backing file, external data
//! file) is a request to read a file of the host. The caller's [`ReferencePolicy`] decides. Names are taken
//! as plain paths only, never as a protocol or a JSON description.
//!
//! What must hold: the decision is about a file that was found ([`PathHandle`]), not about its name, and that
//! very file is opened. A link that changes meanwhile changes which file is judged, never which is opened.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use blockmirror_file::{FileId, PathHandle};
use blockmirror_qcow2::FileName;
use thiserror::Error;

use crate::protocol_id::{NULL, ProtocolId, is_uri};

/// What an image names a file for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// The layer below a copy-on-write image.
    Backing,
    /// The file that holds an image's guest data.
    Data,
}

impl Role {
    /// How messages call it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Backing => "backing file",
            Self::Data => "data file",
        }
    }
}

/// Why a file that an image names was not opened.
#[derive(Debug, Error)]
#[error("{} names the {} \"{}\", {reason}", image.display(), role.as_str(), name.display())]
#[non_exhaustive]
pub struct ReferenceError {
    /// The image with the name in it.
    pub image: PathBuf,
    /// What the name is for.
    pub role: Role,
    /// The name as it stands in the image.
    pub name: PathBuf,
    /// Why not.
    pub reason: ReferenceRefusal,
}

/// The reason in a [`ReferenceError`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReferenceRefusal {
    /// The policy opens nothing that an image names.
    #[error("and files named in images are not opened")]
    Denied,
    /// The name is a URL, a `json:` description, or carries a protocol prefix.
    #[error("which is not a plain path; only plain paths are opened")]
    NotAPath,
    /// The file lies in `directory`, which the policy does not allow.
    #[error("which lies in {}, outside the directories that images may refer to", directory.display())]
    Outside {
        /// The directory that the name leads to, without symbolic links.
        directory: PathBuf,
    },
    /// The name is relative, and the image is not in a directory but behind a server.
    #[error("which is relative, and the image has no directory")]
    NoDirectory,
    /// It would be written to, on the word of bytes that were not declared to be an image: a guest with a raw
    /// disk can put a header there. A policy that opens every plain path does not ask.
    #[error("which is not written to unless the format of the image is given")]
    Guessed,
    /// It is neither a regular file nor a block device.
    #[error("which is neither a regular file nor a block device")]
    NotAFile,
    /// The chain comes back to a file that is already in it.
    #[error("which is already part of the chain")]
    Cycle,
    /// The chain is longer than the limit.
    #[error("and the chain is deeper than {0} images already")]
    TooDeep(u32),
    /// The file cannot be looked up.
    #[error("which cannot be opened: {0}")]
    Unreachable(io::Error),
}

impl From<io::Error> for ReferenceRefusal {
    fn from(error: io::Error) -> Self {
        Self::Unreachable(error)
    }
}

/// A file that may be opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Resolved {
    /// The path as the image spells it, from where we are: for messages, and for the names that this file's
    /// own header is relative to.
    pub path: PathBuf,
    /// The file that was judged, and so what is to be opened.
    pub handle: PathHandle,
}

/// Which files an image may pull in.
///
/// The directories are fixed when the policy is made; a chain does not widen them as it goes down.
#[derive(Clone, Debug)]
pub struct ReferencePolicy {
    roots: Roots,
    /// Files that are allowed wherever they lie.
    files: Vec<FileId>,
    /// The directory of the image that the policy was made for.
    home: Option<Home>,
    protocols: bool,
}

#[derive(Clone, Debug)]
enum Roots {
    Any,
    Within(Vec<Root>),
}

/// A directory from which files may be opened.
#[derive(Clone, Debug)]
struct Root {
    /// Where it lies, without symbolic links.
    path: PathBuf,
    handle: PathHandle,
    /// Whether files in it are opened for reading only.
    read_only: bool,
}

impl Root {
    fn new(directory: &Path) -> io::Result<Self> {
        let handle = PathHandle::find(directory)?;
        if !handle.file_type().is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        let path = match handle.real_path() {
            Some(path) => path,
            None => fs::canonicalize(directory)?,
        };
        Ok(Self { path, handle, read_only: false })
    }
}

/// The directory of an image, as it was found by the image's name.
#[derive(Clone, Debug)]
struct Home {
    image: PathBuf,
    root: Root,
}

impl ReferencePolicy {
    /// Nothing that an image names is opened.
    pub fn deny() -> Self {
        Self { roots: Roots::Within(Vec::new()), files: Vec::new(), home: None, protocols: false }
    }

    /// Every plain path is opened, for images from a trusted source.
    pub fn any() -> Self {
        Self { roots: Roots::Any, ..Self::deny() }
    }

    /// Files in or below the directory of `image` are opened: where images that belong together lie together.
    /// Beside an export there is nothing.
    ///
    /// # Errors
    /// If the directory cannot be looked up.
    pub fn beside(image: &Path) -> io::Result<Self> {
        let mut policy = Self::deny();
        if !is_uri(image) && image != Path::new(NULL) {
            policy.home = Some(Home { image: image.to_owned(), root: Root::new(directory_of(image))? });
        }
        Ok(policy)
    }

    /// Also opens files in or below `directory`.
    ///
    /// # Errors
    /// If it cannot be looked up, or is no directory.
    pub fn allow_dir(&mut self, directory: &Path) -> io::Result<()> {
        self.allow_root(Root::new(directory)?);
        Ok(())
    }

    /// Also opens files in or below `directory`, for reading: a data file there is not written to.
    ///
    /// # Errors
    /// As for [`allow_dir`](Self::allow_dir).
    pub fn allow_dir_to_read(&mut self, directory: &Path) -> io::Result<()> {
        self.allow_root(Root { read_only: true, ..Root::new(directory)? });
        Ok(())
    }

    fn allow_root(&mut self, root: Root) {
        if let Roots::Within(roots) = &mut self.roots {
            roots.push(root);
        }
    }

    /// Whether every plain path is opened, for writing too.
    pub(crate) fn allows_all(&self) -> bool {
        match &self.roots {
            Roots::Any => true,
            Roots::Within(roots) => roots.iter().any(|root| root.path == Path::new("/") && !root.read_only),
        }
    }

    /// What of it holds for files that are written to.
    #[must_use]
    pub fn for_writing(&self) -> Self {
        let mut policy = self.clone();
        if let Roots::Within(roots) = &mut policy.roots {
            roots.retain(|root| !root.read_only);
        }
        policy
    }

    /// Also opens this one file, typically because its name came from the user. A file that does not exist
    /// (yet) adds nothing.
    pub fn allow_file(&mut self, file: &Path) {
        self.files.extend(FileId::of(file));
    }

    /// Also opens backing files that are no plain files: `blkdebug:CONFIG:IMAGE` and `null-co://`.
    pub fn allow_protocols(&mut self) {
        self.protocols = true;
    }

    pub(crate) fn allows_protocols(&self) -> bool {
        self.protocols
    }

    /// For the image open as `id` by the name `image`: its directory counts only if it is the one that the
    /// image was opened from. Between making the policy and opening the image the name may have come to lead
    /// elsewhere.
    pub(crate) fn for_opened(&self, image: &Path, id: &ProtocolId) -> Self {
        let mut policy = self.clone();
        policy.home = policy.home.filter(|home| home.image != image || home.holds(image, id));
        policy
    }

    /// For `image`, which the caller has named as well: its own directory counts in place of that of the
    /// image above it.
    pub(crate) fn for_typed(&self, image: &Path) -> io::Result<Self> {
        let mut policy = self.clone();
        if policy.home.is_some() {
            policy.home = Self::beside(image)?.home;
        }
        Ok(policy)
    }

    /// The same for an image that the caller opened by itself.
    #[must_use]
    pub fn for_opened_file(&self, image: &Path, id: FileId) -> Self {
        self.for_opened(image, &ProtocolId::File(id))
    }

    /// Decides about `name` in the header of `image`, and says which file to open.
    ///
    /// # Errors
    /// [`ReferenceError`] with the reason; nothing has been opened then.
    pub fn resolve(&self, image: &Path, role: Role, name: &OsStr) -> Result<Resolved, ReferenceError> {
        self.authorize(image, name).map_err(|reason| ReferenceError {
            image: image.to_owned(),
            role,
            name: name.into(),
            reason,
        })
    }

    fn authorize(&self, image: &Path, name: &OsStr) -> Result<Resolved, ReferenceRefusal> {
        let path = find_name(image, name)?;
        let handle = match &self.roots {
            Roots::Any => PathHandle::find(&path)?,
            Roots::Within(roots) => {
                let roots: Vec<_> = roots.iter().chain(self.home.iter().map(|home| &home.root)).collect();
                self.find_within(&roots, &path)?
            }
        };
        // Opening a FIFO or a terminal would block, or eat what another program was to read.
        if handle.id().is_none() {
            return Err(ReferenceRefusal::NotAFile);
        }
        Ok(Resolved { path, handle })
    }

    fn find_within(&self, roots: &[&Root], path: &Path) -> Result<PathHandle, ReferenceRefusal> {
        if roots.is_empty() && self.files.is_empty() {
            return Err(ReferenceRefusal::Denied);
        }
        let inside = |directory: &Path| roots.iter().any(|root| directory.starts_with(&root.path));
        let handle = match PathHandle::find(path) {
            Ok(handle) => handle,
            // A refusal does not reveal which files a directory holds that may not be referred to: what is
            // missing there is refused like what exists.
            Err(error) => {
                let real_directory = fs::canonicalize(directory_of(path));
                return Err(match lexical(path).and_then(|path| path.parent().map(Path::to_owned)) {
                    Some(directory)
                        if !inside(&directory) && !real_directory.is_ok_and(|real| inside(&real)) =>
                    {
                        ReferenceRefusal::Outside { directory }
                    }
                    _ => error.into(),
                });
            }
        };
        if handle.id().is_some_and(|id| self.files.contains(&id)) {
            return Ok(handle);
        }
        match handle.real_path() {
            Some(real) if inside(&real) => Ok(handle),
            Some(real) => Err(ReferenceRefusal::Outside { directory: directory_of(&real).to_owned() }),
            None => find_without_proc(roots, path),
        }
    }
}

/// Where nothing says where an open file lies: the name is followed here, and the kernel makes sure that what
/// it has led to is reached from the root without any further link.
fn find_without_proc(roots: &[&Root], path: &Path) -> Result<PathHandle, ReferenceRefusal> {
    let real = fs::canonicalize(path)?;
    let mut below = roots.iter().filter_map(|root| Some((root, real.strip_prefix(&root.path).ok()?)));
    let Some((root, rest)) = below.next() else {
        return Err(ReferenceRefusal::Outside { directory: directory_of(&real).to_owned() });
    };
    Ok(root.handle.find_beneath(rest)?)
}

impl Home {
    /// Whether `image` leads to the open file `id` from this very directory.
    fn holds(&self, image: &Path, id: &ProtocolId) -> bool {
        let entry = image.file_name().and_then(|name| self.root.handle.find_in(name).ok());
        entry.and_then(|entry| entry.id()).is_some_and(|entry| ProtocolId::File(entry) == *id)
    }
}

/// The directory that names in the header of `image` are relative to.
pub fn directory_of(image: &Path) -> &Path {
    match image.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => image,
    }
}

/// `name`, as it stands in the header of `image`, as a path from where we are; by text only.
///
/// # Errors
/// [`ReferenceRefusal::NotAPath`] if it is no plain path, [`ReferenceRefusal::NoDirectory`] if it is relative
/// in an image that is not in a directory.
pub fn find_name(image: &Path, name: &OsStr) -> Result<PathBuf, ReferenceRefusal> {
    let name = plain_path(name).ok_or(ReferenceRefusal::NotAPath)?;
    if is_uri(image) && !name.is_absolute() {
        return Err(ReferenceRefusal::NoDirectory);
    }
    let directory = if is_uri(image) { None } else { image.parent() };
    Ok(directory.unwrap_or(Path::new("")).join(name))
}

/// The path that [`find_name`] gives, if there is one.
pub fn join_name(image: &Path, name: &OsStr) -> Option<PathBuf> {
    find_name(image, name).ok()
}

/// The path that a name from a header is, if it is a path and nothing else: not empty, no NUL, and no
/// `protocol:` before the first slash, which is where `json:`, `nbd:` and URLs have it. What follows `file:`
/// is a path, whatever it looks like.
pub(crate) fn plain_path(name: &OsStr) -> Option<&Path> {
    let bytes = name.as_bytes();
    let (path, is_file) = match bytes.strip_prefix(b"file:") {
        Some(rest) => (rest, true),
        None => (bytes, false),
    };
    let first = path.split(|b| *b == b'/').next().unwrap_or_default();
    let plain = !path.is_empty() && !path.contains(&0) && (is_file || !first.contains(&b':'));
    plain.then(|| Path::new(OsStr::from_bytes(path)))
}

/// An absolute form of `path`, with `..` taken away by text.
pub(crate) fn lexical(path: &Path) -> Option<PathBuf> {
    let mut out = PathBuf::new();
    for part in std::path::absolute(path).ok()?.components() {
        match part {
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir => {}
            part => out.push(part),
        }
    }
    Some(out)
}

/// A name in a header, as it is.
pub(crate) fn os_str(name: &FileName) -> &OsStr {
    name.as_path().as_os_str()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Folder {
        dir: tempfile::TempDir,
    }

    impl Folder {
        /// `in/top`, `in/base`, `in/deep/base`, `out/base`.
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for file in ["in/top", "in/base", "in/deep/base", "out/base"] {
                let path = dir.path().join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, b"x").unwrap();
            }
            Self { dir }
        }

        fn path(&self, name: &str) -> PathBuf {
            fs::canonicalize(self.dir.path()).unwrap().join(name)
        }

        fn resolve(&self, name: impl AsRef<OsStr>) -> Result<PathBuf, ReferenceRefusal> {
            let top = self.path("in/top");
            let policy = ReferencePolicy::beside(&top).unwrap();
            let resolved = policy.resolve(&top, Role::Backing, name.as_ref());
            resolved.map(|file| file.handle.real_path().unwrap()).map_err(|e| e.reason)
        }
    }

    #[test]
    fn names_in_or_below_the_directory_are_opened() {
        let folder = Folder::new();
        assert_eq!(folder.resolve("base").unwrap(), folder.path("in/base"));
        assert_eq!(folder.resolve("./deep/base").unwrap(), folder.path("in/deep/base"));
        assert_eq!(folder.resolve("../in/base").unwrap(), folder.path("in/base"));
        assert_eq!(folder.resolve(folder.path("in/base")).unwrap(), folder.path("in/base"));
    }

    #[test]
    fn names_that_lead_out_are_refused_with_the_directory() {
        let folder = Folder::new();
        symlink(folder.path("out/base"), folder.path("in/link")).unwrap();
        symlink(folder.path("out"), folder.path("in/linked-dir")).unwrap();
        for name in ["../out/base", "link", "linked-dir/base"] {
            match folder.resolve(name) {
                Err(ReferenceRefusal::Outside { directory }) => assert_eq!(directory, folder.path("out")),
                other => panic!("{name}: {other:?}"),
            }
        }
        assert!(matches!(folder.resolve("/etc/passwd"), Err(ReferenceRefusal::Outside { .. })));
    }

    #[test]
    fn a_refusal_does_not_tell_whether_a_file_outside_exists() {
        let folder = Folder::new();
        assert!(matches!(folder.resolve("../out/nothing"), Err(ReferenceRefusal::Outside { .. })));
        assert!(matches!(folder.resolve("nothing"), Err(ReferenceRefusal::Unreachable(_))));
    }

    /// What is missing beside an image was once said to lie outside, where the image was reached by a link to
    /// its directory; the advice to allow that directory did not help.
    #[test]
    fn what_is_missing_in_a_linked_directory_is_missing() {
        let folder = Folder::new();
        symlink(folder.path("in"), folder.path("link")).unwrap();
        let top = folder.path("link/top");
        let policy = ReferencePolicy::beside(&top).unwrap();
        let ask = |name: &str| policy.resolve(&top, Role::Backing, OsStr::new(name)).unwrap_err().reason;
        assert!(matches!(ask("nothing"), ReferenceRefusal::Unreachable(_)));
        assert!(matches!(ask("../out/nothing"), ReferenceRefusal::Outside { .. }));
    }

    #[test]
    fn only_plain_paths_are_names() {
        let folder = Folder::new();
        for name in ["json:{}", "nbd:localhost:1", "http://host/x", "fd:3", "", "file:", "a\0b", "file:a\0b"]
        {
            assert!(matches!(folder.resolve(name), Err(ReferenceRefusal::NotAPath)), "{name:?}");
        }
        fs::write(folder.path("in/a:b"), b"x").unwrap();
        for name in ["./a:b", "file:a:b", "file:./a:b"] {
            assert_eq!(folder.resolve(name).unwrap(), folder.path("in/a:b"));
        }
        assert_eq!(folder.resolve("file:base").unwrap(), folder.path("in/base"));
        for name in ["file:../out/base", "file:/etc/passwd", "file:///etc/passwd"] {
            assert!(matches!(folder.resolve(name), Err(ReferenceRefusal::Outside { .. })), "{name}");
        }
    }

    #[test]
    fn what_is_no_file_is_not_opened() {
        let folder = Folder::new();
        assert!(matches!(folder.resolve("deep"), Err(ReferenceRefusal::NotAFile)));
    }

    #[test]
    fn the_caller_widens_or_narrows() {
        let folder = Folder::new();
        let top = folder.path("in/top");
        let ask = |policy: &ReferencePolicy, name: &str| policy.resolve(&top, Role::Data, OsStr::new(name));

        let mut policy = ReferencePolicy::deny();
        assert!(matches!(ask(&policy, "base").unwrap_err().reason, ReferenceRefusal::Denied));
        policy.allow_file(&folder.path("out/base"));
        assert!(ask(&policy, "../out/base").is_ok());
        assert!(ask(&policy, "base").is_err());
        policy.allow_dir(&folder.path("in")).unwrap();
        assert!(ask(&policy, "base").is_ok());
        assert!(policy.allow_dir(&folder.path("in/base")).is_err());
        assert!(ask(&ReferencePolicy::any(), "/etc/passwd").is_ok());
        assert!(ask(&ReferencePolicy::any(), "json:{}").is_err());
    }

    #[test]
    fn without_proc_only_what_lies_beneath_is_found() {
        let folder = Folder::new();
        symlink(folder.path("out/base"), folder.path("in/link")).unwrap();
        symlink("deep/base", folder.path("in/inside")).unwrap();
        let root = Root::new(&folder.path("in")).unwrap();
        let find = |name: &str| find_without_proc(&[&root], &folder.path(name));
        for name in ["in/base", "in/deep/base", "in/inside", "out/../in/base"] {
            assert!(find(name).unwrap().id().is_some(), "{name}");
        }
        for name in ["in/link", "out/base", "in/../out/base"] {
            assert!(matches!(find(name), Err(ReferenceRefusal::Outside { .. })), "{name}");
        }
    }

    #[test]
    fn joining_is_textual() {
        let join = |image: &str, name: &str| join_name(Path::new(image), OsStr::new(name));
        assert_eq!(join("top.q", "base.q"), Some("base.q".into()));
        assert_eq!(join("dir/top.q", "../base.q"), Some("dir/../base.q".into()));
        assert_eq!(join("dir/top.q", "/base.q"), Some("/base.q".into()));
        assert_eq!(join("dir/top.q", "nbd://h"), None);
    }
}
