//! Mirror jobs: from the arguments of `blockdev-mirror` to a job on the source's tap.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::{BlockDevice, Storage};
use blockmirror_file::FileStorage;
use blockmirror_filter::NullDisk;
use blockmirror_image_lock::Permission;
use blockmirror_mirror::{
    BitmapMode, Convergence, CopyMode, Error, ErrorKind, Event, GroupMember, LiveLog, MirrorControl,
    MirrorGroup, MirrorJob, MirrorOptions, PreparedJob, Progress, Reflink, Refused, SyncMode,
};
use blockmirror_qmp::{QmpError, Session};
use serde_json::{Value, json};

use super::{
    AtEnd, CANCELLED, Claims, Figures, FileLog, Job, JobCommand, JobHandle, JobOptions, Jobs, ReservedId,
    SimpleJob, job_span, system_words,
};
use crate::Reply;
use crate::arguments::Int64;
use crate::context::Context;
use crate::errors::is_read_only;
use crate::events::{BLOCK_JOB_COPY_MODE, Events};
use crate::graph::{AttachmentId, Graph, JobRole, Node, Parent, Perms, WRITE};
use crate::ids::is_well_formed;
use crate::schema::{BitmapSync, MirrorArgs, OnErrorArg, Sync};

/// A mirror that is asked for.
#[derive(Debug)]
pub(crate) struct MirrorRequest {
    pub(crate) job: JobOptions,
    pub(crate) source: String,
    pub(crate) target: String,
    /// The source is what `replaces` names, below filters.
    pub(crate) below_filters: bool,
    /// The job's name, once it is reserved.
    reserved: Option<ReservedId>,
    /// A name that has to be free, although no node gets it.
    filter: Option<String>,
    /// The file of the log.
    log: Option<String>,
    pub(crate) options: MirrorOptions,
}

/// A mirror whose nodes are held and that can be started.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) request: MirrorRequest,
    attachments: Vec<AttachmentId>,
    /// The devices of the target.
    claims: Claims,
    tap: Arc<blockmirror_mirror::Tap>,
    target: Arc<dyn BlockDevice>,
}

impl MirrorRequest {
    /// What the arguments ask for.
    pub(crate) fn new(context: &Context, args: MirrorArgs) -> Reply<Self> {
        let id = args.job_id.clone().unwrap_or_default();
        let source = replaced(&context.graph.lock(), &args.device, args.replaces.as_deref())?;
        let mut options = MirrorOptions::new()
            .sync(match args.sync {
                Sync::Top => SyncMode::Top,
                Sync::Full => SyncMode::Full,
                Sync::None => SyncMode::None,
                Sync::Incremental => SyncMode::Incremental,
                Sync::Bitmap => SyncMode::Bitmap,
            })
            .on_source_error(OnErrorArg::policy(args.on_source_error))
            .on_target_error(OnErrorArg::policy(args.on_target_error))
            .unmap(true)
            .target_is_zero(args.target_is_zero.unwrap_or(false))
            .reflink(args.x_reflink.map_or(Reflink::Auto, Reflink::from))
            .copy_mode(args.copy_mode.map_or(CopyMode::Background, CopyMode::from));
        if args.x_log.is_some() && args.sync != Sync::Full {
            return Err(QmpError::generic(format!("sync mode '{}' does not use a log", args.sync.name())));
        }
        if let Some((name, mode)) = sync_bitmap(&args)? {
            options = options.bitmap(name, mode);
        }
        if let Some(granularity) = args.granularity.filter(|bytes| *bytes != 0) {
            if !(512..=64 << 20).contains(&granularity) {
                return Err(QmpError::generic(
                    "Parameter 'granularity' expects a value in range [512B, 64MB]",
                ));
            }
            if !granularity.is_power_of_two() {
                return Err(QmpError::generic("Parameter 'granularity' expects a power of 2"));
            }
            options = options.granularity(u64::from(granularity));
        }
        let not_negative = |given: Option<Int64>, text: &str| -> Reply<u64> {
            u64::try_from(given.map_or(0, |given| given.0)).map_err(|_| QmpError::generic(text))
        };
        let speed = not_negative(args.speed, "Parameter 'speed' expects a non-negative value")?;
        let buf_size = not_negative(args.buf_size, "Invalid parameter 'buf-size'")?;
        let auto_finalize = args.auto_finalize.unwrap_or(true);
        let auto_dismiss = args.auto_dismiss.unwrap_or(true);
        options = options.speed(speed).auto_finalize(auto_finalize).auto_dismiss(auto_dismiss);
        if buf_size != 0 {
            options = options.buf_size(buf_size);
        }
        if !is_well_formed(&id) {
            return Err(QmpError::generic(format!("Invalid job ID '{id}'")));
        }
        let span = job_span(&id, "mirror");
        let job = JobOptions { id, kind: "mirror", speed, auto_finalize, auto_dismiss, span };
        Ok(Self {
            job,
            below_filters: source != args.device,
            source,
            target: args.target,
            reserved: None,
            filter: args.filter_node_name,
            log: args.x_log,
            options,
        })
    }

