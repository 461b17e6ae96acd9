//! What a stream and a commit are about: nodes of a chain, looked up and held under the graph's lock, and how
//! the header of the image that gets another backing file is to call it. Called by the start of both.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;

use blockmirror_block::BlockDevice;
use blockmirror_image::relative_name;
use blockmirror_image_lock::Permission;
use blockmirror_mirror::Tap;
use blockmirror_ops::Base;
use blockmirror_qcow2::Qcow2;
use blockmirror_qmp::QmpError;

use super::ChainRequest;
use crate::Reply;
use crate::errors::{is_read_only, qmp_error};
use crate::exported_bitmaps::ExportedBitmaps;
use crate::graph::{AttachmentId, Graph, JobRole, NO_CHANGE, Node, Parent, Perms};

/// What the name in a header follows from, if it is not given: relative if the old one was, else the absolute
/// path.
pub(super) struct HeaderName {
    /// The image whose header changes, and the name that stands there.
    image: PathBuf,
    old: OsString,
    base: PathBuf,
}

impl HeaderName {
    fn new(graph: &Graph, image: &Node, base: &Node) -> Option<Self> {
        let old = image.qcow2.as_ref()?.header();
        Some(Self {
            image: image.path.clone()?,
            old: old.backing.as_ref()?.name.as_path().as_os_str().to_owned(),
            base: graph.in_headers(base).path.clone()?,
        })
    }

    /// Names the base. Looks at files.
    pub(super) fn name(&self, base: &mut Base) {
        if let Some(name) = relative_name(&self.image, &self.old, &self.base) {
            base.name = name.into_os_string().into_vec();
        }
    }
}

/// Refuses a name that the header of `image` cannot hold, before anything is done.
pub(super) fn check_name(image: &Qcow2, base: &Base) -> Reply<()> {
    image.check_backing_file(Some(&base.name), base.format.as_deref()).map_err(qmp_error)
}

impl ChainRequest {
    pub(super) fn options(&self) -> blockmirror_ops::JobOptions {
        blockmirror_ops::JobOptions::default()
            .speed(self.job.speed)
            .on_error(self.on_error)
            .auto_finalize(self.job.auto_finalize)
            .auto_dismiss(self.job.auto_dismiss)
    }

    /// The base `node`, and how it is to be called in the header of `image`, if that changes.
    fn base(&self, graph: &Graph, node: &Node, image: Option<&Node>) -> Reply<(Base, Option<HeaderName>)> {
        let named = graph.in_headers(node);
        let naming = image.filter(|_| self.backing_file.is_none());
        let naming = naming.and_then(|image| HeaderName::new(graph, image, node));
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
    pub(super) fn hold(&self, graph: &mut Graph, nodes: &[HeldNode]) -> Reply<Vec<AttachmentId>> {
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
pub(super) struct HeldNode {
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
pub(super) struct StreamPlan {
    /// The image that is filled, if anything lies below it.
    pub(super) image: Option<Arc<Qcow2>>,
    /// What it stands on afterwards, with its name and how many layers it lies below.
    pub(super) base: Option<(String, (Base, Option<HeaderName>), u32)>,
    pub(super) attachments: Vec<AttachmentId>,
}

impl StreamPlan {
    /// Looks the nodes up, and holds them.
    pub(super) fn new(
        graph: &mut Graph,
        request: &ChainRequest,
        device: &str,
        base: Option<&str>,
    ) -> Reply<Self> {
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
pub(super) struct CommitPlan {
    pub(super) tap: Arc<Tap>,
    /// The highest image that is committed, and how many there are.
    pub(super) top: Arc<dyn BlockDevice>,
    pub(super) layers: u32,
    pub(super) base: Base,
    pub(super) naming: Option<HeaderName>,
    pub(super) nodes: Vec<HeldNode>,
    /// The image above those that are committed, if there is one, and the filters below it, from the top.
    pub(super) overlay: Option<String>,
    pub(super) between: Vec<String>,
}

impl CommitPlan {
    /// Looks the nodes up, and refuses layers that have other users.
    pub(super) fn new(
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
