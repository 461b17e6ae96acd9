//! Buffers aligned for direct I/O.
/// A zeroed, aligned, reusable buffer.
#[derive(Debug)]
pub struct AlignedBuf;
