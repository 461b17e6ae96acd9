//! Copies that are verified, onto a server whose disk stores a byte wrongly and says nothing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fs;
use std::sync::Arc;

use crate::common::nbd::noise;
use crate::common::{Ran, ours};
use blockmirror_block::testing::{CorruptingDisk, MemoryDisk};
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_nbd::server::{Export, Listener, Server, ServerOptions};
use blockmirror_testing::scratch::scratch;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const LEN: u64 = 4 * MIB;
/// The byte that is stored wrongly: of data, and of a run of zeros.
const WRONG: [u64; 2] = [MIB + 5000, 3 * MIB + 700];

/// A server with disks that are full of ones, and the source: data, and zeros from 2 MiB on.
struct Place {
    dir: TempDir,
    server: Arc<Server>,
}

impl Place {
    fn new() -> Self {
        let dir = scratch().unwrap();
        let mut source = noise(1, LEN as usize);
        source[2 * MIB as usize..].fill(0);
        fs::write(dir.path().join("source"), source).unwrap();
        let server = Server::new(ServerOptions::default()).unwrap();
        server.listen(Listener::unix(dir.path().join("socket")).unwrap()).unwrap();
        Self { dir, server }
    }

    /// An export of a disk that stores the byte at `wrong` wrongly; its URI.
    fn export(&self, name: &str, wrong: u64) -> (String, Arc<CorruptingDisk>) {
        let disk = Arc::new(MemoryDisk::new(LEN));
        disk.write_at(&vec![1; LEN as usize], 0, WriteFlags::NONE).unwrap();
        let disk = Arc::new(CorruptingDisk::new(disk, wrong));
        self.server.add(Export::new(name, Arc::clone(&disk) as _).writable(true)).unwrap();
        (format!("nbd+unix:///{name}?socket={}", self.dir.path().join("socket").display()), disk)
    }

    fn copy(&self, words: &[&str], uri: &str) -> Ran {
        let source = self.dir.path().join("source");
        let fixed = ["convert", "-f", "raw", "-O", "raw"];
        ours(fixed.iter().chain(words).copied().chain([source.to_str().unwrap(), uri]))
    }
}

/// Without a verification such a copy ends well, which is why there is one.
#[test]
fn a_byte_that_is_stored_wrongly_is_seen_by_each_mode() {
    let place = Place::new();
    for (number, wrong) in WRONG.into_iter().enumerate() {
        for mode in ["none", "readback", "hash", "full"] {
            for more in [&[][..], &["-n"]] {
                let name = format!("{mode}-{number}-{}", more.len());
                let (uri, disk) = place.export(&name, wrong);
                let verify = format!("--verify={mode}");
                let mut words = more.to_vec();
                if mode != "none" {
                    words.push(&verify);
                }
                let ran = place.copy(&words, &uri);
                assert!(disk.has_corrupted(), "{name}");
                if mode == "none" {
                    assert_eq!(ran.code, 0, "{name}: {ran:?}");
                    continue;
                }
                assert_eq!(ran.code, 5, "{name}: {ran:?}");
                let start = wrong / 512 * 512;
                let range = format!("differing range: {uri}: bytes {start} to {}", start + 512);
                assert!(ran.stderr.contains(&range), "{name}: {ran:?}");
                let last = ran.stderr.lines().last().unwrap();
                assert!(last.contains("512 bytes in 1 range differ from the source"), "{name}: {ran:?}");
                assert!(last.ends_with("it is kept, and nothing in it says so"), "{name}: {ran:?}");
            }
        }
    }
}

#[test]
fn an_equal_copy_says_so() {
    let place = Place::new();
    let (uri, _) = place.export("equal", LEN);
    let ran = place.copy(&["--verify=full"], &uri);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.stdout.ends_with("verified (full): 4 MiB equal\n"), "{ran:?}");
}
