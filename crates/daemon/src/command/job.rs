//! Jobs: the commands `job-*` and `block-job-*`, and what is asked about jobs.

use std::sync::Arc;

use blockmirror_mirror::Verb;
use blockmirror_qmp::schema::{
    BOOL, Command, Enum, INT, Member, Object, STR, Type, UINT64, case, opt, req, value,
};
use blockmirror_qmp::{ErrorClass, QmpError, Session};
use serde_json::{Map, Value};

use super::{Commands, Services};
use crate::Reply;
use crate::arguments::{Argument, Arguments, Int64, NoArguments, arguments, variant};
use crate::job::{Job, JobCommand};
use crate::schema::{CopyModeArg, JOB_STATUS, JobType};

static JOB_INFO: Object = Object::new(
    "JobInfo",
    "A job.",
    &[
        req("id", STR, "its name"),
        req("type", JobType::TYPE, "what kind"),
        req("status", Type::Enum(&JOB_STATUS), "where it stands"),
        req("current-progress", INT, "what is done"),
        req("total-progress", INT, "what there is to do; grows with what is written meanwhile"),
        opt("error", STR, "why it failed"),
    ],
);

static IO_STATUS: Enum = Enum::new(
    "BlockDeviceIoStatus",
    "Whether an error has stopped the job.",
    &[value("ok", "no"), value("failed", "yes"), value("nospace", "yes: space ran out")],
);

static CONVERGING: Enum = Enum::new(
    "MirrorConvergence",
    "Whether a mirror comes to its end.",
    &[
        value("equal", "nothing is left but what is being written"),
        value("yes", "what is left gets less"),
        value("no", "what is left does not get less"),
        value("unknown", "it has not been watched for long enough, or stands still"),
    ],
);

static MIRROR_INFO: Object = Object::new(
    "BlockJobInfoMirror",
    "More about a mirror.",
    &[
        req("actively-synced", BOOL, "source and target are equal but for the writes under way"),
        opt("copy-mode", CopyModeArg::TYPE, "the mode that was asked for").ours(),
        opt("writes-through", BOOL, "whether writes go to the target at once at present").ours(),
        opt("bulk-left", UINT64, "bytes that the first pass has not looked at").ours(),
        opt("dirty-left", UINT64, "bytes that are to be copied").ours(),
        opt("dirtied", UINT64, "bytes written since the start").ours(),
        opt("copied", UINT64, "bytes copied").ours(),
        opt("zeroed", UINT64, "bytes made zero").ours(),
        opt("skipped", UINT64, "bytes that needed nothing").ours(),
        opt("shared", UINT64, "bytes for which the target shares blocks with the source's files").ours(),
        opt("clone-calls", UINT64, "the system calls that this took").ours(),
        opt("copy-rate", UINT64, "bytes per second that the job does").ours(),
        opt("dirty-rate", UINT64, "bytes per second that are written").ours(),
        opt("converging", Type::Enum(&CONVERGING), "whether it comes to its end").ours(),
        opt("eta-ms", UINT64, "when, in milliseconds").ours(),
    ],
);

static BLOCK_JOB_INFO: Object = Object::union(
    "BlockJobInfo",
    "A job that moves data.",
    &[
        req("type", JobType::TYPE, "what kind"),
        req("device", STR, "its name"),
        req("len", INT, "what there is to do"),
        req("offset", INT, "what is done"),
        req("busy", BOOL, "whether something is in flight"),
        req("paused", BOOL, "whether it is paused"),
        req("speed", INT, "bytes per second; 0 is no limit"),
        req("io-status", Type::Enum(&IO_STATUS), "whether an error has stopped it"),
        req("ready", BOOL, "whether it can be completed"),
        req("status", Type::Enum(&JOB_STATUS), "where it stands"),
        req("auto-finalize", BOOL, "whether it ends without `job-finalize`"),
        req("auto-dismiss", BOOL, "whether it vanishes without `job-dismiss`"),
        opt("error", STR, "why it failed"),
    ],
    "type",
    &[case("mirror", &MIRROR_INFO)],
);

static QUERY_JOBS: Command = Command::new("query-jobs", "Lists the jobs.", &[])
    .returns(Type::Array(&Type::Object(&JOB_INFO)), "the jobs");
static QUERY_BLOCK_JOBS: Command = Command::new("query-block-jobs", "Lists the jobs that move data.", &[])
    .returns(Type::Array(&Type::Object(&BLOCK_JOB_INFO)), "the jobs");

arguments! {
    /// The job, as the commands `job-*` name it.
    struct ById {
        id: String = "id", "the job";
    }
}

arguments! {
    /// The job, as the older commands name it.
    pub(super) struct ByDevice {
        device: String = "device", "the job";
    }
}

