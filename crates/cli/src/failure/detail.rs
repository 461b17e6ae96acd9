//! What a failure says to programs: an object a line under `--output=json`.

use std::io;

use blockmirror_block::{self as block, ErrorKind};
use serde_json::{Map, Value, json};

use super::{Exit, Failure, one_line};

/// What is known of a failure besides its message.
#[derive(Debug)]
pub(crate) struct Detail {
    class: &'static str,
    operation: &'static str,
    path: Option<String>,
    offset: Option<u64>,
    errno: Option<i32>,
}

impl Detail {
    /// That of a failure of a disk or a file.
    pub(crate) fn of(error: &block::Error) -> Self {
        let system = error.cause().and_then(|cause| cause.downcast_ref::<io::Error>());
        Self {
            class: class(error.kind()),
            operation: error.operation(),
            path: error.name().map(str::to_owned),
            offset: error.offset(),
            errno: system.and_then(io::Error::raw_os_error),
        }
    }
}

/// The object of `failure`: `class`, `message` and `exit-code`; `operation`, `path`, `offset` and `errno`
/// where they are known. `None` of one without a message.
pub(crate) fn object(failure: &Failure) -> Option<Value> {
    let message = one_line(failure.message.as_ref()?);
    let detail = failure.detail.as_deref();
    let class = match (failure.exit, detail) {
        (Exit::Usage, _) => "usage",
        (Exit::Mismatch, _) => "mismatch",
        (Exit::Signal(_) | Exit::Resumable, _) => "interrupted",
        (_, Some(detail)) => detail.class,
        (_, None) => "failed",
    };
    let mut object = Map::new();
    object.insert("class".into(), json!(class));
    object.insert("message".into(), json!(message));
    object.insert("exit-code".into(), json!(failure.exit.code()));
    if let Some(Detail { operation, path, offset, errno, .. }) = detail {
        object.insert("operation".into(), json!(operation));
        let rest = [
            ("path", path.as_ref().map(|path| json!(path))),
            ("offset", offset.map(|offset| json!(offset))),
            ("errno", errno.map(|errno| json!(errno))),
        ];
        for (name, value) in rest {
            if let Some(value) = value {
                object.insert(name.into(), value);
            }
        }
    }
    Some(Value::Object(object))
}

/// What does not stop the command, and is no failure: `class` is `note` or `warning`.
pub(crate) fn remark(class: &str, message: &str) -> Value {
    json!({ "class": class, "message": one_line(message) })
}

/// A stable name of `kind`.
fn class(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::OutOfBounds => "out-of-bounds",
        ErrorKind::ReadOnly => "read-only",
        ErrorKind::NoSpace => "no-space",
        ErrorKind::Io => "io",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::Corrupt => "corrupt",
        ErrorKind::InvalidInput => "invalid",
        ErrorKind::Poisoned => "poisoned",
        ErrorKind::Locked => "locked",
        ErrorKind::NotFound => "not-found",
        ErrorKind::AlreadyExists => "exists",
        ErrorKind::PermissionDenied => "permission-denied",
        ErrorKind::LimitExceeded => "limit",
        ErrorKind::Cancelled => "cancelled",
        ErrorKind::WritesLost => "writes-lost",
        ErrorKind::CutShort => "cut-short",
        _ => "failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_of_a_file_has_all_members() {
        let error = block::Error::io("write", io::Error::from_raw_os_error(28)).in_file("disk").at(512);
        let said = object(&Failure::from(error)).unwrap();
        let want = json!({
            "class": "no-space",
            "message": "write: disk at 512: No space left on device (os error 28)",
            "exit-code": 1,
            "operation": "write",
            "path": "disk",
            "offset": 512,
            "errno": 28,
        });
        assert_eq!((&said["class"], &said["errno"]), (&want["class"], &want["errno"]));
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&said), keys(&want));
        let usage = object(&Failure::usage("a\nb")).unwrap();
        assert_eq!(usage, json!({ "class": "usage", "message": "a\\nb", "exit-code": 2 }));
        assert_eq!(object(&Failure { message: None, ..Failure::failed("") }), None);
    }
}
