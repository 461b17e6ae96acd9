//! Rules on the structure of the sources: sizes of files and functions, where modules lie, names of types,
//! circles between modules.
//!
//! Two sibling modules form a circle if each uses the other, directly or through further siblings; what lies
//! inside of a module counts as the module. Paths are read as text: a glob import is an arrow to the module
//! it names, a re-export one to where the name comes from.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use blockmirror_testing::Outcome;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// Most lines of a file, tests included. Half of it is already a lot.
const MOST_LINES: usize = 600;
/// Most lines of a function.
const MOST_FUNCTION_LINES: usize = 70;

/// A path of modules below a crate's root.
type ModulePath = Vec<String>;

/// Adds what is wrong with the sources below `root` to `found`.
pub(super) fn check(root: &Path, found: &mut Vec<String>) -> Outcome {
    for source in sources_of_crates(root)? {
        let place = |path: &Path| path.strip_prefix(root).unwrap_or(path).display().to_string();
        let mut modules = Vec::new();
        for path in rust_files(&source)? {
            let text = fs::read_to_string(&path)?;
            let file = syn::parse_file(&text).map_err(|error| format!("{}: {error}", place(&path)))?;
            size(&place(&path), &text, &file, found);
            if path.file_name().is_some_and(|name| name == "mod.rs") {
                found.push(format!("{}: `foo.rs` beside `foo/` holds a module", place(&path)));
            }
            modules.push(Module { path: module_path(&source, &path), place: place(&path), file });
        }
        unique_types(&place(&source), &modules, found);
        circles(&place(&source), &modules, found);
    }
    for tests in test_folders(root)? {
        for path in rust_files(&tests)? {
            let text = fs::read_to_string(&path)?;
            let place = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            let file = syn::parse_file(&text).map_err(|error| format!("{place}: {error}"))?;
            size(&place, &text, &file, found);
        }
    }
    Ok(())
}

/// A file of a crate.
struct Module {
    path: ModulePath,
    place: String,
    file: syn::File,
}

/// The `src` folders of all packages.
fn sources_of_crates(root: &Path) -> Outcome<Vec<PathBuf>> {
    let mut packages: Vec<PathBuf> =
        ["xtask", "xtask/fuzz", "xtask/product", "tests", "tests/crash"].map(|name| root.join(name)).into();
    for entry in fs::read_dir(root.join("crates"))? {
        packages.push(entry?.path());
    }
    packages.sort();
    Ok(packages.into_iter().map(|package| package.join("src")).filter(|source| source.is_dir()).collect())
}

/// The folders of integration tests, examples and benchmarks.
fn test_folders(root: &Path) -> Outcome<Vec<PathBuf>> {
    let packages = sources_of_crates(root)?;
    let beside = |source: &PathBuf| ["tests", "examples"].map(|name| source.with_file_name(name));
    Ok(packages.iter().flat_map(beside).filter(|folder| folder.is_dir()).collect())
}

fn rust_files(folder: &Path) -> Outcome<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Where a file stands in its crate: `src/a/b.rs` is `a::b`, `src/lib.rs` the root.
fn module_path(source: &Path, file: &Path) -> ModulePath {
    let inside = file.strip_prefix(source).unwrap_or(file).with_extension("");
    let mut path: ModulePath = inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if path.last().is_some_and(|last| last == "mod")
        || matches!(&*path, [one] if one == "lib" || one == "main")
    {
        path.pop();
    }
    path
}

fn size(place: &str, text: &str, file: &syn::File, found: &mut Vec<String>) {
    let lines = text.lines().count();
    if lines > MOST_LINES {
        found.push(format!("{place}: {lines} lines, {MOST_LINES} are the most"));
    }
    let mut functions = Functions { place, found };
    functions.visit_file(file);
}

struct Functions<'a> {
    place: &'a str,
    found: &'a mut Vec<String>,
}

impl Functions<'_> {
    fn check(&mut self, name: &syn::Ident, from: proc_macro2::Span, to: proc_macro2::Span) {
        let lines = to.end().line + 1 - from.start().line;
        if lines > MOST_FUNCTION_LINES {
            let place = self.place;
            self.found.push(format!("{place}: function `{name}` is longer than {MOST_FUNCTION_LINES} lines"));
        }
    }
}

impl<'ast> Visit<'ast> for Functions<'_> {
    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.check(&function.sig.ident, function.sig.span(), function.block.span());
        visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.check(&function.sig.ident, function.sig.span(), function.block.span());
        visit::visit_impl_item_fn(self, function);
    }
}

/// Whether an item is compiled for tests only.
fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let syn::Meta::List(list) = &attribute.meta else { return false };
        list.path.is_ident("cfg") && list.tokens.to_string().contains("test")
    })
}