    /// Whether zeros may give space back.
    pub(crate) fn unmap(self, unmap: Option<bool>) -> Self {
        Self { options: self.options.unmap(unmap.unwrap_or(true)), ..self }
    }
}

/// The bitmap from which the job works, if its mode has one.
fn sync_bitmap(args: &MirrorArgs) -> Reply<Option<(String, BitmapMode)>> {
    let (needs_bitmap, sync) = (matches!(args.sync, Sync::Incremental | Sync::Bitmap), args.sync.name());
    match (needs_bitmap, &args.bitmap) {
        (true, None) => {
            Err(QmpError::generic(format!("must provide a valid bitmap name for '{sync}' sync mode")))
        }
        (false, Some(_)) => Err(QmpError::generic(format!("sync mode '{sync}' does not use a bitmap"))),
        (true, Some(name)) => {
            let mode = match args.bitmap_mode {
                None | Some(BitmapSync::OnSuccess) => BitmapMode::OnSuccess,
                Some(BitmapSync::Never) => BitmapMode::Never,
                Some(BitmapSync::Always) => BitmapMode::Always,
            };
            Ok(Some((name.clone(), mode)))
        }
        (false, None) => Ok(None),
    }
}

/// The node whose users go over to the target: the device, or what `replaces` names below filters on it. The
/// job sits there, where it sees what the filters pass on.
fn replaced(graph: &Graph, device: &str, replaces: Option<&str>) -> Reply<String> {
    let Some(name) = replaces.filter(|name| *name != device) else {
        return Ok(device.to_owned());
    };
    if graph.get(name).is_none() {
        return Err(QmpError::generic(format!("Failed to find node with node-name='{name}'")));
    }
    graph.find(device)?;
    if !graph.below_filters(device).contains(&name) {
        return Err(QmpError::generic(format!(
            "Cannot replace '{name}' by a node mirrored from '{device}', because it cannot be guaranteed \
             that doing so would not \
             lead to an abrupt change of visible data"
        )));
    }
    Ok(name.to_owned())
}

/// Refuses a source that another job works on, or another node stands on, but for the `target`, and for
/// filters if the users of those are to go over.
fn check_source(graph: &Graph, source: &str, target: &str, below_filters: bool) -> Reply<()> {
    graph.check_no_job(source)?;
    for (_, u) in graph.attachments_of(source) {
        let passed_by = |parent: &str| below_filters && graph.get(parent).is_some_and(Node::is_filter);
        let is_passed = u.parent_node().is_some_and(passed_by);
        if matches!(u.parent, Parent::Node { .. }) && !u.is_link_of(target) && !is_passed {
            let parent = &u.parent;
            return Err(QmpError::generic(format!("Need a root block node: '{source}' is used by {parent}")));
        }
    }
    Ok(())
}

