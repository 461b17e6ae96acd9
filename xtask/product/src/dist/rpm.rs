//! The RPM package: a spec that lists the files of the tree, packed by rpmbuild.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockmirror_testing::{Outcome, workspace_root};

use super::deb::{DESCRIPTION, SUMMARY, VERSION};
use super::program::build_dynamic;
use super::run;
use super::tree::{FEDORA, Tree};

pub(super) fn build(out: &Path) -> Outcome<PathBuf> {
    let program = build_dynamic(out)?;
    let tree = Tree::new(out.join("rpm-root"))?;
    tree.install(&program, &FEDORA)?;
    for license in ["LICENSE-MIT", "LICENSE-APACHE"] {
        let text = fs::read(workspace_root().join(license))?;
        tree.file(&format!("usr/share/licenses/blockmirror/{license}"), &text, 0o644)?;
    }
    let top = out.join("rpmbuild");
    fs::create_dir_all(&top)?;
    let spec = top.join("blockmirror.spec");
    fs::write(&spec, self::spec(tree.root()))?;
    let folders = [format!("_topdir {}", top.display()), format!("_rpmdir {}", out.display())];
    let mut command = Command::new("rpmbuild");
    command.args(["--quiet", "-bb"]);
    for folder in folders {
        command.arg("--define").arg(folder);
    }
    run(command.arg(&spec))?;
    let arch = std::env::consts::ARCH;
    Ok(out.join(arch).join(format!("blockmirror-{VERSION}-1.{arch}.rpm")))
}

/// `%install` copies the tree; nothing is compiled, and the symbols are split off already.
fn spec(root: &Path) -> String {
    let root = root.display();
    format!(
        "%global debug_package %{{nil}}\n%global __os_install_post %{{nil}}\n\
         Name: blockmirror\nVersion: {VERSION}\nRelease: 1\nSummary: {SUMMARY}\n\
         License: MIT OR Apache-2.0\nURL: https://github.com/blockmirror/blockmirror\n\n\
         %description\n{DESCRIPTION}\n\n\
         %install\nmkdir -p %{{buildroot}}\ncp -a {root}/. %{{buildroot}}/\n\n\
         %pre\ngetent passwd blockmirror >/dev/null || useradd --system --no-create-home \
         --home-dir /var/lib/blockmirror --shell /sbin/nologin blockmirror\nexit 0\n\n\
         %files\n%license /usr/share/licenses/blockmirror\n%doc /usr/share/doc/blockmirror\n\
         /usr/bin/blockmirror\n/usr/lib/blockmirror\n/usr/lib/systemd/system/blockmirror*\n\
         /usr/lib/sysusers.d/blockmirror.conf\n/usr/share/man/man1/blockmirror*\n\
         /usr/share/bash-completion/completions/blockmirror\n/usr/share/zsh/site-functions/_blockmirror\n\
         /usr/share/fish/vendor_completions.d/blockmirror.fish\n"
    )
}
