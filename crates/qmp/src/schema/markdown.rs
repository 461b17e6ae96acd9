//! The schema as a reference for people. Called by the generator of the manual, with the commands and events
//! of a table.

use std::collections::BTreeMap;

use super::{Command, Event, Int, Member, Object, Shape, Type};

/// Commands, events and the types they reach, as Markdown with headings of the second and third level.
pub fn markdown<'a>(
    commands: impl IntoIterator<Item = &'a Command>,
    events: impl IntoIterator<Item = &'a Event>,
) -> String {
    let (commands, events): (Vec<_>, Vec<_>) = (commands.into_iter().collect(), events.into_iter().collect());
    let mut reference = Reference::default();
    let mut out = String::from("## Commands\n");
    index(&mut out, commands.iter().map(|command| command.name));
    for command in commands {
        out.push_str(&format!("\n### {}\n\n{}\n", command.name, command.doc));
        if command.ours {
            out.push_str("\nOurs: QEMU has no such command.\n");
        }
        differs(&mut out, command.differs);
        if !command.features.is_empty() {
            out.push_str(&format!("\nFeatures: {}.\n", command.features.join(", ")));
        }
        if command.allow_oob {
            out.push_str("\nMay be run out of band.\n");
        }
        reference.arguments(&mut out, command.boxed, command.shape(), "argument");
        if let Some(ty) = command.returns {
            out.push_str(&format!("\nAnswers {}: {}\n", reference.named(ty), sentence(command.returns_doc)));
        }
    }
    out.push_str("\n## Events\n");
    index(&mut out, events.iter().map(|event| event.name));
    for event in events {
        out.push_str(&format!("\n### {}\n\n{}\n", event.name, event.doc));
        if event.ours {
            out.push_str("\nOurs: QEMU has no such event.\n");
        }
        reference.arguments(&mut out, event.boxed, event.shape(), "member");
    }
    out.push_str("\n## Types\n");
    // Describing a type may bring new ones to light.
    let mut described = BTreeMap::new();
    while let Some((name, ty)) = reference.types.pop_first() {
        if !described.contains_key(name) {
            // Entered before it is described: it may contain itself.
            described.insert(name, String::new());
            let text = reference.describe(ty);
            described.insert(name, text);
        }
    }
    for (name, text) in described {
        out.push_str(&format!("\n### {name}\n\n{text}"));
    }
    out
}

#[derive(Default)]
struct Reference {
    types: BTreeMap<&'static str, Type>,
}

impl Reference {
    fn arguments(&mut self, out: &mut String, boxed: Option<&'static Object>, shape: Shape, what: &str) {
        match boxed {
            Some(object) => {
                out.push_str(&format!("\nWith the members of {}.\n", self.named(Type::Object(object))));
            }
            None => self.members(out, shape.members, what),
        }
    }

    fn members(&mut self, out: &mut String, members: &[Member], what: &str) {
        if members.is_empty() {
            return;
        }
        out.push_str(&format!("\n| {what} | type | default | meaning |\n|---|---|---|---|\n"));
        for member in members {
            let default = match (member.optional, member.default) {
                (false, _) => "required",
                (true, None) => "-",
                (true, Some(default)) => default,
            };
            let ty = self.named(member.ty);
            out.push_str(&format!(
                "| `{}`{} | {ty} | {} | {} |\n",
                member.name,
                mark(member.ours),
                cell(default),
                cell(member.doc)
            ));
        }
    }

    fn named(&mut self, ty: Type) -> String {
        let name = match ty {
            Type::Later(ty) => return self.named(ty()),
            Type::Str => return "string".into(),
            Type::Int(int) => {
                return match int {
                    Int::Int => "int",
                    Int::I64 => "int64",
                    Int::U8 => "uint8",
                    Int::U16 => "uint16",
                    Int::U32 => "uint32",
                    Int::U64 => "uint64",
                    Int::Size => "size",
                }
                .into();
            }
            Type::Number => return "number".into(),
            Type::Bool => return "bool".into(),
            Type::Null => return "null".into(),
            Type::Any => return "any".into(),
            Type::Array(item) => return format!("list of {}", self.named(*item)),
            Type::Enum(choice) => choice.name,
            Type::Object(object) => object.name,
            Type::Alternate(alternate) => alternate.name,
        };
        self.types.insert(name, ty);
        format!("[{name}](#{})", name.to_lowercase())
    }

    fn describe(&mut self, ty: Type) -> String {
        let mut out = String::new();
        match ty {
            Type::Enum(choice) => {
                out.push_str(&format!("{}\n", choice.doc));
                differs(&mut out, choice.differs);
                out.push('\n');
                for value in choice.values {
                    let ours = mark(value.ours);
                    out.push_str(&format!("- `{}`{ours}: {}\n", value.name, sentence(value.doc)));
                }
            }
            Type::Object(object) => {
                out.push_str(&format!("{}\n", object.doc));
                differs(&mut out, object.differs);
                self.members(&mut out, object.members, "member");
                if let Some(tag) = object.tag {
                    out.push('\n');
                    for variant in object.variants.iter().filter(|variant| !variant.object.members.is_empty())
                    {
                        let members = self.named(Type::Object(variant.object));
                        out.push_str(&format!("- `{tag}` is `{}`: also those of {members}\n", variant.case));
                    }
                }
            }
            Type::Alternate(alternate) => {
                let types: Vec<_> = alternate.types.iter().map(|ty| self.named(*ty)).collect();
                out.push_str(&format!("{}\n\nOne of: {}.\n", alternate.doc, types.join(", ")));
            }
            // The others have no entry of their own.
            _ => {}
        }
        out
    }
}

/// A line of links to the entries of a part.
fn index<'a>(out: &mut String, names: impl Iterator<Item = &'a str>) {
    let links: Vec<_> = names.map(|name| format!("[{name}](#{})", name.to_lowercase())).collect();
    if !links.is_empty() {
        out.push_str(&format!("\n{}\n", links.join(", ")));
    }
}

fn differs(out: &mut String, text: &str) {
    if !text.is_empty() {
        out.push_str(&format!("\nUnlike QEMU: {}\n", sentence(text)));
    }
}

/// What stands behind a name that QEMU does not have.
fn mark(ours: bool) -> &'static str {
    if ours { " (ours)" } else { "" }
}

/// Text inside of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// A note that starts in the middle of a sentence, with a full stop at its end.
fn sentence(text: &str) -> String {
    let stop = if text.ends_with(['.', ':', ';']) || text.is_empty() { "" } else { "." };
    format!("{text}{stop}")
}
