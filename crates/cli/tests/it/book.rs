//! docs/book: the commands of each page print what stands below them. CONTRIBUTING.md ("The book") has the
//! format.
//!
//! With `TRANSCRIPT_RECORD=1` what has changed is written into the page.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

mod page;
mod reference;
mod shell;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockmirror_testing::{skip, skip_unsupported, workspace_root};

use page::{Page, Printed};
use shell::Shell;

/// One test for each page with commands: `convert` runs `convert.md`, `start_here` runs `start-here.md`.
macro_rules! pages {
    ($($page:ident)*) => {
        $(#[test] fn $page() { run(stringify!($page)); })*
        const PAGES: &[&str] = &[$(stringify!($page)),*];
    };
}

pages! {
    convert
    copies_that_survive
    from_qemu_img
    images_from_strangers
    start_here
    mirror_a_running_disk
    replicate
    recover
    from_qemu_storage_daemon
    tls
    troubleshooting
}

fn folder() -> PathBuf {
    workspace_root().join("docs/book/src")
}

#[test]
fn every_page_is_run() {
    for file in fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()) {
        let test = file.file_stem().unwrap().to_str().unwrap().replace('-', "_");
        let page = Page::parse(&fs::read_to_string(&file).unwrap());
        let is_run = PAGES.contains(&test.as_str());
        assert_eq!(!page.steps.is_empty(), is_run, "{}: its line in `pages!`", file.display());
    }
}

fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Whether a command can confine itself, tried on any `file`.
fn has_sandbox(bin: &Path, file: &Path) -> bool {
    let tried = Command::new(bin.join("blockmirror"))
        .args(["info", "--limits=untrusted", "-f", "raw"])
        .arg(file)
        .output()
        .unwrap();
    !String::from_utf8_lossy(&tried.stderr).contains("no-sandbox")
}

fn run(test: &str) {
    let file = folder().join(format!("{}.md", test.replace('_', "-")));
    let page = Page::parse(&fs::read_to_string(&file).unwrap());
    if let Some(missing) = page.needs.iter().find(|program| !is_there(program)) {
        return skip(test, format_args!("{missing} is not there"));
    }
    let bin = Path::new(env!("CARGO_BIN_EXE_blockmirror")).parent().unwrap();
    if page.needs_sandbox && !has_sandbox(bin, &file) {
        return skip_unsupported(format_args!("{test}: the kernel has no sandbox"));
    }
    let record = std::env::var_os("TRANSCRIPT_RECORD").is_some();
    let shell = Shell::new();
    let real = shell.run(&page, bin, record);
    let mut wrong = String::new();
    let mut new = Vec::new();
    for (step, real) in page.steps.iter().zip(real) {
        let fits = step.wanted.fits(&real);
        if !fits {
            let place = file.strip_prefix(workspace_root()).unwrap().display();
            let (wanted, printed) = (shown(&step.wanted), shown(&real));
            writeln!(
                wrong,
                "{place}:{}: {}\nthe page:\n{wanted}printed:\n{printed}",
                step.line, step.command
            )
            .unwrap();
        }
        new.push((!fits).then_some(real));
    }
    if record {
        return fs::write(&file, page.with(&new)).unwrap();
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert_eq!(new.len(), page.steps.len(), "commands that ran");
}

fn shown(printed: &Printed) -> String {
    let lines = printed.lines.iter().map(|line| format!("    {line}\n"));
    lines.chain([format!("    # exit {}\n", printed.exit_code)]).collect()
}
