//! What a user of an image may do with it, as QEMU numbers it in its lock bytes.

use std::fmt;

/// One thing a user of an image does. The discriminant is the offset of its lock byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Permission {
    /// Reads, and relies on what it reads being consistent.
    ConsistentRead = 0,
    /// Writes.
    Write = 1,
    /// Writes without changing what readers see.
    WriteUnchanged = 2,
    /// Changes the length.
    Resize = 3,
}

impl Permission {
    /// Every permission, in the order of its lock byte.
    pub const ALL: [Self; 4] = [Self::ConsistentRead, Self::Write, Self::WriteUnchanged, Self::Resize];

    const fn bit(self) -> u8 {
        1 << self as u8
    }

    /// The name of it in messages of QEMU.
    pub(crate) const fn qemu_name(self) -> &'static str {
        match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::WriteUnchanged => "write unchanged",
            Self::Resize => "resize",
        }
    }

    /// What a user that has it does, to go after "which".
    pub(crate) const fn held(self) -> &'static str {
        match self {
            Self::ConsistentRead => "reads it",
            Self::Write => "writes it",
            Self::WriteUnchanged => "rewrites it in place",
            Self::Resize => "may resize it",
        }
    }

    /// What a user that does not share it forbids, to go after "which".
    pub(crate) const fn forbidden(self) -> &'static str {
        match self {
            Self::ConsistentRead => "excludes readers",
            Self::Write => "excludes writers",
            Self::WriteUnchanged => "excludes writers in place",
            Self::Resize => "excludes resizing",
        }
    }
}

/// A set of permissions.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Permissions(u8);

impl Permissions {
    /// None.
    pub const NONE: Self = Self(0);
    /// What a reader does.
    pub const READ: Self = Self(Permission::ConsistentRead.bit());
    /// What a writer does: reads, writes, and resizes when the image grows.
    pub const READ_WRITE: Self =
        Self(Permission::ConsistentRead.bit() | Permission::Write.bit() | Permission::Resize.bit());
    /// What neither a reader nor a writer of an image wants others to do: write and resize.
    pub const CHANGE: Self = Self(Permission::Write.bit() | Permission::Resize.bit());

    /// The set with `permission` in it.
    #[must_use]
    pub const fn with(self, permission: Permission) -> Self {
        Self(self.0 | permission.bit())
    }

    /// Whether `permission` is in the set.
    pub const fn contains(self, permission: Permission) -> bool {
        self.0 & permission.bit() != 0
    }

    /// The permissions in the set, in the order of their lock bytes.
    pub fn iter(self) -> impl Iterator<Item = Permission> {
        Permission::ALL.into_iter().filter(move |p| self.contains(*p))
    }
}

impl FromIterator<Permission> for Permissions {
    fn from_iter<I: IntoIterator<Item = Permission>>(permissions: I) -> Self {
        permissions.into_iter().fold(Self::NONE, Self::with)
    }
}

impl fmt::Debug for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}
