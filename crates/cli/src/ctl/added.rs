//! Nodes and objects that are added to a server for one command, and files that it creates.
//!
//! Called by `mirror` and `snapshot`. What must hold: what was added for a job that does not start, or does
//! not end at its target, is removed again. A server keeps a file locked as long as a node has it open.

use std::time::Duration;

use blockmirror_image::Format;
use blockmirror_qmp::{Client, ClientError};
use serde_json::{Value, json};

use super::job::{Job, list};
use super::node::{Node, nodes};
use crate::console::Console;
use crate::failure::{Failure, Outcome};

/// How long an event is waited for before a job is looked at again.
const LOOK: Duration = Duration::from_millis(100);
/// The longest name of a node that QEMU takes.
const MAX_NODE_NAME: usize = 31;

/// The names of what is added for a job, or for an overlay.
#[derive(Clone, Debug)]
pub(super) struct Names {
    /// The node that is used.
    pub(super) node: String,
    /// The file below it.
    pub(super) file: String,
    /// TLS credentials of an NBD client.
    pub(super) credentials: String,
    /// The job that creates a file or an image in it.
    pub(super) create: String,
}

impl Names {
    /// The names of what the mirror `job` has as its target, by which it is found when the job has ended. No
    /// one else gives such names.
    pub(super) fn of_job(job: &str) -> Self {
        Self::of_node(&format!("ctl.{job}"))
    }

    /// The names of what an overlay called `node` consists of.
    pub(super) fn of_node(node: &str) -> Self {
        Self {
            node: node.into(),
            file: format!("{node}.file"),
            credentials: format!("{node}.tls"),
            create: format!("{node}.create"),
        }
    }

    /// Whether no node and no job of a server has one of them.
    pub(super) fn are_free(&self, nodes: &[Node], jobs: &[Job]) -> bool {
        !nodes.iter().any(|node| [&self.node, &self.file].contains(&&node.name))
            && !jobs.iter().any(|job| job.id == self.create)
    }

    /// Refuses names that a server does not take for nodes, of an `id` that was given.
    pub(super) fn check(&self, option: &str, id: &str) -> Outcome<()> {
        let is_well_formed = id.starts_with(|c: char| c.is_ascii_alphabetic())
            && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        let longest = self.node.len().max(self.file.len());
        match (is_well_formed, MAX_NODE_NAME.checked_sub(longest)) {
            (true, Some(_)) => Ok(()),
            (true, None) => {
                let most = (MAX_NODE_NAME + id.len()).saturating_sub(longest);
                Err(Failure::usage(format_args!(
                    "{option}: '{id}' is too long, {most} characters are allowed"
                )))
            }
            (false, _) => Err(Failure::usage(format_args!(
                "{option}: '{id}': an id begins with a letter, and has letters, digits, -, . and _"
            ))),
        }
    }
}

/// What was added, in the order in which it was.
#[derive(Debug, Default)]
pub(super) struct Added {
    nodes: Vec<String>,
    objects: Vec<String>,
    /// A file that was created for them.
    created: Option<String>,
}

impl Added {
    /// What a mirror that has ended had as its target, if `mirror` has opened that.
    fn by_job(client: &mut Client, job: &str) -> Result<Self, ClientError> {
        let there = nodes(client)?;
        let names = Names::of_job(job);
        let is_there = |name: &String| there.iter().any(|node| node.name == *name);
        let nodes: Vec<_> = [names.file, names.node].into_iter().filter(is_there).collect();
        let objects = if nodes.is_empty() { Vec::new() } else { vec![names.credentials] };
        Ok(Self { nodes, objects, created: None })
    }

    /// What `mirror` has opened below `node`, if it has opened that.
    pub(super) fn below_target(client: &mut Client, node: &str) -> Result<Self, ClientError> {
        let Some(job) = node.strip_prefix("ctl.") else { return Ok(Self::default()) };
        let mut below = Self::by_job(client, job)?;
        below.nodes.retain(|name| name != node);
        Ok(below)
    }

    /// Closes what `mirror` has opened as the target of the job `id`, which is over and has not pivoted.
    pub(super) fn close_target(console: &mut Console<'_>, client: &mut Client, id: &str) -> Outcome<()> {
        Self::by_job(client, id)?.remove(console, client);
        Ok(())
    }

    /// Adds a node with `options`, which name it.
    pub(super) fn node(&mut self, client: &mut Client, options: Value) -> Result<(), ClientError> {
        let name = options.get("node-name").and_then(Value::as_str).unwrap_or_default().to_owned();
        client.execute("blockdev-add", options)?;
        self.nodes.push(name);
        Ok(())
    }

    /// Refuses a file that the server cannot read. Nothing stays open.
    pub(super) fn must_exist(client: &mut Client, name: &str, path: &str) -> Result<(), ClientError> {
        client.execute(
            "blockdev-add",
            json!({"driver": "file", "node-name": name, "filename": path, "read-only": true, "force-share": true}),
        )?;
        client.execute("blockdev-del", json!({"node-name": name})).map(drop)
    }