/// Refuses a source and a target that cannot change places.
fn check_nodes(graph: &Graph, request: &MirrorRequest) -> Reply<()> {
    let MirrorRequest { source, target, below_filters, .. } = request;
    check_source(graph, source, target, *below_filters)?;
    graph.check_pivots(Some((source, target)))?;
    graph.check_no_overlay(target)?;
    graph.check_bitmaps_free(target)?;
    graph.check_no_job(target)
}

/// Why a mirror does not start, beginning as clients know it.
fn in_words(error: &Error) -> String {
    match error {
        Error::SizeMismatch { .. } => "Source and target image have different sizes".to_owned(),
        other => other.to_string(),
    }
}

impl Jobs {
    /// Refuses a mirror whose target is still to be opened, for all but the target.
    pub(crate) fn check_mirror(self: &Arc<Self>, request: &mut MirrorRequest) -> Reply<()> {
        let graph = self.context.graph.lock();
        check_source(&graph, &request.source, "", request.below_filters)?;
        if let Some(name) = &request.filter {
            graph.check_name(name)?;
        }
        drop(graph);
        request.reserved = Some(self.reserve(&request.job.id)?);
        Ok(())
    }

    /// Refuses what the job itself would refuse with a target of `len` bytes.
    pub(crate) fn try_mirror(&self, request: &MirrorRequest, len: u64) -> Reply<()> {
        let tap = Arc::clone(&self.context.graph.lock().find(&request.source)?.tap);
        let prepared = MirrorJob::prepare(&tap, Arc::new(NullDisk::new(len)), request.options.clone());
        prepared.map(PreparedJob::abandon).map_err(|error| QmpError::generic(in_words(&error)))
    }

    /// Holds the nodes of a mirror for it.
    ///
    /// # Errors
    /// Nodes that are not there, or that others use.
    pub(crate) fn prepare_mirror(self: &Arc<Self>, mut request: MirrorRequest) -> Reply<Prepared> {
        {
            let graph = self.context.graph.lock();
            graph.find(&request.source)?;
            graph.find(&request.target)?;
            if request.source == request.target {
                return Err(QmpError::generic("Can't mirror node into itself"));
            }
            check_nodes(&graph, &request)?;
            if let Some(name) = &request.filter {
                graph.check_name(name)?;
            }
        }
        check_apart(&self.context, &request.source, &request.target)?;
        if request.reserved.is_none() {
            request.reserved = Some(self.reserve(&request.job.id)?);
        }
        let id = request.job.id.clone();
        let held = hold_mirror(&self.context, request).and_then(|mut prepared| {
            let target = prepared.request.target.clone();
            self.context.note_rewritten(&target);
            let claims = Claims::of_node(&self.context, &target)
                .and_then(|claims| self.context.keep_bitmaps_in_use(&target).map(|()| claims));
            prepared.claims = claims.inspect_err(|_| self.forget_mirror(&prepared))?;
            open_log(&self.context, &mut prepared).inspect_err(|_| self.forget_mirror(&prepared))?;
            Ok(prepared)
        });
        self.refused_start(&id, held)
    }

    /// Starts a mirror whose nodes are held.
    ///
    /// # Errors
    /// As for [`start_mirrors`](Self::start_mirrors).
    pub(crate) fn start_mirror(self: &Arc<Self>, session: Option<&Session>, prepared: Prepared) -> Reply<()> {
        self.start_mirrors(session, vec![prepared], |_| Ok(()))
    }

