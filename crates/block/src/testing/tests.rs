//! The doubles keep the contracts.

mod crash;
mod disk;
mod fault;
mod storage;
