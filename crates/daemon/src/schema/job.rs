//! Kinds and states of jobs, in answers and in events.

use blockmirror_qmp::schema::{Enum, value};

use crate::arguments::choice;

choice! {
    pub(crate) enum JobType("JobType", "What kind of job.", differs "other kinds of jobs are not there") {
        Commit = "commit", "an image into its backing file";
        Stream = "stream", "a backing file into its image";
        Mirror = "mirror", "a node to another";
        Create = "create", "a new image";
    }
}

pub(crate) static JOB_STATUS: Enum = Enum::new(
    "JobStatus",
    "Where a job stands.",
    &[
        value("created", "set up"),
        value("running", "at work"),
        value("paused", "at work, but paused"),
        value("ready", "the target is equal; what is written is copied at once"),
        value("standby", "ready, but paused"),
        value("waiting", "about to end"),
        value("pending", "waits for `job-finalize`"),
        value("aborting", "given up, about to end"),
        value("concluded", "over"),
        value("null", "over and dismissed"),
    ],
)
.differs("`undefined`, which QEMU never tells, is not there");
