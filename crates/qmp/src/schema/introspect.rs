//! The schema as `query-qmp-schema` answers it. Called once per question with the commands and events of a
//! table.
//!
//! Types have numbers there in place of names, so that no client comes to depend on a name; lists are named
//! after what they hold.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::{Command, Event, Shape, Type};

/// All of `commands` and `events` and every type they reach, as a list of entities.
pub fn introspect<'a>(
    commands: impl IntoIterator<Item = &'a Command>,
    events: impl IntoIterator<Item = &'a Event>,
) -> Value {
    let mut schema = Schema::default();
    let mut entities = Vec::new();
    for command in commands {
        let mut entity = Map::new();
        entity.insert("name".into(), command.name.into());
        entity.insert(
            "ret-type".into(),
            match command.returns {
                Some(ty) => schema.named(ty),
                None => schema.empty(),
            }
            .into(),
        );
        entity.insert("meta-type".into(), "command".into());
        entity
            .insert("arg-type".into(), schema.arguments(command.name, command.boxed, command.shape()).into());
        if command.allow_oob {
            entity.insert("allow-oob".into(), true.into());
        }
        if !command.features.is_empty() {
            entity.insert("features".into(), command.features.into());
        }
        entities.push(Value::Object(entity));
    }
    for event in events {
        let arguments = schema.arguments(event.name, event.boxed, event.shape());
        entities.push(json!({"name": event.name, "meta-type": "event", "arg-type": arguments}));
    }
    // Describing a type may bring new ones to light.
    let mut next = 0;
    while let Some((name, what)) = schema.queue.get(next).cloned() {
        entities.push(schema.describe(&name, what));
        next += 1;
    }
    Value::Array(entities)
}

#[derive(Debug, Clone, Copy)]
enum What {
    Builtin(&'static str),
    Type(Type),
    Shape(Shape),
}

#[derive(Default)]
struct Schema {
    /// Names on the wire, by names in the source.
    names: HashMap<String, String>,
    numbers: usize,
    queue: Vec<(String, What)>,
}

impl Schema {
    fn enter(&mut self, key: &str, what: What) -> String {
        if let Some(name) = self.names.get(key) {
            return name.clone();
        }
        let name = self.numbers.to_string();
        self.numbers += 1;
        self.names.insert(key.into(), name.clone());
        self.queue.push((name.clone(), what));
        name
    }

    fn builtin(&mut self, name: &'static str, json_type: &'static str) -> String {
        if self.names.insert(name.into(), name.into()).is_none() {
            self.queue.push((name.into(), What::Builtin(json_type)));
        }
        name.into()
    }

    fn empty(&mut self) -> String {
        self.enter(" empty", What::Shape(Shape { members: &[], tag: None, variants: &[] }))
    }

    fn arguments(&mut self, of: &str, boxed: Option<&'static super::Object>, shape: Shape) -> String {
        match boxed {
            Some(object) => self.named(Type::Object(object)),
            None if shape.members.is_empty() => self.empty(),
            None => self.enter(&format!(" arguments of {of}"), What::Shape(shape)),
        }
    }

    fn named(&mut self, ty: Type) -> String {
        match ty {
            Type::Later(ty) => self.named(ty()),
            Type::Str => self.builtin("str", "string"),
            Type::Int(_) => self.builtin("int", "int"),
            Type::Number => self.builtin("number", "number"),
            Type::Bool => self.builtin("bool", "boolean"),
            Type::Null => self.builtin("null", "null"),
            Type::Any => self.builtin("any", "value"),
            Type::Enum(choice) => self.enter(choice.name, What::Type(ty)),
            Type::Object(object) => self.enter(object.name, What::Type(ty)),
            Type::Alternate(alternate) => self.enter(alternate.name, What::Type(ty)),
            Type::Array(item) => {
                let name = format!("[{}]", self.named(*item));
                if self.names.insert(name.clone(), name.clone()).is_none() {
                    self.queue.push((name.clone(), What::Type(ty)));
                }
                name
            }
        }
    }

    fn describe(&mut self, name: &str, what: What) -> Value {
        match what {
            What::Builtin(json_type) => json!({"name": name, "json-type": json_type, "meta-type": "builtin"}),
            What::Shape(shape) => self.object(name, shape),
            What::Type(Type::Object(object)) => self.object(name, Shape::from(object)),
            What::Type(Type::Enum(choice)) => {
                let members: Vec<_> = choice.values.iter().map(|v| json!({"name": v.name})).collect();
                let values: Vec<_> = choice.values.iter().map(|v| v.name).collect();
                json!({"name": name, "members": members, "meta-type": "enum", "values": values})
            }
            What::Type(Type::Alternate(alternate)) => {
                let members: Vec<_> =
                    alternate.types.iter().map(|ty| json!({"type": self.named(*ty)})).collect();
                json!({"name": name, "members": members, "meta-type": "alternate"})
            }
            What::Type(Type::Array(item)) => {
                json!({"name": name, "element-type": self.named(*item), "meta-type": "array"})
            }
            // Builtins are entered as such.
            What::Type(_) => Value::Null,
        }
    }

    fn object(&mut self, name: &str, shape: Shape) -> Value {
        let mut members = Vec::new();
        for member in shape.members {
            let ty = self.named(member.ty);
            members.push(match member.optional {
                true => json!({"name": member.name, "default": null, "type": ty}),
                false => json!({"name": member.name, "type": ty}),
            });
        }
        let mut entity = Map::new();
        entity.insert("name".into(), name.into());
        if let Some((tag, choice)) = shape.tag_enum() {
            let mut variants = Vec::new();
            for value in choice.values {
                let ty = match shape.variant(value.name) {
                    Some(object) => self.named(Type::Object(object)),
                    None => self.empty(),
                };
                variants.push(json!({"case": value.name, "type": ty}));
            }
            entity.insert("tag".into(), tag.into());
            entity.insert("variants".into(), variants.into());
        }
        entity.insert("members".into(), members.into());
        entity.insert("meta-type".into(), "object".into());
        Value::Object(entity)
    }
}
