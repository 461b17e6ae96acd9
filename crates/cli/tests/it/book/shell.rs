//! The commands of a page in one bash, in a fresh folder.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::page::{Page, Printed};

/// No page takes longer on a machine that works at all.
const LIMIT: Duration = Duration::from_secs(120);
/// Marks the processes of a page.
const MARK: &str = "BLOCKMIRROR_PAGE";
/// What would change what commands do.
const REMOVED: [&str; 4] =
    ["RUST_LOG", "NOTIFY_SOCKET", "BLOCKMIRROR_ALLOW_BACKING", "QEMU_IMG_DEFAULT_CACHE"];

/// Where a page is run. Its processes are killed when this is dropped, also those that have left the shell.
pub(crate) struct Shell {
    /// The page's own folder is in it, and what its commands print.
    dir: tempfile::TempDir,
    mark: String,
}

impl Shell {
    /// In a folder on a disk: some commands say more in memory.
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").or_else(|_| tempfile::tempdir()).unwrap();
        fs::create_dir(dir.path().join("page")).unwrap();
        let mark = format!("{MARK}={}", dir.path().display());
        Self { dir, mark }
    }

    /// What each command of `page` has printed, until one ends with another exit code than it says; with
    /// `go_on` of all. `bin` is the folder with our command.
    ///
    /// # Panics
    /// If it does not end.
    pub(crate) fn run(&self, page: &Page, bin: &Path, go_on: bool) -> Vec<Printed> {
        let mut script = String::from("set -o pipefail\n");
        for (number, step) in page.steps.iter().enumerate() {
            let (file, printed, code) =
                (self.file(number, "sh"), self.file(number, "out"), self.file(number, "code"));
            fs::write(&file, format!("{}\n", step.command)).unwrap();
            let (file, printed, code) = (file.display(), printed.display(), code.display());
            writeln!(script, ". '{file}' >'{printed}' 2>&1; echo $? >'{code}'").unwrap();
            if !go_on {
                writeln!(script, "[ $(cat '{code}') = {} ] || exit", step.wanted.exit_code).unwrap();
            }
        }
        let whole = self.dir.path().join("page.sh");
        fs::write(&whole, script).unwrap();
        let home = self.dir.path().join("page");
        let mut command = Command::new("bash");
        command.arg(whole).current_dir(&home).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", bin.display()));
        command.env("HOME", &home).env("XDG_RUNTIME_DIR", self.dir.path()).env("LC_ALL", "C.UTF-8");
        command.env(MARK, self.dir.path());
        REMOVED.iter().for_each(|name| _ = command.env_remove(name));
        let mut child = command.spawn().unwrap();
        let deadline = Instant::now() + LIMIT;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                let ran = (0..page.steps.len()).take_while(|step| self.file(*step, "code").exists()).count();
                panic!(
                    "line {}: still runs after {LIMIT:?}: {}",
                    page.steps[ran].line, page.steps[ran].command
                );
            }
            thread::sleep(Duration::from_millis(2));
        }
        (0..page.steps.len()).map_while(|step| self.printed(step)).collect()
    }

    fn file(&self, step: usize, what: &str) -> PathBuf {
        self.dir.path().join(format!("{step}.{what}"))
    }

    /// What a command that has ended, or was left in the background, has printed by now.
    fn printed(&self, step: usize) -> Option<Printed> {
        let exit_code = fs::read_to_string(self.file(step, "code")).ok()?.trim().parse().unwrap();
        let text = fs::read(self.file(step, "out")).unwrap();
        // When bash says of a background command that it was killed is up to chance.
        let notice = format!("{}/", self.dir.path().display());
        let is_notice = |line: &&str| line.starts_with(&notice) && line.contains(".sh: line ");
        let text = String::from_utf8_lossy(&text);
        let lines = text.lines().filter(|line| !(is_notice(line) && line.contains(" Killed ")));
        let lines = lines.map(|line| line.trim_end().to_owned()).collect();
        Some(Printed { lines, exit_code })
    }

    /// The processes of the page that there are.
    fn processes(&self) -> Vec<String> {
        let ids = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
        let ours = ids.filter(|process| {
            let environment = fs::read(process.join("environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|entry| entry == self.mark.as_bytes())
        });
        ours.filter_map(|process| Some(process.file_name()?.to_str()?.to_owned()))
            .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
            .collect()
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let deadline = Instant::now() + LIMIT;
        // One of them may have started another meanwhile.
        loop {
            let processes = self.processes();
            if processes.is_empty() || Instant::now() > deadline {
                return;
            }
            let _ = Command::new("kill").arg("-KILL").args(processes).stderr(Stdio::null()).status();
            thread::sleep(Duration::from_millis(1));
        }
    }
}
