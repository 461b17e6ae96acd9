//! What can be asked of a job when it is started.

/// What happens when an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnError {
    /// The job fails.
    #[default]
    Report,
    /// The range is tried again, paced; after ten tries it is given up and listed.
    Ignore,
    /// The job pauses until it is resumed.
    Stop,
    /// Pause if space ran out, fail otherwise.
    Enospc,
    /// The same as [`Enospc`](Self::Enospc).
    Auto,
}

/// What can be asked of a job. Setters take and return it by value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobOptions {
    pub(crate) speed: u64,
    pub(crate) on_error: OnError,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
}

impl Default for JobOptions {
    fn default() -> Self {
        Self { speed: 0, on_error: OnError::Report, auto_finalize: true, auto_dismiss: true }
    }
}

impl JobOptions {
    /// Bytes per second; 0, the default, is as fast as it goes.
    #[must_use]
    pub fn speed(mut self, bytes_per_second: u64) -> Self {
        self.speed = bytes_per_second;
        self
    }

    /// What happens when a piece fails. Default: [`OnError::Report`]. With [`OnError::Ignore`] the job goes
    /// on, but fails in the end and leaves the chain as it is.
    #[must_use]
    pub fn on_error(mut self, policy: OnError) -> Self {
        self.on_error = policy;
        self
    }

    /// Whether the chain is changed as soon as all is moved; otherwise the job waits for
    /// [`JobControl::finalize`](crate::JobControl::finalize). Default: true.
    #[must_use]
    pub fn auto_finalize(mut self, auto: bool) -> Self {
        self.auto_finalize = auto;
        self
    }

    /// Whether a job that is over goes on to [`JobState::Null`](crate::JobState::Null) by itself; otherwise
    /// it waits for [`JobControl::dismiss`](crate::JobControl::dismiss). Default: true.
    #[must_use]
    pub fn auto_dismiss(mut self, auto: bool) -> Self {
        self.auto_dismiss = auto;
        self
    }
}
