//! Names for files in headers that stay true when a chain is moved as a folder.
//!
//! Called by whatever changes the backing file that a header names. A name is taken only if it leads to the
//! file: with directories that are symbolic links, taking `..` away by text leads elsewhere.

use std::ffi::OsStr;
use std::fs;
use std::path::{Component, Path, PathBuf};

use blockmirror_file::FileId;

use crate::reference::{directory_of, lexical, plain_path};

/// The shortest relative name by which the header of `image` can name `file`, if `old`, the name that it
/// replaces, is relative too. `None` if there is none, or the old name is not relative.
pub fn relative_name(image: &Path, old: &OsStr, file: &Path) -> Option<PathBuf> {
    if plain_path(old)?.is_absolute() {
        return None;
    }
    let id = FileId::of(file)?;
    let directory = directory_of(image);
    let real_directory = fs::canonicalize(directory).ok()?;
    let beside = |file: &Path| Some(fs::canonicalize(directory_of(file)).ok()?.join(file.file_name()?));
    let names = [
        // As the names are spelled, as the directories lie, and as the file lies.
        (lexical(directory), lexical(file)),
        (Some(real_directory.clone()), beside(file)),
        (Some(real_directory), fs::canonicalize(file).ok()),
    ];
    names
        .into_iter()
        .filter_map(|(from, to)| Some(plain(difference(&from?, &to?))))
        .filter(|name| FileId::of(directory.join(name)) == Some(id))
        .min_by_key(|name| name.as_os_str().len())
}

/// The way from the directory `from` to `to`, both absolute.
fn difference(from: &Path, to: &Path) -> PathBuf {
    let common = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(common).map(|_| Component::ParentDir);
    up.chain(to.components().skip(common)).collect()
}

/// A name with a colon in its first part would be taken for a protocol.
fn plain(name: PathBuf) -> PathBuf {
    if plain_path(name.as_os_str()) == Some(&*name) { name } else { Path::new(".").join(name) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn name(image: &Path, old: &str, file: &Path) -> Option<String> {
        relative_name(image, OsStr::new(old), file).map(|name| name.into_os_string().into_string().unwrap())
    }

    #[test]
    fn the_name_is_as_short_as_it_leads_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for file in ["a/top", "a/base", "b/base", "a/deep/base", "real/deep/top", "real/base", "a/x:y"] {
            fs::create_dir_all(path(file).parent().unwrap()).unwrap();
            fs::write(path(file), b"").unwrap();
        }
        // By text `links/deep/..` is `links`; it is `real`.
        fs::create_dir(path("links")).unwrap();
        symlink(path("real/deep"), path("links/deep")).unwrap();
        fs::write(path("links/base"), b"").unwrap();
        // A volume that is a link, as storage managers have them: the link is what moves with the folder.
        fs::create_dir(path("dev")).unwrap();
        fs::write(path("dev/volume"), b"").unwrap();
        symlink(path("dev/volume"), path("b/volume")).unwrap();
        for (image, file, expected) in [
            ("a/top", "a/base", "base"),
            ("a/top", "b/base", "../b/base"),
            ("a/top", "a/../b/base", "../b/base"),
            ("a/top", "a/deep/base", "deep/base"),
            ("a/top", "b/volume", "../b/volume"),
            ("a/top", "a/x:y", "./x:y"),
            ("links/deep/top", "real/base", "../base"),
            ("links/deep/top", "links/base", "../../links/base"),
        ] {
            let found = name(&path(image), "../x/y", &path(file)).unwrap();
            assert_eq!(found, expected, "{image} -> {file}");
        }
        for old in ["/absolute", "file:/absolute", "nbd://host/x", "json:{}"] {
            assert_eq!(name(&path("a/top"), old, &path("a/base")), None);
        }
        assert_eq!(name(&path("a/top"), "base", &path("a/missing")), None);
    }
}
