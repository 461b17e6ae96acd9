//! Values against the schema: called for each command's arguments before its handler sees them, for command
//! line options, and by tests for what handlers answer.
//!
//! Texts and the order in which faults are found are QEMU's: members as the schema lists them, then those of
//! the chosen variant, then whatever is left over.

use serde_json::{Map, Value};

use super::{Int, Member, Object, Shape, Type, Variant};
use crate::error::QmpError;
use crate::number;

/// How scalars are spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// By their JSON types.
    Json,
    /// All as strings, as `key=value` gives them.
    Keyval,
}

/// `value` if it is a `ty`. Unsigned members get their negative spellings resolved; nothing else changes.
///
/// # Errors
/// What is wrong, in QEMU's words: `Parameter 'file.driver' is missing`.
pub fn check(ty: Type, value: Value) -> Result<Value, QmpError> {
    Checker { spelling: Spelling::Json }.value(ty, &Name::Root, value)
}

/// Whether `value` is a `ty`: for tests of what a handler answers.
///
/// # Errors
/// As [`check`].
pub fn conforms(ty: Type, value: &Value) -> Result<(), QmpError> {
    check(ty, value.clone()).map(|_| ())
}

/// The members of a command, event or option, checked.
pub(crate) fn check_members(
    shape: Shape,
    members: Map<String, Value>,
    spelling: Spelling,
) -> Result<Map<String, Value>, QmpError> {
    Checker { spelling }.members(shape, &Name::Root, members)
}

/// Where a value stands, from the inside out.
enum Name<'a> {
    Root,
    Member(&'a Name<'a>, &'a str),
    Item(&'a Name<'a>, usize),
}

impl Name<'_> {
    /// The last member's name alone; items have none.
    fn short(&self) -> &str {
        match self {
            Self::Member(_, name) => name,
            _ => "null",
        }
    }
}

struct Checker {
    spelling: Spelling,
}

impl Checker {
    fn full(&self, name: &Name<'_>) -> String {
        match name {
            Name::Root => "<anonymous>".into(),
            Name::Member(Name::Root, member) => (*member).into(),
            Name::Member(outer, member) => format!("{}.{member}", self.full(outer)),
            Name::Item(outer, index) => match self.spelling {
                Spelling::Json => format!("{}[{index}]", self.full(outer)),
                Spelling::Keyval => format!("{}.{index}", self.full(outer)),
            },
        }
    }

    fn wrong_type(&self, name: &Name<'_>, expected: &str) -> QmpError {
        QmpError::generic(format!("Invalid parameter type for '{}', expected: {expected}", self.full(name)))
    }

    fn value(&self, ty: Type, name: &Name<'_>, value: Value) -> Result<Value, QmpError> {
        match (ty, value) {
            (Type::Later(ty), value) => self.value(ty(), name, value),
            (Type::Any, value) => Ok(value),
            (ty, Value::Object(_) | Value::Array(_))
                if self.spelling == Spelling::Keyval && is_scalar(ty) =>
            {
                Err(QmpError::generic(format!("Parameters '{}.*' are unexpected", self.full(name))))
            }
            (Type::Str, Value::String(text)) => Ok(Value::String(text)),
            (Type::Str, _) => Err(self.wrong_type(name, "string")),
            (Type::Enum(choice), Value::String(text)) => {
                if choice.has(&text) {
                    return Ok(Value::String(text));
                }
                Err(QmpError::generic(format!("Parameter '{}' does not accept value '{text}'", name.short())))
            }
            (Type::Enum(_), _) => Err(self.wrong_type(name, "string")),
            (Type::Array(item), Value::Array(items)) => {
                let items = items.into_iter().enumerate();
                let items = items.map(|(index, value)| self.value(*item, &Name::Item(name, index), value));
                Ok(Value::Array(items.collect::<Result<_, _>>()?))
            }
            (Type::Array(_), _) => Err(self.wrong_type(name, "array")),
            (Type::Object(object), Value::Object(members)) => {
                Ok(Value::Object(self.members(Shape::from(object), name, members)?))
            }
            (Type::Object(_), _) => Err(self.wrong_type(name, "object")),
            (Type::Alternate(alternate), value) => {
                match alternate.types.iter().find(|ty| self.takes(**ty, &value)) {
                    Some(ty) => self.value(*ty, name, value),
                    None => Err(QmpError::generic(format!(
                        "Invalid parameter type for '{}', expected: {}",
                        name.short(),
                        alternate.name
                    ))),
                }
            }
            (ty, Value::String(text)) if self.spelling == Spelling::Keyval => self.scalar(ty, name, &text),
            (Type::Int(int), value) => self.integer(int, name, &value),
            (Type::Number, Value::Number(number)) => Ok(Value::Number(number)),
            (Type::Number, _) => Err(self.wrong_type(name, "number")),
            (Type::Bool, Value::Bool(on)) => Ok(Value::Bool(on)),
            (Type::Bool, _) => Err(self.wrong_type(name, "boolean")),
            (Type::Null, Value::Null) => Ok(Value::Null),
            (Type::Null, _) => Err(self.wrong_type(name, "null")),
        }
    }

