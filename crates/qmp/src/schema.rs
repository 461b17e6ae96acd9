//! The schema: commands, events and their types as Rust data, written by hand in `static`s.
//!
//! One description serves four ends: arguments are checked against it before a handler sees them ([`check`]),
//! it is what `query-qmp-schema` answers ([`introspect`]), the reference is printed from it ([`markdown`]),
//! and command line options are read by it ([`keyval`](crate::keyval)).
//!
//! ```
//! use blockmirror_qmp::schema::*;
//!
//! static SYNC: Enum = Enum::new("MirrorSyncMode", "What to copy.", &[
//!     value("top", "what the top image holds"),
//!     value("full", "all of the disk"),
//! ]);
//! static BLOCKDEV_MIRROR: Command = Command::new("blockdev-mirror", "Starts copying a node to another.", &[
//!     opt("job-id", STR, "name of the job").default("the device's name"),
//!     req("device", STR, "node to copy from"),
//!     req("target", STR, "node to copy to"),
//!     req("sync", Type::Enum(&SYNC), "what to copy"),
//!     opt("speed", INT64, "bytes per second").default("0: no limit"),
//! ]);
//! # assert_eq!(BLOCKDEV_MIRROR.members.len(), 5);
//! ```
//!
//! Types may contain each other in circles: a `static` may name a later one, and a constant a
//! [`Type::Later`].

mod check;
mod introspect;
mod lint;
mod markdown;

pub(crate) use check::{Spelling, check_members};
pub use check::{check, conforms};
pub use introspect::introspect;
pub use lint::lint;
pub use markdown::markdown;

/// A type.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Type {
    /// A string.
    Str,
    /// A whole number of the given width.
    Int(Int),
    /// Any number.
    Number,
    /// `true` or `false`.
    Bool,
    /// `null`.
    Null,
    /// Anything at all.
    Any,
    /// One of a few names.
    Enum(&'static Enum),
    /// Named members.
    Object(&'static Object),
    /// A list.
    Array(&'static Type),
    /// One of several types, distinguished by their JSON types.
    Alternate(&'static Alternate),
    /// A type that is looked up when it is needed: for constants that would contain each other in circles.
    Later(fn() -> Type),
}

/// Width and sign of a whole number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Int {
    /// `int`: 64 bits, signed.
    Int,
    /// 64 bits, signed.
    I64,
    /// 8 bits.
    U8,
    /// 16 bits.
    U16,
    /// 32 bits.
    U32,
    /// 64 bits.
    U64,
    /// 64 bits; on the command line with a suffix: `64k`, `1.5G`.
    Size,
}

/// A string.
pub const STR: Type = Type::Str;
/// A signed number of 64 bits.
pub const INT: Type = Type::Int(Int::Int);
/// A signed number of 64 bits.
pub const INT64: Type = Type::Int(Int::I64);
/// An unsigned number of 8 bits.
pub const UINT8: Type = Type::Int(Int::U8);
/// An unsigned number of 16 bits.
pub const UINT16: Type = Type::Int(Int::U16);
/// An unsigned number of 32 bits.
pub const UINT32: Type = Type::Int(Int::U32);
/// An unsigned number of 64 bits.
pub const UINT64: Type = Type::Int(Int::U64);
/// A size in bytes.
pub const SIZE: Type = Type::Int(Int::Size);
/// Any number.
pub const NUMBER: Type = Type::Number;
/// `true` or `false`.
pub const BOOL: Type = Type::Bool;
/// `null`.
pub const NULL: Type = Type::Null;
/// Anything.
pub const ANY: Type = Type::Any;

/// One of a few names.
#[derive(Debug)]
#[non_exhaustive]
pub struct Enum {
    /// Its name in the reference and in errors.
    pub name: &'static str,
    /// What it chooses.
    pub doc: &'static str,
    /// The names, and what each means.
    pub values: &'static [EnumValue],
    /// How it differs from QEMU's, for the reference; empty if it does not.
    pub differs: &'static str,
}

/// A name of an [`Enum`].
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct EnumValue {
    /// The name on the wire.
    pub name: &'static str,
    /// What it means.
    pub doc: &'static str,
    /// Whether QEMU does not have it: the reference says so.
    pub ours: bool,
}

/// A member of an object, or an argument of a command.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Member {
    /// Its name on the wire.
    pub name: &'static str,
    /// Its type.
    pub ty: Type,
    /// Whether it may be left out.
    pub optional: bool,
    /// What holds if it is left out, as text.
    pub default: Option<&'static str>,
    /// What it means.
    pub doc: &'static str,
    /// Whether QEMU does not have it: the reference says so.
    pub ours: bool,
}

/// Named members. With a tag, one member's value says which further members there are.
#[derive(Debug)]
#[non_exhaustive]
pub struct Object {
    /// Its name in the reference.
    pub name: &'static str,
    /// What it describes.
    pub doc: &'static str,
    /// The members it always has.
    pub members: &'static [Member],
    /// The member that chooses a variant.
    pub tag: Option<&'static str>,
    /// For values of the tag: the members that come with it. A value that is not here brings none.
    pub variants: &'static [Variant],
    /// How it differs from QEMU's, for the reference; empty if it does not.
    pub differs: &'static str,
}

/// The members that come with one value of a tag.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Variant {
    /// The value of the tag.
    pub case: &'static str,
    /// The members.
    pub object: &'static Object,
}

