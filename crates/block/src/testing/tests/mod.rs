//! The doubles keep the contracts.
