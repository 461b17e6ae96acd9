//! Jobs that shorten chains of images: `stream` and `commit`.
//!
//! The work is that of `blockmirror-ops`; here nodes are held for it, and the graph is brought in line at its
//! end.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::BlockDevice;
use blockmirror_image::relative_name;
use blockmirror_image_lock::Permission;
use blockmirror_mirror::{Event, MirrorOptions, OnError, Refused, Tap, Verb};
use blockmirror_ops::{Base, CommitJob, ErrorKind, JobControl, StreamJob, commit_active};
use blockmirror_qcow2::Qcow2;
use blockmirror_qmp::{QmpError, Session};

use super::mirror::Mirror;
use super::{
    AtEnd, CANCELLED, Claims, Figures, JobCommand, JobHandle, JobOptions, Jobs, ReservedId, SimpleJob,
    system_words,
};
use crate::Reply;
use crate::context::Context;
use crate::driver::Reopened;
use crate::errors::{is_read_only, qmp_error};
use crate::exported_bitmaps::ExportedBitmaps;
use crate::graph::{AttachmentId, Graph, JobRole, NO_CHANGE, Node, Parent, Perms};

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

/// What the name in a header follows from, if it is not given: relative if the old one was, else the absolute
/// path.
struct Naming {
    /// The image whose header changes, and the name that stands there.
    image: PathBuf,
    old: OsString,
    base: PathBuf,
}

impl Naming {
    fn new(graph: &Graph, image: &Node, base: &Node) -> Option<Self> {
        let old = image.qcow2.as_ref()?.header();
        Some(Self {
            image: image.path.clone()?,
            old: old.backing.as_ref()?.name.as_path().as_os_str().to_owned(),
            base: graph.in_headers(base).path.clone()?,
        })
    }

    /// Names the base. Looks at files.
    fn name(&self, base: &mut Base) {
        if let Some(name) = relative_name(&self.image, &self.old, &self.base) {
            base.name = name.into_os_string().into_vec();
        }
    }
}

/// Refuses a name that the header of `image` cannot hold, before anything is done.
fn check_name(image: &Qcow2, base: &Base) -> Reply<()> {
    image.check_backing_file(Some(&base.name), base.format.as_deref()).map_err(qmp_error)
}

impl ChainRequest {
    fn options(&self) -> blockmirror_ops::JobOptions {
        blockmirror_ops::JobOptions::default()
            .speed(self.job.speed)
            .on_error(self.on_error)
            .auto_finalize(self.job.auto_finalize)
            .auto_dismiss(self.job.auto_dismiss)
    }

    /// The base `node`, and how it is to be called in the header of `image`, if that changes.
    fn base(&self, graph: &Graph, node: &Node, image: Option<&Node>) -> Reply<(Base, Option<Naming>)> {
        let named = graph.in_headers(node);
        let naming = image.filter(|_| self.backing_file.is_none());
        let naming = naming.and_then(|image| Naming::new(graph, image, node));
        let name = match (&self.backing_file, image) {
            (Some(given), _) => given.clone(),
            (None, Some(_)) => graph.header_name(&named.name)?,
            (None, None) => named.name_in_headers(),
        };
        let base = Base {
            device: Arc::clone(&node.device) as _,
            name: name.into_bytes(),
            format: Some(named.format_in_headers().to_string()),
        };
        Ok((base, naming))
    }

    /// Holds nodes for the job, each with what it needs of it; all or none.
    fn hold(&self, graph: &mut Graph, nodes: &[HeldNode]) -> Reply<Vec<AttachmentId>> {
        let mut attachments = Vec::new();
        for node in nodes {
            let parent = Parent::Job { id: self.job.id.clone(), kind: self.job.kind, role: node.role };
            let shared_perm = if node.is_guests { NO_CHANGE.with(Permission::Write) } else { NO_CHANGE };
            match graph.attach(&node.name, parent, node.perm, shared_perm) {
                Ok(id) => attachments.push(id),
                Err(error) => {
                    // Not the last use of any: they are links of a chain.
                    attachments.into_iter().for_each(|id| drop(graph.detach(id)));
                    return Err(error);
                }
            }
        }
        Ok(attachments)
    }
}

/// A node that a job holds.
struct HeldNode {
    name: String,
    perm: Perms,
    role: JobRole,
    /// The guest's own disk, or a filter on it: its users go on as they like.
    is_guests: bool,
}

impl HeldNode {
    /// Nodes of a chain that a job reads, of which the first `guests` are the guest's.
    fn of_chain(chain: &[&Node], guests: usize) -> Vec<Self> {
        let held = |(index, node): (usize, &&Node)| Self {
            name: node.name.clone(),
            perm: Perms::READ,
            role: JobRole::Other,
            is_guests: index < guests,
        };
        chain.iter().enumerate().map(held).collect()
    }
}

/// How many images are among the nodes of a chain: filters add no layer.
fn images_in(chain: &[&Node]) -> u32 {
    let images = chain.iter().filter(|node| !node.is_filter()).count();
    u32::try_from(images).unwrap_or(u32::MAX)
}

/// What a stream is about.
struct StreamPlan {
    /// The image that is filled, if anything lies below it.
    image: Option<Arc<Qcow2>>,
    /// What it stands on afterwards, with its name and how many layers it lies below.
    base: Option<(String, (Base, Option<Naming>), u32)>,
    attachments: Vec<AttachmentId>,
}

