//! Command line options of the form `driver=qcow2,node-name=x,file.driver=file,file.filename=y`, or the same
//! as JSON. Called by readers of command lines; the types come from the schema.
//!
//! Dots in keys make objects (`file.driver`) and lists (`children.0`); a comma in a value is written twice;
//! the last of equal keys wins. All values are strings until the schema says what they are: `on`, `off`,
//! `64k`. The first key may be left out where the option says which it is: `--object secret,id=x`. Text that
//! starts with `{` is JSON, with JSON's types.
//!
//! [`flat`] reads an older form, where keys are plain and `server` alone means `server=on`.

use serde_json::{Map, Value};

use crate::args::Args;
use crate::error::QmpError;
use crate::json::{JsonError, Parser};
use crate::schema::{Object, Shape, Spelling, check_members};

/// Bytes of one key between two dots at most.
const MAX_FRAGMENT: usize = 127;
/// Dots in a key at most: as deep as JSON may be.
const MAX_DEPTH: usize = 1024;

/// Reads `text` as options of the type `object`. `implied` is the key that the first may go without.
///
/// ```
/// use blockmirror_qmp::keyval;
/// use blockmirror_qmp::schema::*;
///
/// static CACHE: Object = Object::new("Cache", "How to cache.", &[opt("direct", BOOL, "bypass the host's cache")]);
/// static NODE: Object = Object::new("Node", "A node.", &[
///     req("driver", STR, "its driver"),
///     opt("size", SIZE, "its size"),
///     opt("cache", Type::Object(&CACHE), "caching"),
/// ]);
/// let node = keyval::options("null,size=1.5k,cache.direct=on", &NODE, Some("driver"))?;
/// assert_eq!(node.str("driver")?, "null");
/// assert_eq!(node.u64("size")?, 1536);
/// assert_eq!(node.object("cache")?["direct"], true);
/// let error = keyval::options("{'driver': 1}", &NODE, None).unwrap_err();
/// assert_eq!(error.desc, "Invalid parameter type for 'driver', expected: string");
/// # Ok::<(), blockmirror_qmp::QmpError>(())
/// ```
///
/// # Errors
/// In QEMU's words, what is wrong with the text or does not fit the type.
pub fn options(text: &str, object: &'static Object, implied: Option<&str>) -> Result<Args, QmpError> {
    let (members, spelling) = match text.starts_with('{') {
        true => (json(text)?, Spelling::Json),
        false => (parse(text, implied)?, Spelling::Keyval),
    };
    check_members(Shape::from(object), members, spelling).map(Args::new)
}

/// Reads `text` with plain keys: no objects, no lists, no JSON. A key without a value means `on`; with `no`
/// before it, `off`.
///
/// # Errors
/// As [`options`].
pub fn flat(text: &str, object: &'static Object, implied: Option<&str>) -> Result<Args, QmpError> {
    let mut members = Map::new();
    let mut rest = text;
    let mut first = true;
    while !rest.is_empty() {
        let length = rest.find(['=', ',']).unwrap_or(rest.len());
        let (key, after) = rest.split_at(length);
        let (key, value) = match (after.strip_prefix('='), implied) {
            (Some(after), _) => {
                let value;
                (value, rest) = unescape(after);
                (key.to_owned(), value)
            }
            (None, Some(implied)) if first => {
                let value;
                (value, rest) = unescape(rest);
                (implied.to_owned(), value)
            }
            (None, _) => {
                rest = after.strip_prefix(',').unwrap_or_default();
                let known = |key: &str| object.members.iter().any(|member| member.name == key);
                match key.strip_prefix("no") {
                    Some(positive) if !known(key) && known(positive) => (positive.to_owned(), "off".into()),
                    _ => (key.to_owned(), "on".into()),
                }
            }
        };
        first = false;
        if !object.members.iter().any(|member| member.name == key) {
            return Err(QmpError::generic(format!("Invalid parameter '{key}'")));
        }
        members.insert(key, value.into());
    }
    check_members(Shape::from(object), members, Spelling::Keyval).map(Args::new)
}

fn json(text: &str) -> Result<Map<String, Value>, QmpError> {
    let mut parser = Parser::default();
    let mut input = text.as_bytes();
    let first = parser.next(&mut input).or_else(|| parser.finish());
    let value = first.unwrap_or_else(|| Err(JsonError::Syntax("expecting value".into())))?;
    match (parser.next(&mut input).or_else(|| parser.finish()), value) {
        (Some(Err(JsonError::Limit(what))), _) => Err(JsonError::Limit(what).into()),
        (Some(_), _) => Err(QmpError::generic("Expecting at most one JSON value")),
        (None, Value::Object(members)) => Ok(members),
        (None, _) => Err(QmpError::generic("Expecting a JSON object")),
    }
}

