//! `blockmirror serve` over TLS: each side knows the other by its certificate.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::io::{Result, Write};
use std::sync::mpsc;
use std::thread;

use blockmirror_testing::content::{Fill, write_raw};
use blockmirror_testing::scratch::scratch;

use crate::common::pki::credentials;
use crate::common::{ours, ours_ok};

/// A standard output that is read elsewhere.
struct Output(mpsc::Sender<Vec<u8>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let _ = self.0.send(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

#[test]
fn over_tls() {
    let dir = scratch().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    credentials(dir.path(), "localhost");
    write_raw(&dir.path().join("disk"), 1 << 20, &[(0, 1 << 20, Fill::Noise)]).unwrap();
    let (sender, receiver) = mpsc::channel();
    let (certificates, disk) = (path(""), path("disk"));
    let server = thread::spawn({
        let (certificates, disk) = (certificates.clone(), disk.clone());
        move || {
            let words = ["blockmirror", "serve", "--once", "--port", "0", "--tls-certificates"];
            let words = words.into_iter().chain([certificates.as_str(), disk.as_str()]);
            let mut err = Vec::new();
            let code = blockmirror_cli::run(words, &mut Output(sender), &mut err);
            (code, String::from_utf8(err).unwrap())
        }
    });
    let notice = String::from_utf8(receiver.recv().expect("a notice")).unwrap();
    let uri = notice.trim_end().to_owned();
    assert!(uri.starts_with("nbds://127.0.0.1:") && uri.ends_with('/'), "{uri}");
    // Without TLS, and without the certificates, there is nothing to see.
    assert_eq!(ours(["info", "-f", "raw", &uri.replace("nbds:", "nbd:")]).code, 1);
    let known = format!("{uri}?tls-certificates={certificates}&tls-hostname=localhost");
    assert_eq!(ours_ok(["compare", &known, &disk]), "Images are identical.\n");
    assert_eq!(server.join().unwrap(), (0, String::new()));
}
