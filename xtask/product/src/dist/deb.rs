//! The Debian package.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockmirror_testing::{Outcome, workspace_root};

use super::program::build_dynamic;
use super::run;
use super::tree::{DEBIAN, Tree};

pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");
pub(super) const SUMMARY: &str = "copy virtual disk images, also while they are in use";
pub(super) const DESCRIPTION: &str = "\
blockmirror converts, compares, checks and repairs raw and qcow2 images, and
mirrors disks that are in use: a daemon serves them over NBD and speaks QMP.
Options and commands are those of qemu-img and qemu-storage-daemon where they
mean the same.";
const MAINTAINER: &str = "The blockmirror maintainers <maintainers@blockmirror.example>";

/// Makes the user that the units name.
const POSTINST: &str = "\
#!/bin/sh
set -e
if [ \"$1\" = configure ] && command -v systemd-sysusers >/dev/null; then
    systemd-sysusers blockmirror.conf
fi
exit 0
";

pub(super) fn build(out: &Path) -> Outcome<PathBuf> {
    let program = build_dynamic(out)?;
    let tree = Tree::new(out.join("deb"))?;
    tree.install(&program, &DEBIAN)?;
    tree.file("usr/share/doc/blockmirror/copyright", copyright()?.as_bytes(), 0o644)?;
    let changes = fs::read(workspace_root().join("CHANGELOG.md"))?;
    tree.compressed("usr/share/doc/blockmirror/changelog.gz", &changes)?;
    tree.compressed("usr/share/doc/blockmirror/changelog.Debian.gz", debian_changelog()?.as_bytes())?;
    let depends = shared_libraries(&program, out)?;
    let architecture = printed(Command::new("dpkg").arg("--print-architecture"))?;
    let description = DESCRIPTION.replace('\n', "\n ");
    let size = installed_kib(tree.root())?;
    let control = format!(
        "Package: blockmirror\nVersion: {VERSION}-1\nArchitecture: {architecture}\nMaintainer: {MAINTAINER}\n\
         Installed-Size: {size}\nDepends: {depends}\nSection: utils\nPriority: optional\n\
         Homepage: https://github.com/blockmirror/blockmirror\nDescription: {SUMMARY}\n {description}\n"
    );
    tree.file("DEBIAN/control", control.as_bytes(), 0o644)?;
    tree.file("DEBIAN/postinst", POSTINST.as_bytes(), 0o755)?;
    let sums = sums(tree.root())?;
    tree.file("DEBIAN/md5sums", sums.as_bytes(), 0o644)?;
    let package = out.join(format!("blockmirror_{VERSION}-1_{architecture}.deb"));
    run(Command::new("dpkg-deb").args(["--root-owner-group", "--build"]).arg(tree.root()).arg(&package))?;
    Ok(package)
}

/// One entry, of the last commit's date.
fn debian_changelog() -> Outcome<String> {
    let mut git = Command::new("git");
    let date = printed(git.current_dir(workspace_root()).args(["log", "-1", "--format=%aD"]))?;
    // A day has two digits here.
    let date = match date.split_once(", ") {
        Some((day, rest)) if rest.as_bytes().get(1) == Some(&b' ') => format!("{day}, 0{rest}"),
        _ => date,
    };
    Ok(format!(
        "blockmirror ({VERSION}-1) unstable; urgency=medium\n\n  * {VERSION}; changelog.gz has the changes.\n\n \
         -- {MAINTAINER}  {date}\n"
    ))
}

fn copyright() -> Outcome<String> {
    let mit = fs::read_to_string(workspace_root().join("LICENSE-MIT"))?;
    let lines = mit.lines().map(|line| if line.trim().is_empty() { " .".into() } else { format!(" {line}") });
    let mit: Vec<String> = lines.collect();
    Ok(format!(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\
         Upstream-Name: blockmirror\nSource: https://github.com/blockmirror/blockmirror\n\n\
         Files: *\nCopyright: 2026 The blockmirror authors\nLicense: MIT or Apache-2.0\n\n\
         License: MIT\n{}\n\nLicense: Apache-2.0\n On Debian systems the text of this license is in\n \
         /usr/share/common-licenses/Apache-2.0.\n",
        mit.join("\n")
    ))
}

/// What the program is linked with, as packages.
fn shared_libraries(program: &Path, out: &Path) -> Outcome<String> {
    // dpkg-shlibdeps looks for a source package around it.
    let source = out.join("shlibdeps");
    fs::create_dir_all(source.join("debian"))?;
    fs::write(
        source.join("debian/control"),
        "Source: blockmirror\n\nPackage: blockmirror\nArchitecture: any\n",
    )?;
    let mut command = Command::new("dpkg-shlibdeps");
    let printed = printed(command.current_dir(&source).arg("-O").arg(program))?;
    Ok(printed.trim_start_matches("shlibs:Depends=").to_owned())
}

/// What `command` prints, without the last line break.
fn printed(command: &mut Command) -> Outcome<String> {
    let output = command.output().map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}

fn installed_kib(root: &Path) -> Outcome<u64> {
    let printed = printed(Command::new("du").args(["-k", "--apparent-size", "-s"]).arg(root))?;
    Ok(printed.split_whitespace().next().unwrap_or_default().parse()?)
}

fn sums(root: &Path) -> Outcome<String> {
    let script = "find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum";
    Ok(printed(Command::new("sh").current_dir(root).args(["-c", script]))? + "\n")
}