/// One of several types that differ in their JSON type.
#[derive(Debug)]
#[non_exhaustive]
pub struct Alternate {
    /// Its name, which is what an error says was expected.
    pub name: &'static str,
    /// What it stands for.
    pub doc: &'static str,
    /// The types.
    pub types: &'static [Type],
}

/// A command.
#[derive(Debug)]
#[non_exhaustive]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub doc: &'static str,
    /// Its arguments.
    pub members: &'static [Member],
    /// If the arguments are those of a type (a union, say) in place of [`Command::members`].
    pub boxed: Option<&'static Object>,
    /// What it answers; nothing is `{}`.
    pub returns: Option<Type>,
    /// What the answer means.
    pub returns_doc: &'static str,
    /// Whether `exec-oob` may run it.
    pub allow_oob: bool,
    /// `deprecated`, `unstable` and the like.
    pub features: &'static [&'static str],
    /// Whether QEMU does not have it: the reference says so.
    pub ours: bool,
    /// How it differs from QEMU's, for the reference; empty if it does not.
    pub differs: &'static str,
}

/// An event.
#[derive(Debug)]
#[non_exhaustive]
pub struct Event {
    /// Its name.
    pub name: &'static str,
    /// When it is sent.
    pub doc: &'static str,
    /// What it carries.
    pub members: &'static [Member],
    /// If what it carries is a type, in place of [`Event::members`].
    pub boxed: Option<&'static Object>,
    /// Whether QEMU does not have it: the reference says so.
    pub ours: bool,
}

/// A name of an [`Enum`].
pub const fn value(name: &'static str, doc: &'static str) -> EnumValue {
    EnumValue { name, doc, ours: false }
}

/// A member that must be there.
pub const fn req(name: &'static str, ty: Type, doc: &'static str) -> Member {
    Member { name, ty, optional: false, default: None, doc, ours: false }
}

/// A member that may be left out.
pub const fn opt(name: &'static str, ty: Type, doc: &'static str) -> Member {
    Member { name, ty, optional: true, default: None, doc, ours: false }
}

/// The members that come with `case`.
pub const fn case(case: &'static str, object: &'static Object) -> Variant {
    Variant { case, object }
}

impl Member {
    /// Says what holds if the member is left out.
    #[must_use]
    pub const fn default(self, default: &'static str) -> Self {
        Self { default: Some(default), ..self }
    }

    /// The same member where it must be there.
    #[must_use]
    pub const fn required(self) -> Self {
        Self { optional: false, ..self }
    }

    /// Says that QEMU does not have it.
    #[must_use]
    pub const fn ours(self) -> Self {
        Self { ours: true, ..self }
    }
}

impl EnumValue {
    /// Says that QEMU does not have it.
    #[must_use]
    pub const fn ours(self) -> Self {
        Self { ours: true, ..self }
    }
}

impl Enum {
    /// A choice.
    pub const fn new(name: &'static str, doc: &'static str, values: &'static [EnumValue]) -> Self {
        Self { name, doc, values, differs: "" }
    }

    /// Says how it differs from QEMU's.
    #[must_use]
    pub const fn differs(self, text: &'static str) -> Self {
        Self { differs: text, ..self }
    }

    /// Whether `name` is one of the names.
    pub fn has(&self, name: &str) -> bool {
        self.values.iter().any(|v| v.name == name)
    }
}

impl Object {
    /// An object with the same members always.
    pub const fn new(name: &'static str, doc: &'static str, members: &'static [Member]) -> Self {
        Self { name, doc, members, tag: None, variants: &[], differs: "" }
    }

