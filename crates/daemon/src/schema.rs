//! Types of the schema that several layers share: what is read here, commands declare, and objects, jobs and
//! exports are made from it. How nodes are described is the drivers' (`driver`).

mod export;
mod job;
mod mirror;
mod object;
mod socket;

pub(crate) use export::{BitmapRef, NbdServerArgs, OneBitmap};
pub(crate) use job::{JOB_STATUS, JobType};
pub(crate) use mirror::{
    BitmapSync, CopyModeArg, MirrorArgs, OnErrorArg, ReflinkArg, Sync, mirror_arguments,
};
pub(crate) use object::{
    Endpoint, IothreadArgs, Limits, OBJECT_OPTIONS, ObjectArgs, ObjectKind, SecretArgs, ThrottleGroupArgs,
    TlsCredsArgs,
};
pub(crate) use socket::{SocketAddress, SocketAddressLegacy, SocketArg};