arguments! {
    pub(super) struct CancelArgs {
        device: String = "device", "the job";
        force: Option<bool> = "force", "give it up in any case, at once" [default "false"];
    }
}

arguments! {
    pub(super) struct SetSpeedArgs {
        device: String = "device", "the job";
        speed: Int64 = "speed", "bytes per second; 0 is no limit";
    }
}

static JOB_PAUSE: Command = Command::new(
    "job-pause",
    "Pauses a job: what is in flight is finished, nothing else is begun, and its state is `paused`, or \
     `standby` if it was ready.",
    ById::MEMBERS,
);
static JOB_RESUME: Command = Command::new(
    "job-resume",
    "Lets a job go on, after a pause or after an error that stopped it; what failed is tried again. If a \
     flush of the target of a \
     mirror has failed, the target is opened anew, and what no flush has covered is copied again.",
    ById::MEMBERS,
);
static JOB_CANCEL: Command = Command::new(
    "job-cancel",
    "Gives a job up at once, ready or not. `BLOCK_JOB_CANCELLED` follows; the target of a mirror is of no \
     use then.",
    ById::MEMBERS,
);
static JOB_COMPLETE: Command = Command::new(
    "job-complete",
    "Ends a job that is ready: the users of the source of a mirror go over to the target, at one instant. \
     It is answered at once, while the job still converges; `BLOCK_JOB_COMPLETED` says that all has moved. \
     Refused before the job is ready.",
    ById::MEMBERS,
);
static JOB_FINALIZE: Command = Command::new(
    "job-finalize",
    "Lets a job end that was started with `auto-finalize` \
     false.",
    ById::MEMBERS,
)
.differs(
    "a mirror that is pending has not held the guest: the last look, the flush and the pivot happen \
         here, and may fail",
);
static JOB_DISMISS: Command = Command::new(
    "job-dismiss",
    "Forgets a job that is over and was started with `auto-dismiss` false.",
    ById::MEMBERS,
);

static BLOCK_JOB_PAUSE: Command = Command::new("block-job-pause", "As `job-pause`.", ByDevice::MEMBERS);
static BLOCK_JOB_RESUME: Command = Command::new("block-job-resume", "As `job-resume`.", ByDevice::MEMBERS);
static BLOCK_JOB_CANCEL: Command = Command::new(
    "block-job-cancel",
    "Ends a job that is ready and keeps the target as a copy of one instant (event `BLOCK_JOB_COMPLETED`); \
     cancels one that is \
     not ready (event `BLOCK_JOB_CANCELLED`). A paused job is refused, unless by force.",
    CancelArgs::MEMBERS,
);
static BLOCK_JOB_COMPLETE: Command =
    Command::new("block-job-complete", "As `job-complete`.", ByDevice::MEMBERS);
static BLOCK_JOB_FINALIZE: Command = Command::new("block-job-finalize", "As `job-finalize`.", ById::MEMBERS);
static BLOCK_JOB_DISMISS: Command = Command::new("block-job-dismiss", "As `job-dismiss`.", ById::MEMBERS);
static BLOCK_JOB_SET_SPEED: Command = Command::new(
    "block-job-set-speed",
    "Changes how fast a job goes, at once. A mirror that is ready copies what is written without a limit.",
    SetSpeedArgs::MEMBERS,
);

arguments! {
    struct ChangeMirror("BlockJobChangeOptionsMirror", "What of a mirror can be changed.") {
        copy_mode: CopyModeArg = "copy-mode", "when the target gets what is written";
    }
}

arguments! {
    struct ChangeArgs {
        id: String = "id", "the job";
        kind: JobType = "type", "what kind of job it is";
    }
}

static CHANGE: Object = Object::union(
    "BlockJobChangeOptions",
    "What of a job can be changed.",
    ChangeArgs::MEMBERS,
    "type",
    &[variant::<ChangeMirror>("mirror")],
)
.differs("a mirror can go back to `background`");

/// The members that `type` brings come with those that there are always.
struct ChangeOptions {
    always: ChangeArgs,
    mirror: Option<ChangeMirror>,
}

impl Arguments for ChangeOptions {
    const MEMBERS: &'static [Member] = ChangeArgs::MEMBERS;
    const CHANGEABLE: &'static [(&'static str, bool)] = &[];

    fn parse(members: &Map<String, Value>) -> Reply<Self> {
        let always = ChangeArgs::parse(members)?;
        let mirror = match always.kind {
            JobType::Mirror => Some(ChangeMirror::parse(members)?),
            _ => None,
        };
        Ok(Self { always, mirror })
    }
}

