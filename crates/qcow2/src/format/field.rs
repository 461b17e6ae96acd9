//! Checks of header fields that the header and its extensions have in common.

use crate::error::{Error, Result};
use crate::limits;

/// The error that `field` has a value that is not allowed.
pub(super) fn field(field: &'static str, value: impl Into<u64>, allowed: &str) -> Error {
    Error::HeaderField { field, value: value.into(), allowed: allowed.into() }
}

/// A table lies on a cluster border and ends below 2^56. `field_name` is that of its offset.
pub(super) fn check_table(
    field_name: &'static str,
    offset: u64,
    bytes: u64,
    cluster_size: u64,
) -> Result<()> {
    if !offset.is_multiple_of(cluster_size) {
        return Err(Error::HeaderField {
            field: field_name,
            value: offset,
            allowed: format!("only multiples of the cluster size, {cluster_size}, are allowed"),
        });
    }
    if offset == 0 && bytes > 0 {
        return Err(field(field_name, offset, "the header itself lies there"));
    }
    if offset.checked_add(bytes).is_none_or(|end| end > limits::MAX_HOST_OFFSET) {
        return Err(field(field_name, offset, "the table must end below 2^56"));
    }
    Ok(())
}
