//! Limits of memory and processor time, by the kernel.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::SandboxError;

/// From SIGXCPU to the end of the process by SIGKILL, in seconds of processor time: time to remove what is
/// unfinished.
pub const GRACE_SECONDS: u64 = 10;

pub(crate) fn limit(memory: Option<u64>, cpu_seconds: Option<u64>) -> Result<(), SandboxError> {
    if let Some(bytes) = memory {
        set("memory", Resource::Data, bytes, bytes)?;
    }
    if let Some(seconds) = cpu_seconds {
        set("processor time", Resource::Cpu, seconds, seconds.saturating_add(GRACE_SECONDS))?;
    }
    // A dump holds what the image does, and lies where others may look.
    set("core dumps", Resource::Core, 0, 0)
}

/// Lowers a limit; one that is lower already stays.
fn set(what: &'static str, resource: Resource, soft: u64, hard: u64) -> Result<(), SandboxError> {
    let now = getrlimit(resource);
    let lower = |limit: u64, now: Option<u64>| Some(now.map_or(limit, |now| now.min(limit)));
    let limit = Rlimit { current: lower(soft, now.current), maximum: lower(hard, now.maximum) };
    setrlimit(resource, limit).map_err(|errno| SandboxError::Resource { what, cause: io::Error::from(errno) })
}
