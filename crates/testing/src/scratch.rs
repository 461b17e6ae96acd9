//! Scratch folders that live in memory and go when dropped.

use std::io;
use std::path::Path;

use tempfile::TempDir;

/// An empty folder on `/dev/shm` where that exists, else in the usual temporary place. Removed when dropped.
pub fn scratch() -> io::Result<TempDir> {
    let shm = Path::new("/dev/shm");
    let builder = {
        let mut b = tempfile::Builder::new();
        b.prefix("blockmirror-");
        b
    };
    if shm.is_dir() { builder.tempdir_in(shm) } else { builder.tempdir() }
}

/// Bytes that a file occupies, as `st_blocks` tells.
pub fn allocated(path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(path)?.blocks() * 512)
}
