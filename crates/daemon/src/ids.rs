//! The form of the names that clients give: of nodes, jobs, exports and objects. Leaf.

/// Whether `name` is of the form that identifiers have: a letter, then letters, digits, `-`, `.`, `_`.
pub(crate) fn is_well_formed(name: &str) -> bool {
    let mut letters = name.bytes();
    letters.next().is_some_and(|first| first.is_ascii_alphabetic())
        && letters.all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_'))
}
