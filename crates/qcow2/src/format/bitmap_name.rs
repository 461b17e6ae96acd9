//! The name of a persistent bitmap, as it stands in the directory.
//!
//! QEMU writes text, but a directory of 64 MiB may hold any bytes, and as text these would take three times
//! their length. So the bytes are kept, and text is made where a name is shown.

use std::borrow::Cow;
use std::fmt;

/// The name of a persistent bitmap: any bytes. Names are compared as bytes, so one that is not UTF-8 equals
/// no text.
///
/// ```
/// use blockmirror_qcow2::format::bitmap_name::BitmapName;
///
/// let name = BitmapName::from("monday");
/// assert_eq!(name, *"monday");
/// assert_eq!(name.to_string(), "monday");
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct BitmapName(Box<[u8]>);

impl BitmapName {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self(bytes.into_boxed_slice())
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As text; what is not UTF-8 is replaced.
    pub fn to_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.0)
    }
}

impl From<&str> for BitmapName {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().into())
    }
}

impl fmt::Display for BitmapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_text())
    }
}

impl fmt::Debug for BitmapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.to_text(), f)
    }
}

impl PartialEq<str> for BitmapName {
    fn eq(&self, text: &str) -> bool {
        *self.0 == *text.as_bytes()
    }
}

impl PartialEq<String> for BitmapName {
    fn eq(&self, text: &String) -> bool {
        *self == **text
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for BitmapName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_text())
    }
}
