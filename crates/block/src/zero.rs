//! Runs of zeros in buffers.