impl StreamPlan {
    /// Looks the nodes up, and holds them.
    fn new(graph: &mut Graph, request: &ChainRequest, device: &str, base: Option<&str>) -> Reply<Self> {
        let image = graph.find(device)?.qcow2.clone();
        let chain = graph.chain(device);
        let depth = base.and_then(|base| chain.iter().position(|node| node.name == base));
        let base = depth.map(|depth| {
            let base = request.base(graph, chain[depth], Some(chain[0]))?;
            Ok::<_, QmpError>((chain[depth].name.clone(), base, images_in(&chain[..depth])))
        });
        let base = base.transpose()?;
        let last = depth.unwrap_or(chain.len() - 1);
        let mut nodes = HeldNode::of_chain(&chain[..=last], 1);
        nodes[0].perm = Perms::READ.with(Permission::WriteUnchanged);
        let has_backing = chain.len() > 1;
        let attachments = request.hold(graph, &nodes)?;
        Ok(Self { image: image.filter(|_| has_backing), base, attachments })
    }
}

/// What a commit is about.
struct CommitPlan {
    tap: Arc<Tap>,
    /// The highest image that is committed, and how many there are.
    top: Arc<dyn BlockDevice>,
    layers: u32,
    base: Base,
    naming: Option<Naming>,
    nodes: Vec<HeldNode>,
    /// The image above those that are committed, if there is one, and the filters below it, from the top.
    overlay: Option<String>,
    between: Vec<String>,
}

impl CommitPlan {
    /// Looks the nodes up, and refuses layers that have other users.
    fn new(
        graph: &Graph,
        exported: &ExportedBitmaps,
        request: &ChainRequest,
        device: &str,
        top: &str,
        base: &str,
    ) -> Reply<Self> {
        let chain = graph.chain(device);
        let position = |name: &str| chain.iter().position(|node| node.name == name).unwrap_or_default();
        let (from, to) = (position(top), position(base));
        let image = chain.iter().take(from).rposition(|node| !node.is_filter());
        // Filters on the guest's image go with it.
        let from = if image.is_some() { from } else { 0 };
        if from == 0 {
            let tap = &graph.find(base)?.tap;
            let of_guest = chain[0].tap.bitmaps();
            // They stay with their node, but none joins another one there.
            let moves = |name: &str| {
                exported.is_exported(tap, name) && of_guest.iter().all(|bitmap| bitmap.name != name)
            };
            graph.check_bitmaps_free_but(base, moves)?;
        }
        // A reader of a layer that goes would see nothing sensible.
        for above in from.saturating_sub(1)..to.saturating_sub(1) {
            graph.check_layer(&chain[above + 1].name, &chain[above].name)?;
        }
        graph.check_no_job(base)?;
        let between = image.map_or(&[][..], |image| &chain[image + 1..from]);
        if between.iter().any(|filter| filter.driver.writes_on_read) {
            // It would write the base, which is read-only afterwards.
            return Err(is_read_only());
        }
        let (base, naming) = request.base(graph, chain[to], image.map(|image| chain[image]))?;
        let guests = 1 + chain.iter().take_while(|node| node.is_filter()).count();
        let mut nodes = HeldNode::of_chain(&chain[..=to], guests);
        nodes[to].perm = Perms::READ.with(Permission::WriteUnchanged);
        if from == 0 {
            nodes[0].role = JobRole::Source;
            nodes[to].role = JobRole::Target;
        }
        Ok(Self {
            tap: Arc::clone(&chain[0].tap),
            top: Arc::clone(&chain[from].device) as _,
            layers: images_in(&chain[from..to]),
            base,
            naming,
            nodes,
            overlay: image.map(|image| chain[image].name.clone()),
            between: between.iter().map(|node| node.name.clone()).collect(),
        })
    }
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
        let plan = match StreamPlan::new(&mut self.context.graph.lock(), &request, device, base) {
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
                    let claims = Claims::of_node(&self.context, base)
                        .inspect_err(|_| self.context.detach_all(&attachments))?;
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

/// The node `overlay` stands on `base` from now on, or on nothing; its image does already.
fn relink(context: &Context, overlay: &str, base: Option<&str>) {
    let mut graph = context.graph.lock();
    let mut old = graph.link(overlay, "backing");
    // The chain shared it before, with the same rights. Should it be refused all the same, the old edge
    // stays: what it leads to stands on the base, so that the base stays protected.
    let edge = match base.map(|base| graph.attach_backing(overlay, base)) {
        Some(Err(_)) => {
            old = None;
            None
        }
        Some(Ok(edge)) => Some(edge),
        None => None,
    };
    let image = graph.get(overlay).and_then(|node| node.qcow2.clone());
    let released = old.map(|old| graph.detach(old)).unwrap_or_default();
    drop(graph);
    if let (Some(edge), Some(image)) = (edge, image) {
        image.replace_backing(Some(edge));
    }
    context.close(released);
}

/// After a commit of what `overlay` stood on, by way of the filters `between` from the top, it stands on
/// `base`. The filters stay where they are, as in QEMU.
fn relink_by_filters(context: &Context, overlay: &str, between: &[String], base: &str) {
    let (Some(first), Some(last)) = (between.first(), between.last()) else {
        return relink(context, overlay, Some(base));
    };
    {
        let mut graph = context.graph.lock();
        let child = graph.children(last).next().map(|(role, _)| role);
        if let Some(link) = child.and_then(|role| graph.link(last, role)) {
            // Should it be refused, the filter shows the same by what was committed.
            let _ = graph.move_filter(link, base);
        }
    }
    relink(context, overlay, Some(first));
}

/// After an active commit: the users of `device` use `base`, which keeps its bitmaps, exported ones too.
fn pivot_to_base(context: &Context, device: &str, base: &str, attachments: &[AttachmentId]) {
    let mut graph = context.graph.lock();
    let exported = graph.get(base).map(|node| context.exported_bitmaps.suspend(&node.tap));
    graph.pivot(device, base, attachments, true);
    if let (Some(exported), Some(node)) = (exported, graph.get(base)) {
        exported.resume(&node.tap);
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
