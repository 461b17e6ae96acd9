//! Jobs that shorten chains of images: `stream` and `commit`.
//!
//! The work is that of `blockmirror-ops`; here nodes are held for it, and the graph is brought in line at its
//! end.

mod plan;
mod relink;

use std::sync::Arc;
use std::time::Duration;

use blockmirror_mirror::{Event, MirrorOptions, OnError, Refused, Verb};
use blockmirror_ops::{CommitJob, ErrorKind, JobControl, StreamJob, commit_active};
use blockmirror_qmp::{QmpError, Session};

use self::plan::{CommitPlan, StreamPlan, check_name};
use self::relink::{pivot_to_base, relink, relink_by_filters};
use super::mirror::Mirror;
use super::{
    AtEnd, CANCELLED, Claims, Figures, JobCommand, JobHandle, JobOptions, Jobs, ReservedId, SimpleJob,
    system_words,
};
use crate::Reply;
use crate::context::Context;
use crate::driver::Reopened;
use crate::errors::qmp_error;
use crate::graph::AttachmentId;

/// What both kinds are started with.
#[derive(Debug)]
pub(crate) struct ChainRequest {
    pub(crate) job: JobOptions,
    /// The job's name.
    pub(crate) _reserved: ReservedId,
    pub(crate) on_error: OnError,
    /// What the header of the image that gets another backing file is to call it, if that is given.
    pub(crate) backing_file: Option<String>,
}

/// What a commit holds while it runs.
struct HeldChain {
    writable: Reopened,
    attachments: Vec<AttachmentId>,
    claims: Claims,
    base: String,
}

impl HeldChain {
    /// Gives it back, after a job that did not put the base in another node's place.
    fn give_back(self, context: &Context) {
        drop(self.claims);
        context.note_rewritten(&self.base);
        context.release_bitmaps(&self.base);
        context.make_read_only(self.writable);
        context.detach_all(&self.attachments);
    }
}

impl Jobs {
    /// Starts to bring up into `device` what it shows of its backing files above `base`, or of all.
    pub(crate) fn start_stream(
        self: &Arc<Self>,
        session: &Session,
        request: ChainRequest,
        device: &str,
        base: Option<&str>,
    ) -> Reply<()> {
        {
            let graph = self.context.graph.lock();
            graph.check_no_job(device)?;
            for node in &graph.chain(device)[1..] {
                graph.check_no_job(&node.name)?;
            }
        }
        // For the time of the job, if it was not.
        let writable = self.context.make_writable(device)?;
        // The graph is not locked while the node is given back.
        let plan = StreamPlan::new(&mut self.context.graph.lock(), &request, device, base);
        let plan = match plan {
            Ok(plan) => plan,
            Err(error) => {
                self.context.make_read_only(writable);
                return Err(error);
            }
        };
        let StreamPlan { image, base, attachments } = plan;
        let give_back = move |context: &Context, writable: Reopened, attachments: &[AttachmentId]| {
            context.make_read_only(writable);
            context.detach_all(attachments);
        };
        let Some(image) = image else {
            let job = SimpleJob::idle(&request.job);
            let at_end: AtEnd = Box::new(move |context| give_back(context, writable, &attachments));
            self.add_job(Some(session), request.job, Box::new(job), at_end);
            return Ok(());
        };
        let below = base.as_ref().map(|(name, ..)| name.clone());
        let layers = base.map(|(_, (mut base, naming), layers)| {
            if let Some(naming) = naming {
                naming.name(&mut base);
            }
            (base, layers)
        });
        let fits = layers.as_ref().map_or(Ok(()), |(base, _)| check_name(&image, base));
        let start = || StreamJob::start(image, layers, request.options()).map_err(qmp_error);
        let job = fits.and_then(|()| request.job.span.in_scope(start));
        let job = match job {
            Ok(job) => job,
            Err(error) => {
                give_back(&self.context, writable, &attachments);
                return Err(error);
            }
        };
        let control = job.control().clone();
        let device = device.to_owned();
        let at_end: AtEnd = Box::new(move |context| {
            // The result has been reported.
            if job.wait().is_ok() {
                relink(context, &device, below.as_deref());
            }
            give_back(context, writable, &attachments);
        });
        self.add_job(Some(session), request.job, Box::new(control), at_end);
        Ok(())
    }

    /// Starts to write what lies in the chain of `device` from `top` down to above `base` into `base`.
    pub(crate) fn start_commit(
        self: &Arc<Self>,
        session: &Session,
        request: ChainRequest,
        device: &str,
        top: &str,
        base: &str,
    ) -> Reply<()> {
        let graph = self.context.graph.lock();
        graph.check_no_job(device)?;
        let plan = CommitPlan::new(&graph, &self.context.exported_bitmaps, &request, device, top, base)?;
        drop(graph);
        // For the time of the job, if they were not. The overlay's header changes.
        let held = self.context.make_writable(base).and_then(|mut writable| {
            let overlay = plan.overlay.iter().try_for_each(|overlay| {
                writable.and(self.context.make_writable(overlay)?);
                Ok(())
            });
            let held = overlay
                .and_then(|()| request.hold(&mut self.context.graph.lock(), &plan.nodes))
                .and_then(|attachments| {
                    let claims = Claims::of_node(&self.context, base).and_then(|claims| {
                        if plan.overlay.is_none() {
                            self.context.keep_bitmaps_in_use(base)?;
                        }
                        Ok(claims)
                    });
                    let claims = claims.inspect_err(|_| {
                        self.context.release_bitmaps(base);
                        self.context.detach_all(&attachments);
                    })?;
                    Ok((attachments, claims))
                });
            match held {
                Ok((attachments, claims)) => {
                    Ok(HeldChain { writable, attachments, claims, base: base.to_owned() })
                }
                Err(error) => {
                    self.context.make_read_only(writable);
                    Err(error)
                }
            }
        });
        // A mirror has its base opened before there is a job.
        let held = match plan.overlay {
            None => held,
            Some(_) => self.refused_start(&request.job.id, held),
        }?;
        self.context.note_rewritten(base);
        match plan.overlay.clone() {
            None => self.start_active_commit(session, request, device, plan, held),
            Some(overlay) => self.start_inner_commit(session, request, &overlay, plan, held),
        }
    }

