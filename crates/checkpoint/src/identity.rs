//! What a log belongs to: keys and values that must be the same when it is used again.
//!
//! Filled by the caller, which knows what makes a copy another one. Values are bytes, kept as printable
//! ASCII.

/// The most bytes of an identity in a log: 1 MiB.
pub const MAX_IDENTITY: usize = 1 << 20;

/// What a log belongs to, as keys and values in an order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    entries: Vec<(String, String)>,
}

impl Identity {
    /// Without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends an entry. A key may come more than once. Bytes that are no printable ASCII are kept as escapes
    /// (`\n`, `\xff`).
    pub fn push(&mut self, key: &str, value: impl AsRef<[u8]>) {
        // A key ends at the first equals sign, a line at its end.
        let key = key.escape_default().to_string().replace('=', "\\x3d");
        self.entries.push((key, value.as_ref().escape_ascii().to_string()));
    }

    /// The value of the first entry with this key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.entries.iter().find(|(own, _)| own == key).map(|(_, value)| &**value)
    }

    /// The key of the first entry in which the two differ, whatever entries with a key in `except` say.
    pub fn first_difference(&self, other: &Self, except: &[&str]) -> Option<String> {
        let counted = |identity: &Self| {
            let entries = identity.entries.iter().filter(|(key, _)| !except.contains(&&**key));
            entries.cloned().collect::<Vec<_>>()
        };
        let (own, others) = (counted(self), counted(other));
        let differs = own.iter().zip(&others).find(|(a, b)| a != b).map(|(a, _)| a);
        let longer = || own.get(others.len()).or_else(|| others.get(own.len()));
        differs.or_else(longer).map(|(key, _)| key.clone())
    }

    /// The text in the log: `key=value` lines.
    pub(crate) fn to_text(&self) -> String {
        self.entries.iter().map(|(key, value)| format!("{key}={value}\n")).collect()
    }

    /// Reads the text of a log; `None` if it is none.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let entry = |line: &str| line.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
        let entries = text.lines().map(entry).collect::<Option<Vec<_>>>()?;
        Some(Self { entries })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn any_bytes_come_back() {
        let mut identity = Identity::new();
        identity.push("a=b\n", b"\xff=\n\\");
        identity.push("", "");
        let read = Identity::parse(identity.to_text().as_bytes()).unwrap();
        assert_eq!(read, identity);
        assert_eq!(read.get(""), Some(""));
        assert_eq!(Identity::parse(b"no equals sign"), None);
        assert_eq!(Identity::parse(b"\xff=1"), None);
    }

    #[test]
    fn the_first_difference_is_named() {
        let of = |entries: &[(&str, &str)]| {
            let mut identity = Identity::new();
            entries.iter().for_each(|(key, value)| identity.push(key, value));
            identity
        };
        let one = of(&[("layer", "1"), ("partial", "x"), ("layer", "2")]);
        assert_eq!(one.first_difference(&one, &[]), None);
        assert_eq!(one.first_difference(&of(&[("layer", "1"), ("layer", "2")]), &["partial"]), None);
        let other = of(&[("layer", "1"), ("layer", "3")]);
        assert_eq!(one.first_difference(&other, &["partial"]).as_deref(), Some("layer"));
        assert_eq!(of(&[]).first_difference(&one, &[]).as_deref(), Some("layer"));
        assert_eq!(other.first_difference(&of(&[("layer", "1")]), &[]).as_deref(), Some("layer"));
    }
}
