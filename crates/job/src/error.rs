//! What a job needs of the errors of its operation.

use std::error::Error;
use std::io;

use blockmirror_block as block;

use crate::event::Operation;

/// The error of a kind of job. The job itself causes those that are made here; all others come from its work.
pub trait JobError: Error + Send + Sized + 'static {
    /// The error, coarsely enough to act on.
    type Kind: Copy;

    /// What went wrong, for machines.
    fn kind(&self) -> Self::Kind;

    /// The device's own error, where one failed.
    fn device_error(&self) -> Option<&block::Error>;

    /// The job was cancelled.
    fn cancelled() -> Self;

    /// Whether the job was cancelled.
    fn is_cancelled(&self) -> bool;

    /// The thread of the job panicked.
    fn panicked() -> Self;

    /// The operating system gave no thread.
    fn thread(error: io::Error) -> Self;

    /// An operation on a device failed, and the policy makes the job fail with it.
    fn failed(operation: Operation, error: block::Error) -> Self;

    /// Ranges were left out under the policy `ignore`; `error` is the first reason.
    fn left_out(error: block::Error) -> Self;
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// The error of a job whose work cannot fail by itself.
    #[derive(Debug, thiserror::Error)]
    #[error("{self:?}")]
    pub(crate) enum TestError {
        Cancelled,
        Panicked,
        Thread(io::Error),
        Failed(Operation, block::Error),
        LeftOut(block::Error),
    }

    impl JobError for TestError {
        type Kind = ();

        fn kind(&self) {}

        fn device_error(&self) -> Option<&block::Error> {
            match self {
                Self::Failed(_, error) | Self::LeftOut(error) => Some(error),
                _ => None,
            }
        }

        fn cancelled() -> Self {
            Self::Cancelled
        }

        fn is_cancelled(&self) -> bool {
            matches!(self, Self::Cancelled)
        }

        fn panicked() -> Self {
            Self::Panicked
        }

        fn thread(error: io::Error) -> Self {
            Self::Thread(error)
        }

        fn failed(operation: Operation, error: block::Error) -> Self {
            Self::Failed(operation, error)
        }

        fn left_out(error: block::Error) -> Self {
            Self::LeftOut(error)
        }
    }
}