/// Files that are modules for tests only, or lie below one.
fn test_modules(modules: &[Module]) -> BTreeSet<ModulePath> {
    let mut tests = BTreeSet::new();
    for module in modules {
        for item in &module.file.items {
            if let syn::Item::Mod(inner) = item
                && is_test(&inner.attrs)
            {
                let mut path = module.path.clone();
                path.push(inner.ident.to_string());
                tests.insert(path);
            }
        }
    }
    tests
}

fn is_below(path: &[String], roots: &BTreeSet<ModulePath>) -> bool {
    (1..=path.len()).any(|len| roots.contains(&path[..len]))
}

/// One name, one type among those that more than one module can see.
fn unique_types(place: &str, modules: &[Module], found: &mut Vec<String>) {
    let tests = test_modules(modules);
    let mut names: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for module in modules.iter().filter(|module| !is_below(&module.path, &tests)) {
        for item in &module.file.items {
            let (visibility, name) = match item {
                syn::Item::Struct(item) => (&item.vis, &item.ident),
                syn::Item::Enum(item) => (&item.vis, &item.ident),
                syn::Item::Trait(item) => (&item.vis, &item.ident),
                syn::Item::Union(item) => (&item.vis, &item.ident),
                _ => continue,
            };
            if !matches!(visibility, syn::Visibility::Inherited) {
                names.entry(name.to_string()).or_default().push(&module.place);
            }
        }
    }
    for (name, places) in names.into_iter().filter(|(_, places)| places.len() > 1) {
        found.push(format!("{place}: `{name}` names {} types: {}", places.len(), places.join(", ")));
    }
}

/// What one file refers to.
struct Paths {
    module: ModulePath,
    /// Absolute paths inside of the crate.
    used: BTreeSet<ModulePath>,
    /// Names that this module re-exports, and where they come from.
    exported: Vec<(String, ModulePath)>,
}

impl Paths {
    /// The absolute path of `path` as it is written in this module; `None` if it leads out of the crate.
    fn resolve(&self, path: &[String]) -> Option<ModulePath> {
        let (first, rest) = path.split_first()?;
        let mut base = match &**first {
            "crate" => Vec::new(),
            "self" => self.module.clone(),
            "super" => {
                let mut base = self.module.clone();
                base.pop()?;
                let mut rest = rest;
                while let Some((next, after)) = rest.split_first()
                    && next == "super"
                {
                    base.pop()?;
                    rest = after;
                }
                base.extend(rest.iter().cloned());
                return Some(base);
            }
            // A child of this module, perhaps; other crates are sorted out by the caller.
            _ => {
                let mut base = self.module.clone();
                base.push(first.clone());
                base
            }
        };
        base.extend(rest.iter().cloned());
        Some(base)
    }