    /// An object whose member `tag`, an enum that must be there, chooses further members.
    pub const fn union(
        name: &'static str,
        doc: &'static str,
        members: &'static [Member],
        tag: &'static str,
        variants: &'static [Variant],
    ) -> Self {
        Self { name, doc, members, tag: Some(tag), variants, differs: "" }
    }

    /// Says how it differs from QEMU's.
    #[must_use]
    pub const fn differs(self, text: &'static str) -> Self {
        Self { differs: text, ..self }
    }

    /// The members that come with a value of the tag.
    pub fn variant(&self, case: &str) -> Option<&'static Object> {
        self.variants.iter().find(|v| v.case == case).map(|v| v.object)
    }
}

impl Alternate {
    /// One of `types`.
    pub const fn new(name: &'static str, doc: &'static str, types: &'static [Type]) -> Self {
        Self { name, doc, types }
    }
}

impl Command {
    /// A command that takes `members` and answers nothing.
    pub const fn new(name: &'static str, doc: &'static str, members: &'static [Member]) -> Self {
        Self {
            name,
            doc,
            members,
            boxed: None,
            returns: None,
            returns_doc: "",
            allow_oob: false,
            features: &[],
            ours: false,
            differs: "",
        }
    }

    /// A command whose arguments are those of `object`.
    pub const fn boxed(name: &'static str, doc: &'static str, object: &'static Object) -> Self {
        Self { boxed: Some(object), ..Self::new(name, doc, &[]) }
    }

    /// Says what it answers.
    #[must_use]
    pub const fn returns(self, ty: Type, doc: &'static str) -> Self {
        Self { returns: Some(ty), returns_doc: doc, ..self }
    }

    /// Lets `exec-oob` run it: the handler must be quick and wait for nothing that a command does.
    #[must_use]
    pub const fn oob(self) -> Self {
        Self { allow_oob: true, ..self }
    }

    /// Names features: `deprecated`, `unstable`.
    #[must_use]
    pub const fn features(self, features: &'static [&'static str]) -> Self {
        Self { features, ..self }
    }

    /// Says that QEMU does not have it.
    #[must_use]
    pub const fn ours(self) -> Self {
        Self { ours: true, ..self }
    }

    /// Says how it differs from QEMU's.
    #[must_use]
    pub const fn differs(self, text: &'static str) -> Self {
        Self { differs: text, ..self }
    }

    /// The arguments as one object; `None` if there are only [`Command::members`].
    pub(crate) fn shape(&self) -> Shape {
        Shape::of(self.members, self.boxed)
    }
}

impl Event {
    /// An event that carries `members`.
    pub const fn new(name: &'static str, doc: &'static str, members: &'static [Member]) -> Self {
        Self { name, doc, members, boxed: None, ours: false }
    }

    /// An event that carries what `object` has.
    pub const fn boxed(name: &'static str, doc: &'static str, object: &'static Object) -> Self {
        Self { name, doc, members: &[], boxed: Some(object), ours: false }
    }

    /// Says that QEMU does not have it.
    #[must_use]
    pub const fn ours(self) -> Self {
        Self { ours: true, ..self }
    }

    pub(crate) fn shape(&self) -> Shape {
        Shape::of(self.members, self.boxed)
    }
}

/// The members of an object, command or event, seen alike.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) members: &'static [Member],
    pub(crate) tag: Option<&'static str>,
    pub(crate) variants: &'static [Variant],
}

impl Shape {
    fn of(members: &'static [Member], boxed: Option<&'static Object>) -> Self {
        match boxed {
            Some(object) => Self::from(object),
            None => Self { members, tag: None, variants: &[] },
        }
    }

    /// The tag's member and its enum.
    pub(crate) fn tag_enum(&self) -> Option<(&'static str, &'static Enum)> {
        let tag = self.tag?;
        let mut ty = self.members.iter().find(|m| m.name == tag)?.ty;
        while let Type::Later(later) = ty {
            ty = later();
        }
        match ty {
            Type::Enum(choice) => Some((tag, choice)),
            _ => None,
        }
    }

    pub(crate) fn variant(&self, case: &str) -> Option<&'static Object> {
        self.variants.iter().find(|v| v.case == case).map(|v| v.object)
    }
}

impl From<&'static Object> for Shape {
    fn from(object: &'static Object) -> Self {
        Self { members: object.members, tag: object.tag, variants: object.variants }
    }
}