    /// Adds an object with `options`, which name it.
    pub(super) fn object(&mut self, client: &mut Client, options: Value) -> Result<(), ClientError> {
        let name = options.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
        client.execute("object-add", options)?;
        self.objects.push(name);
        Ok(())
    }

    /// Adds a node `name` for the file or block device `path`, if it exists; says whether it does.
    pub(super) fn file(&mut self, client: &mut Client, name: &str, path: &str, rw: bool) -> Outcome<Found> {
        let options = |driver: &str| json!({"driver": driver, "node-name": name, "filename": path, "read-only": !rw, "discard": "unmap"});
        let Err(error) = self.node(client, options("file")) else { return Ok(Found::File) };
        let refusal = error.refusal().map(|refusal| refusal.desc.clone()).unwrap_or_default();
        if refusal.ends_with(NO_FILE) {
            return Ok(Found::Nothing);
        }
        // The server's own words of a file of another kind.
        if refusal.ends_with("to be a regular file") {
            return Ok(self.node(client, options("host_device")).map(|()| Found::Device)?);
        }
        Err(error.into())
    }

    /// Removes all of it, the last first. What cannot be removed is in use, and is noted.
    pub(super) fn remove(self, console: &mut Console<'_>, client: &mut Client) {
        for name in self.nodes.iter().rev() {
            if let Err(error) = client.execute("blockdev-del", json!({"node-name": name})) {
                console.note(format_args!("node '{name}' stays open: {error}"));
            }
        }
        for id in self.objects {
            // One of that name need not be there.
            let _ = client.execute("object-del", json!({"id": id}));
        }
        if let Some(file) = self.created {
            console.note(format_args!("{file}: it was created, and stays"));
        }
    }
}

/// How a server says that a file does not exist.
const NO_FILE: &str = "No such file or directory";

/// What there is at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    File,
    Device,
}

/// A file that is to be created by the server, with an image in it.
pub(super) struct NewFile<'a> {
    pub(super) path: &'a str,
    pub(super) format: Format,
    pub(super) size: u64,
    /// Name and format of the backing file, for the header.
    pub(super) backing: Option<(&'a str, &'a str)>,
}

impl NewFile<'_> {
    /// Creates the file, and adds the node `names.file` for it.
    ///
    /// The server replaces a file that is there: the caller has seen that none is.
    pub(super) fn create(&self, client: &mut Client, added: &mut Added, names: &Names) -> Outcome<()> {
        let length = if self.format == Format::Raw { self.size.next_multiple_of(512) } else { 0 };
        let job = &names.create;
        run_job(client, job, json!({"driver": "file", "filename": self.path, "size": length}))?;
        added.created = Some(self.path.to_owned());
        if added.file(client, &names.file, self.path, true)? != Found::File {
            return Err(Failure::failed(format_args!("{}: it is gone again", self.path)));
        }
        if self.format == Format::Raw {
            return Ok(());
        }
        let mut options = json!({
            "driver": self.format.as_str(), "file": names.file, "size": self.size.next_multiple_of(512),
        });
        if let Some((name, format)) = self.backing {
            (options["backing-file"], options["backing-fmt"]) = (name.into(), format.into());
        }
        run_job(client, job, options)
    }
}

/// Runs a job of type `create`. That takes a moment, and cannot be cancelled: signals are not looked at.
fn run_job(client: &mut Client, id: &str, options: Value) -> Outcome<()> {
    client.execute("blockdev-create", json!({"job-id": id, "options": options}))?;
    let ended = wait_concluded(client, id);
    // Also where it is not known how it ended: its id is needed again.
    let dismissed = client.execute("job-dismiss", json!({"id": id}));
    let ended = ended?;
    dismissed?;
    match ended.error() {
        Some(error) => Err(Failure::failed(format_args!("create: {error}"))),
        None => Ok(()),
    }
}

fn wait_concluded(client: &mut Client, id: &str) -> Outcome<Job> {
    loop {
        match list(client)?.into_iter().find(|job| job.id == id) {
            Some(job) if job.status() == "concluded" => return Ok(job),
            Some(_) => drop(client.next_event(LOOK)?),
            None => return Err(Failure::failed(format_args!("{id}: gone, how it ended is not known"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_into_what_servers_take() {
        assert_eq!(Names::of_job("mirror0").node, "ctl.mirror0");
        let check = |id: &str| match Names::of_job(id).check("--job-id", id) {
            Ok(()) => String::new(),
            Err(failure) => failure.message.unwrap_or_default(),
        };
        assert_eq!(check("a234567890123456789012"), "");
        let want = "--job-id: 'a2345678901234567890123' is too long, 22 characters are allowed";
        assert_eq!(check("a2345678901234567890123"), want);
        for id in ["", "1", "a b", "ä"] {
            assert!(check(id).contains("an id begins with a letter"), "{id}");
        }
    }
}
