//! `blockmirror serve`: images as NBD exports, for as long as the command runs.
//!
//! The parts are those of the libraries: `image` opens the disks, `nbd`'s server serves them. What must hold:
//! an image that clients may write is flushed and closed before the command ends, and a failure of that
//! decides its exit code.

mod clients;
mod images;
mod listen;

use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use blockmirror_image::Image;
use blockmirror_nbd::server::{Server, ServerError, ServerOptions, TlsPolicy, x509_credentials};

use crate::args::{ServeArgs, Switch};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::pid_file::PidFile;
use clients::Clients;

/// How often it is looked whether a signal has come.
const GLANCE: Duration = Duration::from_millis(100);

impl From<ServerError> for Failure {
    fn from(error: ServerError) -> Self {
        Self::failed(error)
    }
}

pub(crate) fn run(console: &mut Console<'_>, args: &ServeArgs) -> Outcome {
    let names = images::export_names(args)?;
    let places = listen::places(args)?;
    let pid_file = args.pid_file.as_deref().map(PidFile::check).transpose()?;
    let interrupt = Interrupt::watch()?;
    let images = images::open_all(console, args)?;
    let (last_has_gone, gone) = mpsc::channel();
    let clients = Arc::new(Clients::new(last_has_gone));
    let server = Server::new(options(args, &clients)?)?;
    for (name, image) in names.iter().zip(&images) {
        server.add(images::export(name, image, args)?)?;
    }
    let mut notice = String::new();
    for place in places {
        let listener = place.open()?;
        for name in &names {
            notice += &listen::uri(&listener, name, args);
            notice.push('\n');
        }
        server.listen(listener)?;
    }
    // From here on clients may write: what follows does not end the command before the images are closed.
    let written = pid_file.as_ref().map_or(Ok(()), PidFile::write);
    if written.is_ok() {
        console.report(&notice);
        // From here on the manager is sent what clients there are, and no longer where the command stands.
        let mut manager = console.manager.take();
        if let Some(manager) = &manager {
            manager.ready(false);
        }
        wait(&interrupt, &gone, (&clients, args.once), || {
            if let Some(manager) = &mut manager {
                manager.status(&status(names.len(), clients.count()));
            }
            !console.has_lost_a_server()
        });
        if let Some(manager) = &manager {
            manager.stopping();
        }
        // What fails from here on is its last status.
        console.manager = manager;
    }
    // One may end because it is no longer used.
    let has_lost_a_server = console.has_lost_a_server();
    let closed = close(console, &server, images);
    if let (Some(file), Ok(())) = (pid_file, &written) {
        file.remove();
    }
    written.and(closed)?;
    match has_lost_a_server && !interrupt.requested() {
        true => Err(Failure::failed("serve: a captive server has ended")),
        false => Ok(Exit::Done),
    }
}

fn options(args: &ServeArgs, clients: &Arc<Clients>) -> Outcome<ServerOptions> {
    let mut options = ServerOptions::default();
    options.max_connections = usize::try_from(args.max_connections).unwrap_or(usize::MAX);
    options.observer = Some(Arc::clone(clients) as _);
    if let Some(folder) = &args.tls_certificates {
        let config = x509_credentials(folder, args.tls_verify_peer == Switch::On)?;
        options.tls = TlsPolicy::Require(config);
    }
    Ok(options)
}

/// What is served, on one line.
fn status(exports: usize, clients: usize) -> String {
    let counted = |count, thing| format!("{count} {thing}{}", if count == 1 { "" } else { "s" });
    format!("{}, {}", counted(exports, "export"), counted(clients, "client"))
}

/// Waits for a signal, or, if that is to end it, for the end of the last of `clients`. Now and then calls
/// `look`, which says whether to go on.
fn wait(
    interrupt: &Interrupt,
    gone: &mpsc::Receiver<()>,
    (clients, once): (&Clients, bool),
    mut look: impl FnMut() -> bool,
) {
    while !interrupt.requested() && look() {
        match gone.recv_timeout(GLANCE) {
            // Another client may have come since.
            Ok(()) if once && clients.are_gone() => return,
            Ok(()) | Err(RecvTimeoutError::Timeout) => {}
            // The server has it as long as there is one.
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Ends the server, and closes all images, whatever becomes of the others.
fn close(console: &mut Console<'_>, server: &Server, images: Vec<Image>) -> Outcome<()> {
    let mut result = server.stop().map_err(Failure::from);
    for image in images.into_iter().filter(|image| image.device().geometry().writable) {
        let closed = image.close().map_err(Failure::from);
        match (closed, &result) {
            (Err(failure), Ok(())) => result = Err(failure),
            (Err(failure), Err(_)) => console.complain(failure.message.unwrap_or_default()),
            (Ok(()), _) => {}
        }
    }
    result
}
