//! `cargo xtask testdata`: makes the images under `testdata/` anew and checks what is stored there.
//!
//! Every image is made in an empty folder by the commands its recipe lists, `qemu-img convert` reads its
//! content, and the content's checksum goes into the manifest. Files whose commands and content are as the
//! manifest has them stay as they are: another QEMU may lay an image out differently, and snapshots carry the
//! time of day.

mod recipes;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use blockmirror_testing::content;
use blockmirror_testing::testdata::{Entry, MANIFEST, Manifest, Stored, folder};
use blockmirror_testing::{Outcome, qemu, scratch};
use recipes::{Recipe, STAMPS, STAMPS_LEN};

use crate::Task;

/// Most bytes that the folder may take in the repository.
const MOST_STORED: u64 = 1 << 20;
/// Files up to this size are stored as they are, so that they can be tried without unpacking.
const PLAIN_UP_TO: u64 = 2048;

/// Make the images under testdata/ anew with QEMU's tools; check what is stored
#[derive(clap::Args)]
pub(crate) struct Testdata {
    /// Only check the stored files; needs no QEMU
    #[arg(long)]
    check: bool,
}

impl Task for Testdata {
    fn run(self) -> Outcome<ExitCode> {
        let folder = folder();
        if !self.check {
            make(&folder)?;
        }
        let (images, bytes) = check(&folder)?;
        println!("{images} images in {bytes} bytes; every stored file has its checksum");
        Ok(ExitCode::SUCCESS)
    }
}

/// Checks the stored files against the manifest; returns how many images there are and the bytes they take.
pub(crate) fn check(folder: &Path) -> Outcome<(usize, u64)> {
    let manifest = Manifest::load(folder)?;
    let mut known = BTreeMap::new();
    for stored in manifest.images.iter().flat_map(|e| &e.stored) {
        let path = folder.join(&stored.name);
        let found = content::hash_file(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        if found != stored.blake3 {
            return Err(
                format!("{}: checksum {found}, the manifest has {}", path.display(), stored.blake3).into()
            );
        }
        known.insert(stored.name.clone(), ());
    }
    let mut bytes = 0;
    for file in fs::read_dir(folder)? {
        let file = file?;
        let name = file.file_name().to_string_lossy().into_owned();
        if name != MANIFEST && name != "README.md" && !known.contains_key(&name) {
            return Err(format!("{}: the manifest does not know it", file.path().display()).into());
        }
        bytes += file.metadata()?.len();
    }
    if bytes > MOST_STORED {
        return Err(format!("{}: {bytes} bytes, more than {MOST_STORED}", folder.display()).into());
    }
    Ok((manifest.images.len(), bytes))
}

fn make(folder: &Path) -> Outcome {
    if qemu::Qemu::find("cargo xtask testdata").is_none() {
        return Err("making the images needs qemu-img and qemu-io; --check needs neither".into());
    }
    let old = Manifest::load(folder).ok();
    let mut images = Vec::new();
    for recipe in recipes::all() {
        let was = old.as_ref().and_then(|m| m.entry(&recipe.file).ok());
        let entry = make_one(&recipe, was, folder).map_err(|e| format!("{}: {e}", recipe.file))?;
        images.push(entry);
    }
    for gone in old.iter().flat_map(|m| &m.images).flat_map(|e| &e.stored) {
        if !images.iter().flat_map(|e: &Entry| &e.stored).any(|s| s.name == gone.name) {
            fs::remove_file(folder.join(&gone.name))?;
        }
    }
    let version = qemu::run("qemu-img", Path::new("."), ["--version"])?;
    let made_by = version.lines().next().unwrap_or_default().to_owned();
    let text = serde_json::to_string_pretty(&Manifest { made_by, images })?;
    fs::write(folder.join(MANIFEST), text + "\n")?;
    Ok(())
}

fn make_one(recipe: &Recipe, was: Option<&Entry>, folder: &Path) -> Outcome<Entry> {
    let dir = scratch::scratch()?;
    let dir = dir.path();
    fs::write(dir.join(STAMPS), content::stamped(0, STAMPS_LEN, 0))?;
    for command in &recipe.commands {
        perform(command, dir)?;
    }
    let content_blake3 = if recipe.secret {
        None
    } else {
        qemu::run("qemu-img", dir, ["convert", "-f", recipe.format, "-O", "raw", &recipe.file, "content"])?;
        Some(content::hash_file(&dir.join("content"))?)
    };
    let mut entry = Entry {
        file: recipe.file.clone(),
        format: recipe.format.to_owned(),
        virtual_size: recipe.virtual_size(dir)?,
        content_blake3,
        read_only_because: recipe.read_only_because.map(str::to_owned),
        stored: Vec::new(),
        commands: recipe.commands.iter().map(|c| shell_words(c)).collect(),
    };
    if let Some(was) = was
        && was.commands == entry.commands
        && was.content_blake3 == entry.content_blake3
        && was.stored.iter().all(|s| folder.join(&s.name).exists())
    {
        entry.stored = was.stored.clone();
        return Ok(entry);
    }
    println!("storing {}", recipe.file);
    for name in recipe.kept.iter().chain([&recipe.file]) {
        entry.stored.push(store(&dir.join(name), name, folder)?);
    }
    Ok(entry)
}

/// Runs one command of a recipe. One that ends `qemu-io` by a signal on purpose fails, and is meant to.
fn perform(command: &[String], dir: &Path) -> Outcome {
    let (program, args) = command.split_first().ok_or("an empty command")?;
    if args.iter().any(|a| a.starts_with("sigraise")) {
        Command::new(program).args(args).current_dir(dir).output()?;
        return Ok(());
    }
    qemu::run(program, dir, args).map(drop)
}

fn store(file: &Path, name: &str, folder: &Path) -> Outcome<Stored> {
    let bytes = fs::read(file)?;
    let (name, bytes) = if bytes.len() as u64 <= PLAIN_UP_TO {
        (name.to_owned(), bytes)
    } else {
        (format!("{name}.zst"), zstd::encode_all(&bytes[..], 19)?)
    };
    fs::write(folder.join(&name), &bytes)?;
    Ok(Stored { name, blake3: blake3::hash(&bytes).to_hex().to_string() })
}

/// The command as a shell would take it.
fn shell_words(command: &[String]) -> String {
    let quoted = command.iter().map(|w| if w.contains(' ') { format!("'{w}'") } else { w.clone() });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_images_are_as_the_manifest_says() {
        let (images, bytes) = check(&folder()).unwrap();
        assert!(images > 80, "{images} images");
        assert!(bytes <= MOST_STORED);
    }

    #[test]
    fn commands_in_the_manifest_are_those_of_the_recipes() {
        let manifest = Manifest::load(&folder()).unwrap();
        for recipe in recipes::all() {
            let entry = manifest.entry(&recipe.file).unwrap();
            let now: Vec<_> = recipe.commands.iter().map(|c| shell_words(c)).collect();
            assert_eq!(entry.commands, now, "{}: run `cargo xtask testdata`", recipe.file);
        }
    }
}