    fn tree(&mut self, tree: &syn::UseTree, before: &mut Vec<String>, exports: bool) {
        match tree {
            syn::UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.tree(&path.tree, before, exports);
                before.pop();
            }
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.tree(tree, before, exports);
                }
            }
            syn::UseTree::Name(name) => self.leaf(&name.ident, &name.ident, before, exports),
            syn::UseTree::Rename(name) => self.leaf(&name.ident, &name.rename, before, exports),
            syn::UseTree::Glob(_) => self.used.extend(self.resolve(before)),
        }
    }

    fn leaf(&mut self, name: &syn::Ident, seen_as: &syn::Ident, before: &[String], exports: bool) {
        let mut path = before.to_vec();
        if name != "self" {
            path.push(name.to_string());
        }
        if let Some(path) = self.resolve(&path) {
            if exports {
                self.exported.push((seen_as.to_string(), path.clone()));
            }
            self.used.insert(path);
        }
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_test(&module.attrs) {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if !is_test(&item.attrs) {
            let exports = !matches!(item.vis, syn::Visibility::Inherited);
            self.tree(&item.tree, &mut Vec::new(), exports);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let parts: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if path.leading_colon.is_none() && parts.len() > 1 {
            self.used.extend(self.resolve(&parts));
        }
        visit::visit_path(self, path);
    }
}

/// Finds sibling modules that use each other.
fn circles(place: &str, modules: &[Module], found: &mut Vec<String>) {
    let tests = test_modules(modules);
    let mut all = Vec::new();
    for module in modules.iter().filter(|module| !is_below(&module.path, &tests)) {
        let mut paths = Paths { module: module.path.clone(), used: BTreeSet::new(), exported: Vec::new() };
        paths.visit_file(&module.file);
        all.push(paths);
    }
    let known: BTreeSet<&ModulePath> = all.iter().map(|paths| &paths.module).collect();
    let exports: BTreeMap<ModulePath, &ModulePath> = all
        .iter()
        .flat_map(|paths| {
            paths.exported.iter().map(|(name, from)| {
                let mut path = paths.module.clone();
                path.push(name.clone());
                (path, from)
            })
        })
        .collect();
    // Arrows between siblings, by their parent.
    let mut arrows: BTreeMap<(ModulePath, String), BTreeSet<String>> = BTreeMap::new();
    for paths in &all {
        for used in &paths.used {
            let target = home(used, &exports, &known);
            let shared = paths.module.iter().zip(&target).take_while(|(a, b)| a == b).count();
            if let (Some(from), Some(to)) = (paths.module.get(shared), target.get(shared)) {
                let parent = target[..shared].to_vec();
                arrows.entry((parent, from.clone())).or_default().insert(to.clone());
            }
        }
    }
    for group in groups(&arrows) {
        found.push(format!("{place}: modules in a circle: {}", group.join(", ")));
    }
}

/// The module in which what `path` names is defined.
fn home(
    path: &[String],
    exports: &BTreeMap<ModulePath, &ModulePath>,
    known: &BTreeSet<&ModulePath>,
) -> ModulePath {
    let mut path = path.to_vec();
    // Longer chains of re-exports than this do not occur.
    for _ in 0..8 {
        let longest = (1..=path.len()).rev().find(|len| exports.contains_key(&path[..*len]));
        let Some((len, from)) = longest.and_then(|len| Some((len, *exports.get(&path[..len])?))) else {
            break;
        };
        if *from == path[..len] {
            break;
        }
        path = from.iter().chain(&path[len..]).cloned().collect();
    }
    while !path.is_empty() && !known.contains(&path) {
        path.pop();
    }
    path
}

/// Groups of siblings each of which reaches all others of its group.
fn groups(arrows: &BTreeMap<(ModulePath, String), BTreeSet<String>>) -> Vec<Vec<String>> {
    let reach = |parent: &ModulePath, from: &String| {
        let mut reached = BTreeSet::new();
        let mut next = vec![from.clone()];
        while let Some(module) = next.pop() {
            for to in arrows.get(&(parent.clone(), module)).into_iter().flatten() {
                if reached.insert(to.clone()) {
                    next.push(to.clone());
                }
            }
        }
        reached
    };
    let mut groups = BTreeSet::new();
    for (parent, from) in arrows.keys() {
        let reached = reach(parent, from);
        if !reached.contains(from) {
            continue;
        }
        let group: Vec<String> = reached
            .iter()
            .filter(|to| reach(parent, to).contains(from))
            .map(|name| parent.iter().chain([name]).cloned().collect::<Vec<_>>().join("::"))
            .collect();
        if group.len() > 1 {
            groups.insert(group);
        }
    }
    groups.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(path: &str, text: &str) -> Module {
        let path = path.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
        Module { path, place: "f.rs".into(), file: syn::parse_file(text).unwrap() }
    }

    fn circles_of(modules: &[Module]) -> Vec<String> {
        let mut found = Vec::new();
        circles("c", modules, &mut found);
        found
    }

    #[test]
    fn siblings_that_use_each_other_are_found_through_children_and_re_exports() {
        let root = || module("", "mod a; mod b; pub use b::inner::Thing;");
        let below = "pub struct Thing;";
        let one_way = [root(), module("a", "use crate::Thing;"), module("b", ""), module("b::inner", below)];
        assert!(circles_of(&one_way).is_empty());
        let back = format!("{below} fn f() {{ crate::a::g(); }}");
        let both = [root(), module("a", "use crate::Thing;"), module("b", ""), module("b::inner", &back)];
        assert_eq!(circles_of(&both), ["c: modules in a circle: a, b"]);
    }

    #[test]
    fn a_parent_and_its_child_are_no_circle() {
        let parent = module("a", "mod b; use b::B; pub struct A;");
        assert!(
            circles_of(&[module("", "mod a;"), parent, module("a::b", "use super::A; pub struct B;")])
                .is_empty()
        );
    }

    #[test]
    fn tests_draw_no_arrows() {
        let a = module("a", "#[cfg(test)] mod tests { use crate::b::B; }");
        assert!(
            circles_of(&[module("", "mod a; mod b;"), a, module("b", "use crate::a::A; pub struct B;")])
                .is_empty()
        );
    }

    #[test]
    fn long_functions_and_doubled_names_are_found() {
        let mut found = Vec::new();
        let text = format!("fn f() {{\n{}}}\n", "    g();\n".repeat(70));
        size("f.rs", &text, &syn::parse_file(&text).unwrap(), &mut found);
        assert_eq!(found, ["f.rs: function `f` is longer than 70 lines"]);
        found.clear();
        unique_types(
            "c",
            &[module("a", "pub struct S;"), module("b", "enum S {} pub(crate) enum T {}")],
            &mut found,
        );
        assert!(found.is_empty());
        unique_types("c", &[module("a", "pub struct T;"), module("b", "pub(crate) enum T {}")], &mut found);
        assert_eq!(found, ["c: `T` names 2 types: f.rs, f.rs"]);
    }
}