static BLOCK_JOB_CHANGE: Command =
    Command::boxed("block-job-change", "Changes a job while it goes on.", &CHANGE);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands
        .add_quick(&QUERY_JOBS, |services, _, _: NoArguments| Ok(services.jobs.infos().into()))
        .add_quick(&QUERY_BLOCK_JOBS, |services, _, _: NoArguments| Ok(services.jobs.block_infos().into()))
        .add_quick(&JOB_PAUSE, |services, _, job| request(services, &job, JobCommand::Pause))
        .add_quick(&JOB_RESUME, |services, _, job| by_id(services, &job, |job| services.jobs.resume_job(job)))
        .add_quick(&JOB_CANCEL, |services, _, job| request(services, &job, JobCommand::Cancel(true)))
        .add_quick(&JOB_COMPLETE, |services, _, job| request(services, &job, JobCommand::Complete))
        .add_quick(&JOB_FINALIZE, |services, _, job| request(services, &job, JobCommand::Finalize))
        .add_quick(&JOB_DISMISS, |services, _, job| request(services, &job, JobCommand::Dismiss))
        .add_quick(&BLOCK_JOB_PAUSE, pause)
        .add_quick(&BLOCK_JOB_RESUME, resume)
        .add_quick(&BLOCK_JOB_CANCEL, cancel)
        .add_quick(&BLOCK_JOB_COMPLETE, complete)
        .add_quick(&BLOCK_JOB_FINALIZE, |services, _, job: ById| {
            services.jobs.find_block_job(&job.id)?.request(JobCommand::Finalize).map(nothing)
        })
        .add_quick(&BLOCK_JOB_DISMISS, |services, _, job: ById| {
            services.jobs.find_block_job(&job.id)?.request(JobCommand::Dismiss).map(nothing)
        })
        .add_quick(&BLOCK_JOB_SET_SPEED, set_speed)
        .add_quick(&BLOCK_JOB_CHANGE, change);
}

/// `block-job-pause`.
pub(super) fn pause(services: &Arc<Services>, _: &Session, job: ByDevice) -> Reply<Value> {
    services.jobs.find_block_job(&job.device)?.request(JobCommand::Pause).map(nothing)
}

/// `block-job-resume`.
pub(super) fn resume(services: &Arc<Services>, _: &Session, job: ByDevice) -> Reply<Value> {
    services.jobs.resume_job(&*services.jobs.find_block_job(&job.device)?).map(nothing)
}

/// `block-job-cancel`.
pub(super) fn cancel(services: &Arc<Services>, _: &Session, args: CancelArgs) -> Reply<Value> {
    let force = args.force.unwrap_or(false);
    services.jobs.find_block_job(&args.device)?.request(JobCommand::Cancel(force)).map(nothing)
}

/// `block-job-complete`.
pub(super) fn complete(services: &Arc<Services>, _: &Session, job: ByDevice) -> Reply<Value> {
    services.jobs.find_block_job(&job.device)?.request(JobCommand::Complete).map(nothing)
}

/// `block-job-set-speed`.
pub(super) fn set_speed(services: &Arc<Services>, _: &Session, args: SetSpeedArgs) -> Reply<Value> {
    let job = services.jobs.find_block_job(&args.device)?;
    let speed = u64::try_from(args.speed.0)
        .map_err(|_| QmpError::generic("Parameter 'speed' expects a non-negative value"))?;
    job.request(JobCommand::SetSpeed(speed)).map(nothing)
}

fn change(services: &Arc<Services>, _: &Session, args: ChangeOptions) -> Reply<Value> {
    let ChangeOptions { always: ChangeArgs { id, kind }, mirror } = args;
    let job = services.jobs.find_block_job(&id)?;
    job.check_allows(Verb::Change)?;
    if job.kind != JobType::Mirror.name() {
        return Err(QmpError::generic("Job type does not support change"));
    }
    let Some(mirror) = mirror else {
        let kind = kind.name();
        return Err(QmpError::generic(format!("Job '{}' is '{}' job, not '{kind}'", job.id, job.kind)));
    };
    job.request(JobCommand::Change(mirror.copy_mode.into())).map(nothing)
}

/// For the commands `job-*`, which have words of their own for a job that is gone.
fn request(services: &Services, job: &ById, command: JobCommand) -> Reply<Value> {
    by_id(services, job, |job| job.request(command))
}

/// The same for what is asked in another way.
fn by_id(services: &Services, job: &ById, ask: impl FnOnce(&Job) -> Reply<()>) -> Reply<Value> {
    let asked = ask(&*services.jobs.find(&job.id)?);
    asked.map(nothing).map_err(|error| match error.class {
        ErrorClass::DeviceNotActive => QmpError::generic("Job not found"),
        _ => error,
    })
}

fn nothing(_: ()) -> Value {
    Value::Null
}