/// Takes `text` apart: objects, lists and strings.
///
/// # Errors
/// As [`options`], but for types.
pub fn parse(text: &str, implied: Option<&str>) -> Result<Map<String, Value>, QmpError> {
    let mut members = Map::new();
    let mut rest = text;
    let mut implied = implied;
    while !rest.is_empty() {
        let length = rest.find(['=', ',']).unwrap_or(rest.len());
        let (key, after) = rest.split_at(length);
        if (key == "help" || key == "?") && !after.starts_with('=') {
            return Err(QmpError::generic("Help is not available for this option"));
        }
        let (key, value) = match implied.take() {
            Some(implied) if !key.is_empty() && !after.starts_with('=') => (implied, Some(rest)),
            _ => {
                check_key(key)?;
                (key, after.strip_prefix('='))
            }
        };
        let place = place(&mut members, key)?;
        let value =
            value.ok_or_else(|| QmpError::generic(format!("Expected '=' after parameter '{key}'")))?;
        let (value, next) = unescape(value);
        rest = next;
        *place = value.into();
    }
    let mut prefix = String::new();
    for (key, value) in &mut members {
        prefix.replace_range(.., key);
        lists(value, &mut prefix)?;
    }
    Ok(members)
}

/// The value at the start of `text`, up to a single comma, and what follows that comma.
fn unescape(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some((before, after)) = rest.split_once(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(before);
        match after.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, after),
        }
    }
}

/// Names between dots, each a letter with letters, digits, `-` and `_` after it, or, behind the first,
/// digits. A name may have a vendor's domain in front: `__org.example_name`.
fn fragments(key: &str) -> Option<Vec<&str>> {
    let mut fragments = Vec::new();
    let mut rest = key;
    loop {
        let vendor = rest.strip_prefix("__").map_or(Some(0), |domain| {
            let length = domain.find(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '-')?;
            (length > 0 && domain.get(length..)?.starts_with('_')).then_some(length + 3)
        })?;
        let name = rest.get(vendor..)?;
        let length = name.find('.').unwrap_or(name.len());
        let name = name.get(..length)?;
        let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        let is_index = !fragments.is_empty() && vendor == 0 && is_index(name);
        if !is_name && !is_index {
            return None;
        }
        fragments.push(rest.get(..vendor + length)?);
        match rest.get(vendor + length..)?.strip_prefix('.') {
            Some(next) => rest = next,
            None => return Some(fragments),
        }
    }
}

fn is_index(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_digit())
}

fn check_key(key: &str) -> Result<(), QmpError> {
    let fragments = fragments(key).ok_or_else(|| QmpError::generic(format!("Invalid parameter '{key}'")))?;
    if let Some(long) = fragments.iter().find(|fragment| fragment.len() > MAX_FRAGMENT) {
        let part = if fragments.len() > 1 { " fragment" } else { "" };
        return Err(QmpError::generic(format!("Parameter{part} '{long}' is too long")));
    }
    if fragments.len() > MAX_DEPTH {
        return Err(QmpError::generic("A parameter has too many parts"));
    }
    Ok(())
}

fn inconsistent(prefix: &str) -> QmpError {
    QmpError::generic(format!("Parameters '{prefix}.*' used inconsistently"))
}

/// Where the value of `key` goes.
fn place<'a>(members: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Value, QmpError> {
    let fragments = fragments(key).unwrap_or_else(|| vec![key]);
    let (last, outer) = fragments.split_last().unwrap_or((&key, &[]));
    let mut at = members;
    let mut length = 0;
    for name in outer {
        length += name.len();
        let next = at.entry(*name).or_insert_with(|| Value::Object(Map::new()));
        at = next.as_object_mut().ok_or_else(|| inconsistent(key.get(..length).unwrap_or_default()))?;
        length += 1;
    }
    let place = at.entry(*last).or_insert(Value::Null);
    if place.is_object() {
        return Err(inconsistent(key));
    }
    Ok(place)
}

/// Makes lists of objects whose keys are numbers, inside `value`, which stands at `prefix`.
fn lists(value: &mut Value, prefix: &mut String) -> Result<(), QmpError> {
    let Value::Object(members) = value else { return Ok(()) };
    let length = prefix.len();
    for (key, member) in &mut *members {
        prefix.push('.');
        prefix.push_str(key);
        lists(member, prefix)?;
        prefix.truncate(length);
    }
    let indices = members.keys().filter(|key| is_index(key)).count();
    if indices == 0 {
        return Ok(());
    }
    if indices < members.len() {
        return Err(inconsistent(prefix));
    }
    // A number too large to parse is far behind the first gap.
    let items =
        std::mem::take(members).into_iter().map(|(key, item)| (key.parse().unwrap_or(u64::MAX), item));
    let items: std::collections::BTreeMap<u64, Value> = items.collect();
    let mut list = Vec::new();
    for (expected, (index, item)) in (0..).zip(items) {
        if index != expected {
            return Err(QmpError::generic(format!("Parameter '{prefix}.{expected}' missing")));
        }
        list.push(item);
    }
    *value = Value::Array(list);
    Ok(())
}
