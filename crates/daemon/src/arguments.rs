//! Typed arguments: one declaration gives a struct, its part of the schema (and so its rows of the reference
//! and the check of what clients send), its parser, and which options `blockdev-reopen` may change.
//!
//! Used by everything that reads what a client sends. What is read has passed the schema, so a value of
//! another type is a fault of the program.

use blockmirror_qmp::QmpError;
use blockmirror_qmp::schema::{
    BOOL, INT, INT64, Member, Object, SIZE, STR, Type, UINT32, UINT64, Variant, case, opt, req,
};
use serde_json::{Map, Value};

use crate::Reply;

/// A type of arguments.
pub(crate) trait Argument: Sized {
    /// What the schema calls it.
    const TYPE: Type;
    /// Whether a member of this type may be left out.
    const OPTIONAL: bool = false;

    /// Reads a value; `None` if it is of another type.
    fn read(value: &Value) -> Option<Self>;

    /// What holds if a member of this type is left out.
    fn absent() -> Option<Self> {
        None
    }
}

/// A struct of arguments.
pub(crate) trait Arguments: Sized {
    /// The members, for the schema.
    const MEMBERS: &'static [Member];
    /// Those of the members that `blockdev-reopen` may change.
    const CHANGEABLE: &'static [(&'static str, bool)];

    /// Reads the members.
    ///
    /// # Errors
    /// The schema has let another type pass.
    fn parse(members: &Map<String, Value>) -> Reply<Self>;
}

/// A signed number that the schema says has 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Int64(pub(crate) i64);

/// Bytes, on the command line with a suffix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

macro_rules! scalars {
    ($($ty:ty, $schema:expr, $read:expr;)*) => {
        $(impl Argument for $ty {
            const TYPE: Type = $schema;

            fn read(value: &Value) -> Option<Self> {
                let read: fn(&Value) -> Option<Self> = $read;
                read(value)
            }
        })*
    };
}

scalars! {
    String, STR, |value| value.as_str().map(str::to_owned);
    bool, BOOL, Value::as_bool;
    i64, INT, Value::as_i64;
    Int64, INT64, |value| value.as_i64().map(Self);
    u32, UINT32, |value| value.as_u64().and_then(|number| number.try_into().ok());
    u64, UINT64, Value::as_u64;
    Size, SIZE, |value| value.as_u64().map(Self);
}

impl<T: Argument> Argument for Option<T> {
    const TYPE: Type = T::TYPE;
    const OPTIONAL: bool = true;

    fn read(value: &Value) -> Option<Self> {
        T::read(value).map(Some)
    }

    fn absent() -> Option<Self> {
        Some(None)
    }
}

impl<T: Argument> Argument for Vec<T> {
    const TYPE: Type = Type::Array(&T::TYPE);

    fn read(value: &Value) -> Option<Self> {
        value.as_array()?.iter().map(T::read).collect()
    }
}

/// The member `name` for the schema.
pub(crate) const fn member<T: Argument>(name: &'static str, doc: &'static str) -> Member {
    if T::OPTIONAL { opt(name, T::TYPE, doc) } else { req(name, T::TYPE, doc) }
}

/// `member`, which clients must give.
pub(crate) const fn required(member: Member) -> Member {
    member.required()
}

/// The members of `T`, which come with the value `name` of a union's tag.
pub(crate) const fn variant<T: Argument>(name: &'static str) -> Variant {
    case(name, object_of::<T>())
}

/// What the schema has of the struct `T`.
pub(crate) const fn object_of<T: Argument>() -> &'static Object {
    match T::TYPE {
        Type::Object(object) => object,
        _ => panic!("it is no object"),
    }
}

/// Reads one member.
pub(crate) fn read<T: Argument>(members: &Map<String, Value>, name: &str) -> Reply<T> {
    let value = members.get(name).map_or_else(T::absent, T::read);
    value.ok_or_else(|| disagreement(name))
}

/// What the schema has let pass is not what `name` can be.
pub(crate) fn disagreement(name: &str) -> QmpError {
    QmpError::generic(format!("Internal error: the schema and the handler disagree about '{name}'"))
}

