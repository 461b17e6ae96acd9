//! A web server of one file, for the curl plugin: HEAD, and GET of a range.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

/// Serves `file` under every name as long as the process lives; the port.
pub(super) fn serve(file: Vec<u8>) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let file: Arc<[u8]> = file.into();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (client, file) = (client.unwrap(), Arc::clone(&file));
            // A client that goes away ends its thread.
            thread::spawn(move || while answer(&client, &file).is_some() {});
        }
    });
    port
}

/// Answers one request.
fn answer(mut client: &TcpStream, file: &[u8]) -> Option<()> {
    let mut lines = BufReader::new(client).lines();
    let first = lines.next()?.ok()?;
    let mut range = None;
    for line in lines {
        let line = line.ok()?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(bytes) = line.strip_prefix("range: bytes=") {
            let (from, to) = bytes.split_once('-')?;
            range = Some((from.parse::<usize>().ok()?, to.parse::<usize>().ok()?));
        }
    }
    let (status, body) = match range {
        Some((from, to)) => ("206 Partial Content", &file[from..=to.min(file.len() - 1)]),
        None => ("200 OK", file),
    };
    let mut head = format!("HTTP/1.1 {status}\r\nAccept-Ranges: bytes\r\nContent-Length: {}\r\n", body.len());
    if let Some((from, _)) = range {
        head += &format!("Content-Range: bytes {from}-{}/{}\r\n", from + body.len() - 1, file.len());
    }
    client.write_all((head + "\r\n").as_bytes()).ok()?;
    if !first.starts_with("HEAD ") {
        client.write_all(body).ok()?;
    }
    Some(())
}
