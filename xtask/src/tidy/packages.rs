//! Rules on packages: arrows between the crates, licences, lints, and a reason for every dependency.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockmirror_testing::Outcome;
use serde::Deserialize;

use super::map::Map;

/// Lints that the code relies on where a rule is not checked by reading the sources.
const DENIED: [&str; 4] = ["missing_docs", "unsafe_code", "unwrap_used", "expect_used"];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    license: Option<String>,
    description: Option<String>,
    manifest_path: PathBuf,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// `None` for a normal dependency, else `dev` or `build`.
    kind: Option<String>,
    /// Set if it is a package of this workspace.
    path: Option<PathBuf>,
}

/// Adds what is wrong with the packages below `root` to `found`.
pub(super) fn check(root: &Path, found: &mut Vec<String>) -> Outcome {
    let map = Map::parse(&fs::read_to_string(root.join("ARCHITECTURE.md"))?);
    let packages = metadata(root)?.packages;
    for package in &packages {
        let manifest = fs::read_to_string(&package.manifest_path)?;
        let place = package.manifest_path.strip_prefix(root).unwrap_or(&package.manifest_path).display();
        if package.license.as_deref() != Some("MIT OR Apache-2.0") {
            found.push(format!("{place}: the licence is not `MIT OR Apache-2.0`"));
        }
        if package.description.is_none() {
            found.push(format!("{place}: no description"));
        }
        if !manifest.contains("[lints]\nworkspace = true") {
            found.push(format!("{place}: does not take the workspace's lints"));
        }
    }
    let workspace = fs::read_to_string(root.join("Cargo.toml"))?;
    for lint in DENIED {
        if !workspace.contains(&format!("{lint} = \"deny\"")) {
            found.push(format!("Cargo.toml: lint {lint} is not denied"));
        }
    }
    arrows(&map, &packages, root, found);
    reasons(&map, &packages, found);
    Ok(())
}

/// The arrows of the manifests are those of the map, and all point to crates above.
fn arrows(map: &Map, packages: &[Package], root: &Path, found: &mut Vec<String>) {
    let crates: BTreeMap<String, &Package> = packages
        .iter()
        .filter_map(|p| {
            let folder = p.manifest_path.parent()?;
            let short = folder.strip_prefix(root.join("crates")).ok()?;
            Some((short.to_string_lossy().into_owned(), p))
        })
        .collect();
    let mut above = BTreeSet::new();
    for row in &map.crates {
        let Some(package) = crates.get(&row.name) else {
            found.push(format!("ARCHITECTURE.md: there is no crate `{}`", row.name));
            continue;
        };
        let real: BTreeSet<String> = package
            .dependencies
            .iter()
            .filter(|d| d.kind.as_deref() != Some("dev"))
            .filter_map(|d| d.path.as_ref()?.file_name().map(|n| n.to_string_lossy().into_owned()))
            .collect();
        let mapped: BTreeSet<String> = row.arrows.iter().cloned().collect();
        for arrow in real.difference(&mapped) {
            found.push(format!("crates/{}: the arrow to `{arrow}` is not in ARCHITECTURE.md", row.name));
        }
        for arrow in mapped.difference(&real) {
            found.push(format!("ARCHITECTURE.md: `{}` has no arrow to `{arrow}`", row.name));
        }
        for arrow in real.difference(&above) {
            found.push(format!("crates/{}: `{arrow}` does not lie above it in the map", row.name));
        }
        above.insert(row.name.clone());
    }
    for name in crates.keys().filter(|name| !above.contains(*name)) {
        found.push(format!("crates/{name}: not in the map of ARCHITECTURE.md"));
    }
}

/// Every dependency from outside has a line that says why, and every line a dependency.
fn reasons(map: &Map, packages: &[Package], found: &mut Vec<String>) {
    let used: BTreeSet<&str> = packages
        .iter()
        .flat_map(|p| &p.dependencies)
        .filter(|d| d.path.is_none())
        .map(|d| d.name.as_str())
        .collect();
    let mapped: BTreeSet<&str> = map.dependencies.iter().map(String::as_str).collect();
    for name in used.difference(&mapped) {
        found.push(format!("ARCHITECTURE.md: no reason for the dependency `{name}`"));
    }
    for name in mapped.difference(&used) {
        found.push(format!("ARCHITECTURE.md: nothing depends on `{name}`"));
    }
}

fn metadata(root: &Path) -> Outcome<Metadata> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let out = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(root)
        .output()
        .map_err(|e| format!("cannot run cargo metadata: {e}"))?;
    if !out.status.success() {
        return Err(format!("cargo metadata: {}", String::from_utf8_lossy(&out.stderr)).into());
    }
    Ok(serde_json::from_slice(&out.stdout)?)
}
