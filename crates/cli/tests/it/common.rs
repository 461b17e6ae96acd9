//! A folder to work in, our command inside the test's process, and QEMU's tools beside it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(dead_code, reason = "each test program uses a part")]

use std::path::PathBuf;
use std::process::Command;

use blockmirror_testing::qemu::have;

/// What a command left behind.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// A folder. In arguments, a word that starts with `@` is a file in it.
pub(crate) struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// A folder inside `dir`.
    pub(crate) fn within(dir: &std::path::Path) -> Self {
        Self { dir: tempfile::tempdir_in(dir).unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn words(&self, line: &str) -> Vec<String> {
        let here = self.dir.path().to_str().unwrap();
        line.split(' ').map(|word| word.replace('@', &format!("{here}/"))).collect()
    }

    /// Runs `blockmirror` with the words of `line`.
    pub(crate) fn ours(&self, line: &str) -> Ran {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let words = std::iter::once("blockmirror".to_owned()).chain(self.words(line));
        let code = i32::from(blockmirror_cli::run(words, &mut out, &mut err));
        Ran { code, out: String::from_utf8(out).unwrap(), err: String::from_utf8(err).unwrap() }
    }

    /// Runs `blockmirror`, which must end well; returns what it printed.
    pub(crate) fn ours_ok(&self, line: &str) -> String {
        let ran = self.ours(line);
        assert_eq!(ran.code, 0, "{line}: {ran:?}");
        ran.out
    }

    /// Runs `blockmirror`, which must fail with `code` and one line; returns the line without the folder.
    pub(crate) fn ours_fails(&self, line: &str, code: i32) -> String {
        let ran = self.ours(line);
        assert_eq!(ran.code, code, "{line}: {ran:?}");
        assert_eq!(ran.err.lines().count(), 1, "{line}: {ran:?}");
        let real = std::fs::canonicalize(self.dir.path()).unwrap();
        ran.err.trim_end().replace(&format!("{}/", real.display()), "@").replace(real.to_str().unwrap(), "@")
    }

    /// Runs `blockmirror`, which must fail with `code`; returns all that it says.
    pub(crate) fn ours_error(&self, line: &str, code: i32) -> String {
        let ran = self.ours(line);
        assert_eq!(ran.code, code, "{line}: {ran:?}");
        ran.err
    }

    /// Runs one of QEMU's tools.
    pub(crate) fn theirs(&self, tool: &str, line: &str) -> Ran {
        let output = Command::new(tool).args(self.words(line)).output().unwrap();
        Ran {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs `qemu-img`, which must end well.
    pub(crate) fn img(&self, line: &str) -> String {
        let ran = self.theirs("qemu-img", line);
        assert_eq!(ran.code, 0, "qemu-img {line}: {ran:?}");
        ran.out
    }

    /// Runs `qemu-io` on the image `name`.
    pub(crate) fn io(&self, name: &str, commands: &[&str]) {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let output = Command::new("qemu-io").args(commands).arg(self.path(name)).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// The same, of an image in `format`.
    pub(crate) fn io_as(&self, format: &str, name: &str, commands: &[&str]) {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let output = Command::new("qemu-io")
            .args(["-f", format])
            .args(commands)
            .arg(self.path(name))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// Names of the files in the folder, in order.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Whether QEMU's tools can be run; without them `test` is skipped.
pub(crate) fn have_qemu(test: &str) -> bool {
    have(test, &["qemu-img", "qemu-io"])
}
