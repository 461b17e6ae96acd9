//! Serves one image over NBD until standard input ends: `nbd_serve [-r] FORMAT IMAGE SOCKET [EXPORT]`.
//!
//! For trying clients by hand, and for measuring the server against others.

use std::error::Error;
use std::io::Read;

use blockmirror_image::{Format, OpenOptions};
use blockmirror_nbd::server::{Export, Listener, Server, ServerOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let read_only = args.first().is_some_and(|arg| arg == "-r");
    if read_only {
        args.remove(0);
    }
    let (format, image, socket, name) = match args.as_slice() {
        [format, image, socket] => (format, image, socket, ""),
        [format, image, socket, name] => (format, image, socket, name.as_str()),
        _ => return Err("usage: nbd_serve [-r] FORMAT IMAGE SOCKET [EXPORT]".into()),
    };
    let format = if format == "qcow2" { Format::Qcow2 } else { Format::Raw };
    let image = OpenOptions::new().format(format).writable(!read_only).open(image)?;
    let server = Server::new(ServerOptions::default())?;
    let export = Export::new(name, image.device().clone()).writable(!read_only).allocation_depth(true);
    server.add(export)?;
    server.listen(Listener::unix(socket)?)?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop()?;
    Ok(())
}