    /// Starts a commit from the top of the chain, `device`: a mirror.
    fn start_active_commit(
        self: &Arc<Self>,
        session: &Session,
        request: ChainRequest,
        device: &str,
        plan: CommitPlan,
        held: HeldChain,
    ) -> Reply<()> {
        let policy = request.on_error;
        let options = MirrorOptions::new()
            .speed(request.job.speed)
            .on_source_error(policy)
            .on_target_error(policy)
            .auto_finalize(request.job.auto_finalize)
            .auto_dismiss(request.job.auto_dismiss);
        let (tap, target) = (plan.tap, plan.base.device);
        let start = || commit_active(&tap, Arc::clone(&target), plan.layers, options);
        let job = match request.job.span.in_scope(start) {
            Ok(job) => job,
            Err(error) => {
                held.give_back(&self.context);
                return Err(qmp_error(error));
            }
        };
        let handle = Mirror { control: job.control().clone(), target: held.base.clone() };
        let device = device.to_owned();
        let at_end: AtEnd = Box::new(move |context| {
            let _ = job.wait();
            if Arc::ptr_eq(&tap.device(), &target) {
                let HeldChain { attachments, claims, base, .. } = held;
                drop(claims);
                pivot_to_base(context, &device, &base, &attachments);
                context.detach_all(&attachments);
                context.collect(&device);
            } else {
                held.give_back(context);
            }
        });
        self.add_job(Some(session), request.job, Box::new(handle), at_end);
        Ok(())
    }

    /// Starts a commit of images below `overlay`, which comes to stand on the base.
    fn start_inner_commit(
        self: &Arc<Self>,
        session: &Session,
        request: ChainRequest,
        overlay: &str,
        plan: CommitPlan,
        held: HeldChain,
    ) -> Reply<()> {
        let CommitPlan { mut base, naming, top, layers, between, .. } = plan;
        if let Some(naming) = naming {
            naming.name(&mut base);
        }
        let image = self.context.graph.lock().get(overlay).and_then(|node| node.qcow2.clone());
        let job = image
            .ok_or_else(|| QmpError::generic("The image above the top has no backing file"))
            .and_then(|image| {
                check_name(&image, &base)?;
                let start = || CommitJob::start(image, top, base, layers, request.options());
                request.job.span.in_scope(start).map_err(qmp_error)
            });
        let job = match job {
            Ok(job) => job,
            Err(error) => {
                held.give_back(&self.context);
                return Err(error);
            }
        };
        let control = job.control().clone();
        let overlay = overlay.to_owned();
        let at_end: AtEnd = Box::new(move |context| {
            if job.wait().is_ok() {
                relink_by_filters(context, &overlay, &between, &held.base);
                // It may have been too short.
                context.refresh_from(&held.base);
            }
            held.give_back(context);
        });
        self.add_job(Some(session), request.job, Box::new(control), at_end);
        Ok(())
    }
}

impl JobHandle for JobControl {
    fn figures(&self) -> Figures {
        let progress = self.progress();
        let busy = progress.state == blockmirror_mirror::JobState::Running;
        Figures {
            offset: progress.offset,
            len: progress.len,
            busy,
            io_status: progress.io_status,
            mirror: None,
        }
    }

    fn request(&self, command: JobCommand) -> Result<(), Refused> {
        let refused = |verb| Err(Refused::State { verb, state: self.progress().state });
        match command {
            JobCommand::Cancel(true) => self.force_cancel(),
            JobCommand::Cancel(false) => self.cancel(),
            JobCommand::Pause => self.pause(),
            JobCommand::Resume => self.resume(),
            JobCommand::SetSpeed(speed) => self.set_speed(speed),
            JobCommand::Change(_) => refused(Verb::Change),
            JobCommand::Complete => refused(Verb::Complete),
            JobCommand::Finalize => self.finalize(),
            JobCommand::Dismiss => self.dismiss(),
        }
    }

    fn failure(&self) -> Option<String> {
        let (kind, text) = JobControl::failure(self)?;
        if let Some(words) = self.device_failure().and_then(system_words) {
            return Some(words.to_owned());
        }
        Some(if kind == ErrorKind::Cancelled { CANCELLED.to_owned() } else { text })
    }

    fn next_event(&self, timeout: Option<Duration>) -> Option<Event> {
        JobControl::next_event(self, timeout)
    }
}