    /// Starts mirrors whose nodes are held: all or none. `commit` is called when they run, with whether all
    /// of them do: disks of different lengths are no error here, such a job starts and fails, as clients
    /// expect.
    ///
    /// # Errors
    /// Options that do not fit the disks, and what `commit` says; no event was sent then, and the nodes are
    /// free.
    pub(crate) fn start_mirrors(
        self: &Arc<Self>,
        session: Option<&Session>,
        mirrors: Vec<Prepared>,
        commit: impl FnOnce(bool) -> Reply<()>,
    ) -> Reply<()> {
        let mut seats = Vec::new();
        let mut problem = None;
        for mirror in &mirrors {
            match MirrorJob::prepare(&mirror.tap, Arc::clone(&mirror.target), mirror.request.options.clone())
            {
                Ok(seat) => seats.push(Ok((seat, &mirror.request.job.span))),
                Err(error @ Error::SizeMismatch { .. }) => seats.push(Err(in_words(&error))),
                Err(error) => {
                    problem = Some(error);
                    break;
                }
            }
        }
        // What runs is given up when it is dropped.
        let mut jobs = Vec::new();
        for seat in seats {
            match seat {
                Ok((seat, _)) if problem.is_some() => seat.abandon(),
                Ok((seat, span)) => match span.in_scope(|| seat.run()) {
                    Ok(job) => jobs.push(Ok(job)),
                    Err(error) => problem = Some(error),
                },
                Err(mismatch) => jobs.push(Err(mismatch)),
            }
        }
        let started = match problem {
            Some(error) => Err(QmpError::generic(in_words(&error))),
            None => commit(jobs.iter().all(Result::is_ok)),
        };
        if let Err(error) = started {
            drop(jobs);
            mirrors.iter().for_each(|mirror| self.forget_mirror(mirror));
            return Err(error);
        }
        for (job, mirror) in jobs.into_iter().zip(mirrors) {
            match job {
                Ok(job) => self.add_mirror(session, job, mirror),
                Err(mismatch) => {
                    let Prepared { request, attachments, claims, .. } = mirror;
                    let MirrorRequest { job, target, .. } = request;
                    let failed = SimpleJob::failed(&job, mismatch);
                    let at_end: AtEnd = Box::new(move |context| {
                        drop(claims);
                        context.release_bitmaps(&target);
                        context.detach_all(&attachments);
                    });
                    self.add_job(session, job, Box::new(failed), at_end);
                }
            }
        }
        Ok(())
    }

    /// Starts mirrors whose nodes are held and that end at one instant, or not at all.
    ///
    /// # Errors
    /// As for [`start_mirrors`](Self::start_mirrors); then none was started.
    pub(crate) fn start_mirror_group(
        self: &Arc<Self>,
        session: Option<&Session>,
        mirrors: Vec<Prepared>,
    ) -> Reply<()> {
        let members = mirrors.iter().map(|mirror| {
            let _span = mirror.request.job.span.enter();
            GroupMember::new(&mirror.tap, Arc::clone(&mirror.target), mirror.request.options.clone())
        });
        let group = match MirrorGroup::attach(members.collect()) {
            Ok(group) => group,
            Err(error) => {
                mirrors.iter().for_each(|mirror| self.forget_mirror(mirror));
                return Err(QmpError::generic(in_words(&error)));
            }
        };
        let (_, jobs) = group.into_jobs();
        for (job, mirror) in jobs.into_iter().zip(mirrors) {
            self.add_mirror(session, job, mirror);
        }
        Ok(())
    }

    /// Puts a mirror that runs into the table.
    fn add_mirror(self: &Arc<Self>, session: Option<&Session>, job: MirrorJob, prepared: Prepared) {
        let Prepared { request, attachments, claims, tap, target } = prepared;
        let control = job.control().clone();
        let (source_name, target_name) = (request.source, request.target);
        let handle = Mirror { control, target: target_name.clone() };
        let at_end: AtEnd = Box::new(move |context| {
            // Its threads end with it; the result has been reported already.
            let _ = job.wait();
            drop(claims);
            mirror_ended(context, &tap, &target, &source_name, &target_name, &attachments);
        });
        self.add_job(session, request.job, Box::new(handle), at_end);
    }

    /// Gives the nodes of a mirror back that was not started.
    pub(crate) fn forget_mirror(&self, prepared: &Prepared) {
        self.context.release_bitmaps(&prepared.request.target);
        self.context.detach_all(&prepared.attachments);
    }
}

