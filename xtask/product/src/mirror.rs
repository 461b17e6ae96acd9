//! `cargo xtask mirror`: the main job. With arguments it is `blockmirror mirror`; without, it shows the job
//! on an image from `testdata/` and verifies the copy, which needs neither arguments nor QEMU.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use blockmirror_testing::Outcome;
use blockmirror_testing::content::hash_file;
use blockmirror_testing::scratch::scratch;
use blockmirror_testing::testdata::{Manifest, folder};

use crate::Task;

/// The image that is shown: version 3, three layers, clusters of 64 KiB.
const SHOWN: &str = "v3-64k-chain.qcow2";

/// Run `blockmirror mirror`; without arguments, mirror an image from testdata/ and verify the copy
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Mirror {
    /// What `blockmirror mirror` takes; `--help` lists it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

/// Run `blockmirror convert`, for `bench`
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Convert {
    /// What `blockmirror convert` takes
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

impl Task for Convert {
    fn run(self) -> Outcome<ExitCode> {
        let words = ["blockmirror", "convert"].map(OsString::from);
        Ok(blockmirror_cli::run_here(words.into_iter().chain(self.args)))
    }
}

impl Task for Mirror {
    fn run(self) -> Outcome<ExitCode> {
        if self.args.is_empty() {
            return show();
        }
        let words = ["blockmirror", "mirror"].map(OsString::from);
        Ok(blockmirror_cli::run_here(words.into_iter().chain(self.args)))
    }
}

fn show() -> Outcome<ExitCode> {
    let manifest = Manifest::load(&folder())?;
    let entry = manifest.entry(SHOWN)?;
    let dir = scratch()?;
    let source = entry.unpack(&folder(), dir.path())?;
    let target = dir.path().join("copy.qcow2");
    println!("testdata/{SHOWN}, unpacked: a disk of {} bytes in three layers.", entry.virtual_size);

    println!("\n$ blockmirror mirror {SHOWN} copy.qcow2");
    command("mirror", &[], &[&source, &target])?;
    println!("\n$ blockmirror compare {SHOWN} copy.qcow2");
    command("compare", &[], &[&source, &target])?;

    // The stored checksum is what QEMU read when the image was made: a judge that is not this program.
    let raw = dir.path().join("copy.raw");
    command("convert", &["-q", "-f", "qcow2", "-O", "raw"], &[&target, &raw])?;
    let (found, wanted) = (hash_file(&raw)?, entry.content_blake3.as_deref().unwrap_or_default());
    if found != wanted {
        return Err(format!("the copy has checksum {found}, testdata/MANIFEST.json has {wanted}").into());
    }
    println!("\nThe copy has the checksum that testdata/MANIFEST.json has for this disk: {}..", &found[..16]);
    Ok(ExitCode::SUCCESS)
}

fn command(name: &str, options: &[&str], files: &[&Path]) -> Outcome {
    let words = ["blockmirror", name].into_iter().chain(options.iter().copied()).map(OsStr::new);
    let words = words.chain(files.iter().map(|f| f.as_os_str()));
    let code = blockmirror_cli::run(words, &mut std::io::stdout(), &mut std::io::stderr());
    if code == 0 { Ok(()) } else { Err(format!("blockmirror {name} ended with exit code {code}").into()) }
}
