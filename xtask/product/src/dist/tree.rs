//! The files that a package installs, in a folder that stands for the root of a system.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use blockmirror_testing::{Outcome, workspace_root};
use clap_complete::Shell;
use flate2::{Compression, GzBuilder};

use super::pages;

/// What differs between distributions.
pub(super) struct Places {
    pub(super) zsh: &'static str,
}

pub(super) const DEBIAN: Places = Places { zsh: "usr/share/zsh/vendor-completions" };
pub(super) const FEDORA: Places = Places { zsh: "usr/share/zsh/site-functions" };

/// Units of systemd: the daemon, its socket, and a daemon for one disk.
const UNITS: [(&str, &str); 3] = [
    ("blockmirror.service", include_str!("units/blockmirror.service")),
    ("blockmirror.socket", include_str!("units/blockmirror.socket")),
    ("blockmirror@.service", include_str!("units/blockmirror@.service")),
];

/// Documents of the repository that are installed.
const DOCUMENTS: [&str; 3] = ["README.md", "LIMITS.md", "SECURITY.md"];

/// A folder that stands for the root of a system.
pub(super) struct Tree {
    root: PathBuf,
}

impl Tree {
    /// An empty one; what was there goes.
    pub(super) fn new(root: PathBuf) -> Outcome<Self> {
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        let tree = Self { root };
        tree.folder(&tree.root)?;
        Ok(tree)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Makes `folder` and those above it, for all to read.
    fn folder(&self, folder: &Path) -> Outcome {
        if !folder.exists() {
            if let Some(above) = folder.parent() {
                self.folder(above)?;
            }
            fs::create_dir(folder)?;
            fs::set_permissions(folder, Permissions::from_mode(0o755))?;
        }
        Ok(())
    }

    /// A file at `path` below the root.
    pub(super) fn file(&self, path: &str, contents: &[u8], mode: u32) -> Outcome {
        let path = self.root.join(path);
        self.folder(path.parent().ok_or("no folder")?)?;
        fs::write(&path, contents)?;
        fs::set_permissions(&path, Permissions::from_mode(mode))?;
        Ok(())
    }

    /// A compressed file, the same bytes each time.
    pub(super) fn compressed(&self, path: &str, contents: &[u8]) -> Outcome {
        let mut gzip = GzBuilder::new().write(Vec::new(), Compression::best());
        gzip.write_all(contents)?;
        self.file(path, &gzip.finish()?, 0o644)
    }

    /// The command at `program`, and all that goes with it.
    pub(super) fn install(&self, program: &Path, places: &Places) -> Outcome {
        self.file("usr/bin/blockmirror", &fs::read(program)?, 0o755)?;
        // Not in PATH: a system has one qemu-img, and which one is its owner's choice.
        let folder = self.root.join("usr/lib/blockmirror");
        self.folder(&folder)?;
        symlink("../../bin/blockmirror", folder.join("qemu-img"))?;
        for page in pages::manual()? {
            self.compressed(&format!("usr/share/man/man1/{}.gz", page.name), &page.text)?;
        }
        let scripts = [
            (Shell::Bash, "usr/share/bash-completion/completions/blockmirror".to_owned()),
            (Shell::Zsh, format!("{}/_blockmirror", places.zsh)),
            (Shell::Fish, "usr/share/fish/vendor_completions.d/blockmirror.fish".to_owned()),
        ];
        for (shell, path) in scripts {
            self.file(&path, &pages::completion(shell), 0o644)?;
        }
        for (name, text) in UNITS {
            self.file(&format!("usr/lib/systemd/system/{name}"), text.as_bytes(), 0o644)?;
        }
        self.file("usr/lib/sysusers.d/blockmirror.conf", include_bytes!("units/sysusers.conf"), 0o644)?;
        for name in DOCUMENTS {
            let text = fs::read(workspace_root().join(name))?;
            self.file(&format!("usr/share/doc/blockmirror/{name}"), &text, 0o644)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    /// A unit whose daemon does not know an option would not start.
    #[test]
    fn the_command_takes_what_the_units_give() {
        let mut lines = 0;
        for (name, text) in UNITS {
            let joined = text.replace("\\\n", " ");
            for line in joined.lines().filter_map(|line| line.strip_prefix("ExecStart=/usr/bin/")) {
                let words = line.split_whitespace().filter(|word| !word.starts_with('$'));
                blockmirror_cli::definition()
                    .try_get_matches_from(words)
                    .unwrap_or_else(|e| panic!("{name}: {e}"));
                lines += 1;
            }
        }
        assert_eq!(lines, 2);
    }
}