    /// Whether an alternate's `ty` is the one that a value of this JSON type means.
    fn takes(&self, ty: Type, value: &Value) -> bool {
        match ty {
            Type::Any => true,
            Type::Str | Type::Enum(_) => value.is_string(),
            Type::Object(_) => value.is_object(),
            Type::Array(_) => value.is_array(),
            Type::Int(_) | Type::Number => value.is_number(),
            Type::Bool => value.is_boolean(),
            Type::Null => value.is_null(),
            Type::Alternate(alternate) => alternate.types.iter().any(|ty| self.takes(*ty, value)),
            Type::Later(ty) => self.takes(ty(), value),
        }
    }

    fn members(
        &self,
        shape: Shape,
        name: &Name<'_>,
        mut given: Map<String, Value>,
    ) -> Result<Map<String, Value>, QmpError> {
        let mut taken = Map::new();
        self.take(shape.members, name, &mut given, &mut taken)?;
        let mut tag = shape.tag;
        let mut variants: &[Variant] = shape.variants;
        // A variant may itself be a union.
        while let Some(tag_name) = tag {
            let chosen = taken.get(tag_name).and_then(Value::as_str).unwrap_or_default();
            let Some(object) = variants.iter().find(|v| v.case == chosen).map(|v| v.object) else { break };
            self.take(object.members, name, &mut given, &mut taken)?;
            (tag, variants) = (object.tag, object.variants);
        }
        match given.keys().next() {
            None => Ok(taken),
            Some(key) => Err(QmpError::generic(format!(
                "Parameter '{}' is unexpected",
                self.full(&Name::Member(name, key))
            ))),
        }
    }

    fn take(
        &self,
        members: &[Member],
        name: &Name<'_>,
        given: &mut Map<String, Value>,
        taken: &mut Map<String, Value>,
    ) -> Result<(), QmpError> {
        for member in members {
            let name = Name::Member(name, member.name);
            match given.shift_remove(member.name) {
                Some(value) => {
                    taken.insert(member.name.into(), self.value(member.ty, &name, value)?);
                }
                None if member.optional => {}
                None => {
                    return Err(QmpError::generic(format!("Parameter '{}' is missing", self.full(&name))));
                }
            }
        }
        Ok(())
    }

    fn integer(&self, int: Int, name: &Name<'_>, value: &Value) -> Result<Value, QmpError> {
        if matches!(int, Int::Int | Int::I64) {
            return value.as_i64().map(Value::from).ok_or_else(|| self.wrong_type(name, "integer"));
        }
        // A negative number is what it is modulo 2^64.
        let number = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
        let number = number
            .ok_or_else(|| QmpError::generic(format!("Parameter '{}' expects uint64", self.full(name))))?;
        self.fit(int, name, number)
    }

    fn fit(&self, int: Int, name: &Name<'_>, number: u64) -> Result<Value, QmpError> {
        let (most, kind) = match int {
            Int::U8 => (u64::from(u8::MAX), "uint8_t"),
            Int::U16 => (u64::from(u16::MAX), "uint16_t"),
            Int::U32 => (u64::from(u32::MAX), "uint32_t"),
            Int::Int | Int::I64 | Int::U64 | Int::Size => (u64::MAX, "uint64_t"),
        };
        if number > most {
            return Err(QmpError::generic(format!("Parameter '{}' expects {kind}", name.short())));
        }
        Ok(number.into())
    }

    /// A scalar as a command line spells it.
    fn scalar(&self, ty: Type, name: &Name<'_>, text: &str) -> Result<Value, QmpError> {
        let expects =
            |what: &str| QmpError::generic(format!("Parameter '{}' expects {what}", self.full(name)));
        match ty {
            Type::Bool => number::truth(text).map(Value::from).ok_or_else(|| expects("'on' or 'off'")),
            Type::Int(Int::Int | Int::I64) => {
                number::integer(text).map(Value::from).ok_or_else(|| expects("integer"))
            }
            Type::Int(Int::Size) => number::size(text).map(Value::from).ok_or_else(|| expects("size")),
            Type::Int(int) => self.fit(int, name, number::unsigned(text).ok_or_else(|| expects("integer"))?),
            Type::Number => {
                let number = text.parse().ok().and_then(serde_json::Number::from_f64);
                number.map(Value::Number).ok_or_else(|| expects("number"))
            }
            Type::Null if text.is_empty() => Ok(Value::Null),
            _ => Err(self.wrong_type(name, "null")),
        }
    }
}

fn is_scalar(ty: Type) -> bool {
    !matches!(ty, Type::Any | Type::Object(_) | Type::Array(_) | Type::Alternate(_))
}

impl From<&'static Object> for Type {
    fn from(object: &'static Object) -> Self {
        Self::Object(object)
    }
}
