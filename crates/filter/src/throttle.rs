//! Throttling: limits on bytes and requests per second, shared by the members of a group.
//!
//! `limits` says what can be asked for, `bucket` does the arithmetic (time is an argument), `group` lets
//! requests wait for their turn, and `member` puts the group in front of a disk or a storage.

mod bucket;
mod group;
mod limits;
mod member;

pub use bucket::Direction;
pub use group::ThrottleGroup;
pub use limits::{MAX_THROTTLE_VALUE, Rate, ThrottleError, ThrottleLimits};
pub use member::{Throttle, ThrottleStorage};