/// Declares a struct of arguments: those of a command, or with a name and a description in parentheses a type
/// of the schema. Each member: its field and type, its name on the wire, what it means, and in brackets what
/// else there is to say: `default "TEXT"`, `ours` (QEMU does not have it), `reopen` (`blockdev-reopen` may
/// change it), `required` (clients must give what the daemon itself may leave out).
macro_rules! arguments {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident {
            $($field:ident: $ty:ty = $member:literal, $doc:literal $([$($flag:tt)*])?;)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug)]
        $vis struct $name {
            $(pub(crate) $field: $ty,)*
        }

        impl $crate::arguments::Arguments for $name {
            const MEMBERS: &'static [blockmirror_qmp::schema::Member] = &[
                $($crate::arguments::flagged!(
                    $crate::arguments::member::<$ty>($member, $doc); $($($flag)*)?
                ),)*
            ];
            const CHANGEABLE: &'static [(&'static str, bool)] =
                &[$(($member, $crate::arguments::is_changeable!($($($flag)*)?)),)*];

            fn parse(members: &serde_json::Map<String, serde_json::Value>) -> $crate::Reply<Self> {
                let _ = members;
                Ok(Self { $($field: $crate::arguments::read(members, $member)?,)* })
            }
        }
    };
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident ($wire:literal, $about:literal $(, differs $differs:literal)?) {
            $($members:tt)*
        }
    ) => {
        $crate::arguments::arguments! {
            $(#[$meta])*
            $vis struct $name {
                $($members)*
            }
        }

        impl $crate::arguments::Argument for $name {
            const TYPE: blockmirror_qmp::schema::Type = {
                static OBJECT: blockmirror_qmp::schema::Object = blockmirror_qmp::schema::Object::new(
                    $wire,
                    $about,
                    <$name as $crate::arguments::Arguments>::MEMBERS,
                )
                $(.differs($differs))?;
                blockmirror_qmp::schema::Type::Object(&OBJECT)
            };

            fn read(value: &serde_json::Value) -> Option<Self> {
                <Self as $crate::arguments::Arguments>::parse(value.as_object()?).ok()
            }
        }
    };
}

macro_rules! flagged {
    ($member:expr;) => { $member };
    ($member:expr; , $($rest:tt)*) => { $crate::arguments::flagged!($member; $($rest)*) };
    ($member:expr; default $text:literal $($rest:tt)*) => {
        $crate::arguments::flagged!($member.default($text); $($rest)*)
    };
    ($member:expr; ours $($rest:tt)*) => { $crate::arguments::flagged!($member.ours(); $($rest)*) };
    ($member:expr; reopen $($rest:tt)*) => { $crate::arguments::flagged!($member; $($rest)*) };
    ($member:expr; required $($rest:tt)*) => {
        $crate::arguments::flagged!($crate::arguments::required($member); $($rest)*)
    };
}

macro_rules! is_changeable {
    () => { false };
    (reopen $($rest:tt)*) => { true };
    ($other:tt $($rest:tt)*) => { $crate::arguments::is_changeable!($($rest)*) };
}

/// Declares one of a few names: the variants, each with its name on the wire and what it means.
macro_rules! choice {
    (
        $(#[$meta:meta])*
        $vis:vis enum $name:ident ($wire:literal, $about:literal $(, differs $differs:literal)?) {
            $($variant:ident = $value:literal, $doc:literal $([$flag:ident])?;)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $vis enum $name {
            $($variant,)*
        }

        #[allow(dead_code, reason = "not every name is printed")]
        impl $name {
            /// The name on the wire.
            pub(crate) const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $value,)*
                }
            }
        }

        impl $crate::arguments::Argument for $name {
            const TYPE: blockmirror_qmp::schema::Type = {
                static CHOICE: blockmirror_qmp::schema::Enum = blockmirror_qmp::schema::Enum::new(
                    $wire,
                    $about,
                    &[$(blockmirror_qmp::schema::value($value, $doc)$(.$flag())?,)*],
                )
                $(.differs($differs))?;
                blockmirror_qmp::schema::Type::Enum(&CHOICE)
            };

            fn read(value: &serde_json::Value) -> Option<Self> {
                match value.as_str()? {
                    $($value => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

pub(crate) use {arguments, choice, flagged, is_changeable};

arguments! {
    /// For commands without arguments.
    pub(crate) struct NoArguments {}
}