/// Refuses a target whose bytes the source shows under another name, by a loop device, say. What both
/// open under one name is the lock's to refuse.
fn check_apart(context: &Context, source: &str, target: &str) -> Reply<()> {
    let (below, own) = {
        let graph = context.graph.lock();
        let own: Vec<_> = graph.lives_in(target).into_iter().filter_map(|node| node.file.clone()).collect();
        (graph.all_files_below(source).0, own)
    };
    let is_part = |file: &FileStorage| below.iter().any(|id| *id != file.id() && id.overlaps(file.id()));
    match own.iter().find(|file| is_part(file)) {
        Some(file) => Err(QmpError::generic(format!(
            "Node '{target}' cannot be the target: '{}' is part of the source '{source}'",
            file.name()
        ))),
        None => Ok(()),
    }
}

/// Opens the log of a mirror that is to have one.
fn open_log(context: &Context, prepared: &mut Prepared) -> Reply<()> {
    let Prepared { request, tap, .. } = prepared;
    let Some(path) = &request.log else { return Ok(()) };
    let log = FileLog::open(context, path, (&request.source, &request.target), tap)?;
    request.options = request.options.clone().live_log(LiveLog::new(Arc::new(log)));
    Ok(())
}

/// Holds the nodes of a mirror that nothing else speaks against.
fn hold_mirror(context: &Context, request: MirrorRequest) -> Reply<Prepared> {
    let mut graph = context.graph.lock();
    // Nodes may have been opened on them since they were checked: that locks nothing.
    check_nodes(&graph, &request)?;
    let (source, target) = (graph.find(&request.source)?, graph.find(&request.target)?);
    if target.read_only {
        return Err(is_read_only());
    }
    // A filter on it that has no users itself is none.
    if let Some((_, u)) = graph.users_of(&request.target).first() {
        return Err(QmpError::generic(format!(
            "Node '{}' is busy: it is in use by {}",
            request.target, u.parent
        )));
    }
    let (tap, tap_of_target) = (Arc::clone(&source.tap), Arc::clone(&target.tap));
    let device: Arc<dyn BlockDevice> = Arc::clone(&target.device) as _;
    let parent = |role| Parent::Job { id: request.job.id.clone(), kind: "mirror", role };
    let steady = Perms::READ.with(Permission::Write).with(Permission::WriteUnchanged);
    let on_source = graph.attach(&request.source, parent(JobRole::Source), Perms::READ, steady)?;
    let on_target = match graph.attach(&request.target, parent(JobRole::Target), WRITE, Perms::NONE) {
        Ok(id) => id,
        Err(error) => {
            let released = graph.detach(on_source);
            drop(graph);
            context.close(released);
            return Err(error);
        }
    };
    tap_of_target.note_rewritten();
    let attachments = vec![on_source, on_target];
    Ok(Prepared { request, attachments, claims: Claims::default(), tap, target: device })
}

/// The end of a mirror: the target is in the place of the source, or it is free again. What lies below the
/// tap decides, which `Tap::end` has stored: the job's result may be a failure after that.
fn mirror_ended(
    context: &Context,
    tap: &blockmirror_mirror::Tap,
    target: &Arc<dyn BlockDevice>,
    source_name: &str,
    target_name: &str,
    attachments: &[AttachmentId],
) {
    if Arc::ptr_eq(&tap.device(), target) {
        context.graph.lock().pivot(source_name, target_name, attachments, true);
    } else {
        context.note_rewritten(target_name);
        context.release_bitmaps(target_name);
    }
    context.detach_all(attachments);
}

/// A mirror, or a commit that is one, and the node that it fills.
#[derive(Debug)]
pub(super) struct Mirror {
    pub(super) control: MirrorControl,
    pub(super) target: String,
}

impl JobHandle for Mirror {
    fn figures(&self) -> Figures {
        let progress = self.control.progress();
        Figures {
            offset: progress.offset,
            len: progress.len,
            busy: progress.in_flight > 0,
            io_status: progress.io_status,
            mirror: Some(progress),
        }
    }

