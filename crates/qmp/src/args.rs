//! A command's arguments as its handler gets them: already checked against the schema.

use serde_json::{Map, Value};

use crate::error::QmpError;

/// Members by name. A getter of the wrong type, or of a required member that the schema does not require,
/// gives an error that blames the program and not the client.
#[derive(Debug, Clone, Default)]
pub struct Args(Map<String, Value>);

impl Args {
    /// Members that the schema has let pass.
    pub fn new(members: Map<String, Value>) -> Self {
        Self(members)
    }

    /// The members.
    pub fn map(&self) -> &Map<String, Value> {
        &self.0
    }

    /// The members, taken.
    pub fn into_map(self) -> Map<String, Value> {
        self.0
    }

    /// The member as it is, if given.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// Whether the member was given.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// A string or a name of an enum.
    ///
    /// # Errors
    /// The handler and its schema disagree; so for all getters.
    pub fn str(&self, name: &str) -> Result<&str, QmpError> {
        self.opt_str(name)?.ok_or_else(|| disagree(name))
    }

    /// A string or a name of an enum, if given.
    pub fn opt_str(&self, name: &str) -> Result<Option<&str>, QmpError> {
        self.as_type(name, Value::as_str)
    }

    /// An unsigned number.
    pub fn u64(&self, name: &str) -> Result<u64, QmpError> {
        self.opt_u64(name)?.ok_or_else(|| disagree(name))
    }

    /// An unsigned number, if given.
    pub fn opt_u64(&self, name: &str) -> Result<Option<u64>, QmpError> {
        self.as_type(name, Value::as_u64)
    }

    /// A signed number.
    pub fn i64(&self, name: &str) -> Result<i64, QmpError> {
        self.opt_i64(name)?.ok_or_else(|| disagree(name))
    }

    /// A signed number, if given.
    pub fn opt_i64(&self, name: &str) -> Result<Option<i64>, QmpError> {
        self.as_type(name, Value::as_i64)
    }

    /// A truth value.
    pub fn bool(&self, name: &str) -> Result<bool, QmpError> {
        self.opt_bool(name)?.ok_or_else(|| disagree(name))
    }

    /// A truth value, if given.
    pub fn opt_bool(&self, name: &str) -> Result<Option<bool>, QmpError> {
        self.as_type(name, Value::as_bool)
    }

    /// An object.
    pub fn object(&self, name: &str) -> Result<&Map<String, Value>, QmpError> {
        self.opt_object(name)?.ok_or_else(|| disagree(name))
    }

    /// An object, if given.
    pub fn opt_object(&self, name: &str) -> Result<Option<&Map<String, Value>>, QmpError> {
        self.as_type(name, Value::as_object)
    }

    /// A list.
    pub fn array(&self, name: &str) -> Result<&[Value], QmpError> {
        self.opt_array(name)?.ok_or_else(|| disagree(name))
    }

    /// A list, if given.
    pub fn opt_array(&self, name: &str) -> Result<Option<&[Value]>, QmpError> {
        self.as_type(name, |value| value.as_array().map(Vec::as_slice))
    }

    fn as_type<'a, T>(
        &'a self,
        name: &str,
        get: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, QmpError> {
        self.0.get(name).map(|value| get(value).ok_or_else(|| disagree(name))).transpose()
    }
}

fn disagree(name: &str) -> QmpError {
    QmpError::generic(format!("Internal error: the schema and the handler disagree about '{name}'"))
}

impl From<Map<String, Value>> for Args {
    fn from(members: Map<String, Value>) -> Self {
        Self(members)
    }
}
