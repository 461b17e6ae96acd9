//! Mistakes in a schema that the compiler does not see. Called by the tests of a schema's owner.

use std::collections::{BTreeMap, BTreeSet};

use super::{Command, Event, Member, Object, Shape, Type};

/// Everything that is wrong with a schema, one sentence each; nothing, one hopes.
///
/// ```
/// use blockmirror_qmp::schema::*;
///
/// static MODE: Enum = Enum::new("Mode", "A mode.", &[value("a", "one"), value("a", "two")]);
/// static SET: Command = Command::new("set", "Sets the mode.", &[req("mode", Type::Enum(&MODE), "the mode")]);
/// assert_eq!(lint([&SET], []), ["Mode: 'a' is there twice"]);
/// ```
pub fn lint<'a>(
    commands: impl IntoIterator<Item = &'a Command>,
    events: impl IntoIterator<Item = &'a Event>,
) -> Vec<String> {
    let mut lint = Lint::default();
    let mut names = BTreeSet::new();
    for command in commands {
        lint.unique(&mut names, command.name, "the table");
        lint.documented(command.name, command.doc);
        lint.shape(command.name, command.shape());
        lint.boxed(command.name, command.boxed, command.members);
        if let Some(ty) = command.returns {
            lint.ty(ty);
        }
    }
    for event in events {
        lint.unique(&mut names, event.name, "the table");
        lint.documented(event.name, event.doc);
        lint.shape(event.name, event.shape());
        lint.boxed(event.name, event.boxed, event.members);
    }
    lint.found
}

#[derive(Default)]
struct Lint {
    /// Types that were looked at, and where they are.
    seen: BTreeMap<&'static str, usize>,
    found: Vec<String>,
}

impl Lint {
    fn unique<'a>(&mut self, names: &mut BTreeSet<&'a str>, name: &'a str, of: &str) {
        if !names.insert(name) {
            self.found.push(format!("{of}: '{name}' is there twice"));
        }
    }

    fn documented(&mut self, name: &str, doc: &str) {
        if doc.is_empty() {
            self.found.push(format!("{name}: nothing is said about it"));
        }
    }

    fn boxed(&mut self, name: &str, boxed: Option<&'static Object>, members: &[Member]) {
        if let Some(object) = boxed {
            self.ty(Type::Object(object));
            if !members.is_empty() {
                self.found.push(format!("{name}: has members of its own and those of {}", object.name));
            }
        }
    }

    /// Whether a type of this name is seen for the first time.
    fn enter(&mut self, name: &'static str, doc: &str, address: usize) -> bool {
        match self.seen.insert(name, address) {
            None => {
                self.documented(name, doc);
                true
            }
            Some(other) => {
                if other != address {
                    self.found.push(format!("{name}: two types have this name"));
                }
                false
            }
        }
    }

    fn ty(&mut self, ty: Type) {
        match ty {
            Type::Array(item) => self.ty(*item),
            Type::Enum(choice) => {
                if self.enter(choice.name, choice.doc, std::ptr::from_ref(choice).addr()) {
                    let mut names = BTreeSet::new();
                    for value in choice.values {
                        self.unique(&mut names, value.name, choice.name);
                        self.documented(&format!("{}: '{}'", choice.name, value.name), value.doc);
                    }
                }
            }
            Type::Object(object) => {
                if self.enter(object.name, object.doc, std::ptr::from_ref(object).addr()) {
                    self.shape(object.name, Shape::from(object));
                }
            }
            Type::Alternate(alternate) => {
                if self.enter(alternate.name, alternate.doc, std::ptr::from_ref(alternate).addr()) {
                    let mut kinds = BTreeSet::new();
                    for ty in alternate.types {
                        self.ty(*ty);
                        self.unique(&mut kinds, json_type(*ty), alternate.name);
                    }
                }
            }
            Type::Later(ty) => self.ty(ty()),
            Type::Str | Type::Int(_) | Type::Number | Type::Bool | Type::Null | Type::Any => {}
        }
    }

    fn shape(&mut self, name: &str, shape: Shape) {
        let mut names = BTreeSet::new();
        self.members(name, shape.members, &mut names);
        let Some(tag) = shape.tag else {
            if !shape.variants.is_empty() {
                self.found.push(format!("{name}: variants without a tag"));
            }
            return;
        };
        let Some((_, choice)) = shape.tag_enum() else {
            self.found.push(format!("{name}: the tag '{tag}' is not a member that is an enum"));
            return;
        };
        if shape.members.iter().any(|member| member.name == tag && member.optional) {
            self.found.push(format!("{name}: the tag '{tag}' is optional"));
        }
        let mut cases = BTreeSet::new();
        for variant in shape.variants {
            self.unique(&mut cases, variant.case, name);
            if !choice.has(variant.case) {
                self.found.push(format!("{name}: {} has no '{}'", choice.name, variant.case));
            }
            self.ty(Type::Object(variant.object));
            self.members(name, variant.object.members, &mut names.clone());
        }
    }

    fn members<'a>(&mut self, name: &str, members: &'a [Member], names: &mut BTreeSet<&'a str>) {
        for member in members {
            self.unique(names, member.name, name);
            self.documented(&format!("{name}: '{}'", member.name), member.doc);
            self.ty(member.ty);
        }
    }
}

/// What tells the types of an alternate apart.
fn json_type(ty: Type) -> &'static str {
    match ty {
        Type::Str | Type::Enum(_) => "string",
        Type::Int(_) | Type::Number => "number",
        Type::Bool => "boolean",
        Type::Null => "null",
        Type::Any => "anything",
        Type::Object(_) => "object",
        Type::Array(_) => "array",
        Type::Alternate(_) => "alternate",
        Type::Later(ty) => json_type(ty()),
    }
}
