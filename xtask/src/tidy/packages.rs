//! Rules on packages: arrows between the crates, licences, lints, and a reason for every dependency.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use blockmirror_testing::Outcome;
use cargo_metadata::camino::Utf8Path;
use cargo_metadata::{DependencyKind, MetadataCommand, Package};

use super::map::Map;
use crate::readme;

/// Lints that the code relies on where a rule is not checked by reading the sources.
const DENIED: [&str; 4] = ["missing_docs", "unsafe_code", "unwrap_used", "expect_used"];

/// Adds what is wrong with the packages below `root` to `found`.
pub(super) fn check(root: &Path, found: &mut Vec<String>) -> Outcome {
    let map = Map::parse(&fs::read_to_string(root.join("ARCHITECTURE.md"))?);
    let packages = MetadataCommand::new().current_dir(root).no_deps().exec()?.packages;
    for package in &packages {
        let manifest = fs::read_to_string(&package.manifest_path)?;
        let place = package.manifest_path.strip_prefix(root).unwrap_or(&package.manifest_path);
        if package.license.as_deref() != Some("MIT OR Apache-2.0") {
            found.push(format!("{place}: the licence is not `MIT OR Apache-2.0`"));
        }
        if package.description.is_none() {
            found.push(format!("{place}: no description"));
        }
        if !manifest.contains("[lints]\nworkspace = true") {
            found.push(format!("{place}: does not take the workspace's lints"));
        }
        // A list of registries, even an empty one, says that it is not for all.
        if package.publish.is_none() {
            published(package, place, root, found)?;
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

/// What a reader of the registry looks for: a README that is the front page, both licences, and where it
/// belongs.
fn published(package: &Package, place: &Utf8Path, root: &Path, found: &mut Vec<String>) -> Outcome {
    let folder = package.manifest_path.with_file_name("");
    let source = fs::read_to_string(folder.join("src/lib.rs"))?;
    let text = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
    if text("README.md") != readme::of_front_page(&package.name, &source) {
        found.push(format!(
            "{place}: README.md is not the front page of src/lib.rs (cargo xtask docs writes it)"
        ));
    }
    for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
        if text(licence) != fs::read_to_string(root.join(licence))? {
            found.push(format!("{place}: no {licence} beside it that is the workspace's"));
        }
    }
    for (what, given) in [("keywords", &package.keywords), ("categories", &package.categories)] {
        if given.is_empty() || given.len() > 5 {
            found.push(format!("{place}: {what}: between one and five"));
        }
    }
    if !source.contains("//! ```\n") && !source.contains("//! ```no_run\n") {
        found.push(format!("{place}: no example on the front page of src/lib.rs"));
    }
    Ok(())
}

/// The arrows of the manifests are those of the map, and all point to crates above.
fn arrows(map: &Map, packages: &[Package], root: &Path, found: &mut Vec<String>) {
    let crates: BTreeMap<String, &Package> = packages
        .iter()
        .filter_map(|p| {
            let folder = p.manifest_path.parent()?;
            let short = folder.strip_prefix(root.join("crates")).ok()?;
            Some((short.to_string(), p))
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
            .filter(|d| d.kind != DependencyKind::Development)
            .filter_map(|d| d.path.as_ref()?.file_name().map(str::to_owned))
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