    fn request(&self, command: JobCommand) -> Result<(), Refused> {
        match command {
            JobCommand::Cancel(true) => self.control.force_cancel(),
            JobCommand::Cancel(false) => self.control.keep_copy(),
            JobCommand::Pause => self.control.pause(),
            JobCommand::Resume => self.control.resume(),
            JobCommand::SetSpeed(speed) => self.control.set_speed(speed),
            JobCommand::Change(mode) => self.control.change(mode),
            JobCommand::Complete => self.control.complete(),
            JobCommand::Finalize => self.control.finalize(),
            JobCommand::Dismiss => self.control.dismiss(),
        }
    }

    fn target(&self) -> Option<&str> {
        Some(&self.target)
    }

    fn keep_log(&self) {
        self.control.keep_log();
    }

    fn writes_lost(&self) {
        self.control.writes_lost();
    }

    fn failure(&self) -> Option<String> {
        let (kind, text) = self.control.failure()?;
        if let Some(words) = self.control.device_failure().and_then(system_words) {
            return Some(words.to_owned());
        }
        Some(if kind == ErrorKind::Cancelled { CANCELLED.to_owned() } else { text })
    }

    fn next_event(&self, timeout: Option<Duration>) -> Option<Event> {
        self.control.next_event(timeout)
    }
}

/// Puts what only mirrors have into an element of `query-block-jobs`.
pub(super) fn add_figures(info: &mut Value, progress: &Progress) {
    info["actively-synced"] = json!(progress.actively_synced);
    info["copy-mode"] = json!(progress.copy_mode.name());
    info["writes-through"] = json!(progress.writes_through);
    info["bulk-left"] = json!(progress.bulk_left);
    info["dirty-left"] = json!(progress.dirty_left);
    info["dirtied"] = json!(progress.dirtied);
    info["copied"] = json!(progress.copied);
    info["zeroed"] = json!(progress.zeroed);
    info["skipped"] = json!(progress.skipped);
    info["shared"] = json!(progress.shared);
    info["clone-calls"] = json!(progress.clone_calls);
    info["copy-rate"] = json!(progress.copy_rate);
    info["dirty-rate"] = json!(progress.dirty_rate);
    info["converging"] = json!(match progress.convergence {
        Convergence::Equal => "equal",
        Convergence::Converging => "yes",
        Convergence::NotConverging => "no",
        _ => "unknown",
    });
    if let Some(eta) = progress.eta {
        info["eta-ms"] = json!(u64::try_from(eta.as_millis()).unwrap_or(u64::MAX));
    }
}

/// Tells of events that only mirrors have.
pub(super) fn report_mirror_event(events: &Events, job: &Job, event: &Event) {
    if let Event::CopyMode { mode, reason, .. } = event {
        let data = json!({"device": job.id, "copy-mode": mode.name(), "reason": reason.to_string()});
        events.emit(&BLOCK_JOB_COPY_MODE, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::Arguments;

    /// A format that was opened on the source after the first look held its file, and would have stayed there
    /// in a pivot.
    #[test]
    fn a_source_is_looked_at_again_as_it_is_held() {
        let context = Context::new(Vec::new(), Vec::new());
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("f"), [0; 4096]).unwrap();
        let add = |node: Value| context.add_node(node.as_object().unwrap()).unwrap();
        add(json!({"driver": "file", "node-name": "f", "filename": dir.path().join("f")}));
        add(json!({"driver": "null-co", "node-name": "t", "size": 4096}));
        let args = json!({"job-id": "j", "device": "f", "target": "t", "sync": "full"});
        let args = MirrorArgs::parse(args.as_object().unwrap()).unwrap();
        let request = MirrorRequest::new(&context, args).unwrap();
        add(json!({"driver": "raw", "node-name": "r", "file": "f", "read-only": true}));
        let refused = hold_mirror(&context, request).unwrap_err();
        assert_eq!(refused.desc, "Need a root block node: 'f' is used by node 'r' (as 'file' child)");
    }
}
