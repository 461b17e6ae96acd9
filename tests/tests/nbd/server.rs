//! Clients that others wrote against our NBD server: QEMU's tools, libnbd's, and fio.
//!
//! Skipped, visibly, where they are not installed (Debian: qemu-utils, libnbd-bin, fio).

#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is the point")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::{BlockDevice, ByteRange, Result, Visit};
use blockmirror_image::{Format, OpenOptions, ReferencePolicy};
use blockmirror_nbd::server::{
    Export, Listener, MetaContext, Server, ServerOptions, TlsPolicy, x509_credentials,
};
use blockmirror_testing::qemu::{Qemu, have, listens, run};
use blockmirror_testing::scratch::scratch;
use serde_json::Value;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A folder with an image, and our server of it as export `d`.
struct Served {
    dir: TempDir,
    server: Arc<Server>,
}

impl Served {
    /// Serves the image `name` in `dir`.
    fn image(dir: TempDir, name: &str, format: Format, options: ServerOptions) -> Self {
        let image = OpenOptions::new()
            .format(format)
            .writable(true)
            .policy(ReferencePolicy::beside(&dir.path().join(name)).unwrap())
            .open(dir.path().join(name))
            .unwrap();
        let server = Server::new(options).unwrap();
        let device: Arc<dyn BlockDevice> = image.device().clone();
        let export = Export::new("d", device)
            .writable(true)
            .description("what it is")
            .allocation_depth(true)
            .context(Arc::new(Stripes));
        server.add(export).unwrap();
        server.listen(Listener::unix(dir.path().join("ours")).unwrap()).unwrap();
        Self { dir, server }
    }

    /// A raw image: 4 MiB that tell where they belong, then a hole of 12 MiB.
    fn raw() -> Self {
        let dir = scratch().unwrap();
        let file = fs::File::create(dir.path().join("raw")).unwrap();
        file.write_all_at(&pattern(), 0).unwrap();
        file.set_len(16 * MIB).unwrap();
        Self::image(dir, "raw", Format::Raw, ServerOptions::default())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn uri(&self) -> String {
        uri(&self.path("ours"))
    }

    /// Runs a program in the folder; it must succeed.
    fn run(&self, program: &str, args: &[&str]) -> String {
        run(program, self.dir.path(), args).unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // A failing test is not made another failure by this.
        let stopped = self.server.stop();
        assert!(thread::panicking() || stopped.is_ok());
    }
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///d?socket={}", socket.display())
}

/// Every other 64 KiB is dirty.
struct Stripes;

impl MetaContext for Stripes {
    fn name(&self) -> &'static str {
        "qemu:dirty-bitmap:stripes"
    }

    fn visit(&self, range: ByteRange, visit: &mut dyn FnMut(ByteRange, u32) -> Visit) -> Result<()> {
        for piece in range.pieces(65536) {
            if visit(piece, u32::from((piece.start() / 65536) % 2 == 1)).is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// 4 MiB without a zero byte or a repetition.
fn pattern() -> Vec<u8> {
    (0..1u32 << 20).flat_map(|i| (i.wrapping_mul(2_654_435_761) | 0x0101_0101).to_be_bytes()).collect()
}

/// `qemu-nbd` on the same image, as the oracle for answers to clients. Killed when dropped.
struct Theirs(Child);

impl Theirs {
    fn serve(dir: &Path, name: &str, format: &str) -> Self {
        let child = Command::new("qemu-nbd")
            .args(["-t", "-r", "-A", "-f", format, "-e", "8", "-x", "d", "-k"])
            .arg(dir.join("theirs"))
            .arg(dir.join(name))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !listens(&dir.join("theirs")) {
            assert!(Instant::now() < deadline, "qemu-nbd does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        Self(child)
    }
}

impl Drop for Theirs {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn nbdinfo_is_told_everything() {
    if !have("nbdinfo_is_told_everything", &["nbdinfo"]) {
        return;
    }
    let served = Served::raw();
    let info: Value = serde_json::from_str(&served.run("nbdinfo", &["--json", &served.uri()])).unwrap();
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    let contexts = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:stripes"];
    for (key, value) in [
        ("export-name", Value::from("d")),
        ("description", Value::from("what it is")),
        ("export-size", Value::from(16 * MIB)),
        ("block_size_minimum", Value::from(1)),
        ("block_size_preferred", Value::from(4096)),
        ("block_size_maximum", Value::from(32 * MIB)),
        ("contexts", Value::from(contexts.to_vec())),
    ] {
        assert_eq!(export[key], value, "{key}");
    }
    let can = ["cache", "df", "fast-zero", "flush", "fua", "multi-conn", "trim", "zero", "connect", "write"];
    for can in can {
        served.run("nbdinfo", &["--can", can, &served.uri()]);
    }
    assert!(run("nbdinfo", Path::new("."), ["--is", "read-only", &served.uri()]).is_err());
    let list: Value =
        serde_json::from_str(&served.run("nbdinfo", &["--list", "--json", &served.uri()])).unwrap();
    assert_eq!(list["exports"][0]["export-name"], "d");
    let map = |context: &str| -> Vec<(u64, u64, u64)> {
        let args = [&format!("--map={context}"), "--json", &served.uri()];
        let map: Value = serde_json::from_str(&served.run("nbdinfo", &args)).unwrap();
        let field = |run: &Value, name: &str| run[name].as_u64().unwrap();
        let rows = map.as_array().unwrap();
        rows.iter().map(|r| (field(r, "offset"), field(r, "length"), field(r, "type"))).collect()
    };
    assert_eq!(map("base:allocation"), [(0, 4 * MIB, 0), (4 * MIB, 12 * MIB, 3)]);
    assert_eq!(map("qemu:allocation-depth"), [(0, 16 * MIB, 1)]);
    let stripes = map("qemu:dirty-bitmap:stripes");
    assert_eq!(stripes.len(), 256);
    assert_eq!(stripes[3], (3 * 65536, 65536, 1));
}

#[test]
fn nbdcopy_copies_out_and_in_over_four_connections() {
    if !have("nbdcopy_copies_out_and_in_over_four_connections", &["nbdcopy"]) {
        return;
    }
    let served = Served::raw();
    let uri = served.uri();
    served.run("nbdcopy", &["-C", "4", &uri, "out"]);
    assert!(fs::read(served.path("out")).unwrap() == fs::read(served.path("raw")).unwrap());
    // The other way round: zeros where data was, data where zeros were.
    let new = fs::File::create(served.path("new")).unwrap();
    new.write_all_at(&pattern(), 9 * MIB).unwrap();
    new.set_len(16 * MIB).unwrap();
    served.run("nbdcopy", &["-C", "4", "--flush", "new", &uri]);
    assert!(fs::read(served.path("raw")).unwrap() == fs::read(served.path("new")).unwrap());
}

#[test]
fn qemu_img_converts_compares_and_measures() {
    let Some(qemu) = Qemu::find("qemu_img_converts_compares_and_measures") else { return };
    let served = Served::raw();
    let uri = served.uri();
    served.run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, "copy"]);
    qemu.check(&served.path("copy")).unwrap();
    served.run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, "copy"]);
    served.run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 7M 1M", "-c", "write -z 1M 1M", "copy"]);
    assert!(
        run("qemu-img", served.dir.path(), ["compare", "-f", "raw", "-F", "qcow2", &uri, "copy"]).is_err()
    );
    served.run("qemu-img", &["convert", "-n", "-m", "8", "-W", "-f", "qcow2", "-O", "raw", "copy", &uri]);
    served.run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, "copy"]);
    served.run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, "raw"]);
    let info = served.run("qemu-img", &["info", "--output=json", &uri]);
    assert_eq!(serde_json::from_str::<Value>(&info).unwrap()["virtual-size"], 16 * MIB);
}

#[test]
fn qemu_io_writes_zeroes_discards_and_reads_back() {
    if Qemu::find("qemu_io_writes_zeroes_discards_and_reads_back").is_none() {
        return;
    }
    let served = Served::raw();
    let script = [
        "write -P 0x11 1 999999",
        "read -P 0x11 1 999999",
        "write -f -P 0x22 5000000 512",
        "writev -P 0x33 6000000 512 1024 2048",
        "read -P 0x33 6000000 3584",
        "write -z 100000 50000",
        "read -P 0 100000 50000",
        "write -z -u 8M 2M",
        "read -P 0 8M 2M",
        "discard 12M 1M",
        "aio_write -P 0x44 9M 64k",
        "aio_write -P 0x55 10M 64k",
        "aio_flush",
        "read -P 0x44 9M 64k",
        "read -P 0x55 10M 64k",
        "flush",
    ];
    let mut args = vec!["-f", "raw"];
    args.extend(script.iter().flat_map(|command| ["-c", command]));
    let uri = served.uri();
    args.push(&uri);
    let said = served.run("qemu-io", &args);
    assert!(!said.contains("Pattern verification failed") && !said.contains("error"), "{said}");
    let mut raw = vec![0; 999_999];
    let file = fs::File::open(served.path("raw")).unwrap();
    file.read_exact_at(&mut raw, 1).unwrap();
    assert!(raw[..99_999].iter().all(|b| *b == 0x11) && raw[99_999..149_999].iter().all(|b| *b == 0));
    let past = run("qemu-io", Path::new("."), ["-f", "raw", "-c", "read 16777215 2", &uri]);
    assert!(past.is_err() || past.is_ok_and(|said| said.contains("failed")));
}

#[test]
fn a_chain_is_told_as_qemu_nbd_tells_it() {
    let name = "a_chain_is_told_as_qemu_nbd_tells_it";
    if Qemu::find(name).is_none() || !have(name, &["qemu-nbd", "nbdinfo"]) {
        return;
    }
    let dir = scratch().unwrap();
    let sh = |program: &str, args: &[&str]| run(program, dir.path(), args).unwrap();
    sh("qemu-img", &["create", "-f", "qcow2", "base", "16M"]);
    sh("qemu-io", &["-c", "write -P 1 0 1M", "-c", "write -c -P 2 2M 64k", "-c", "write -z 3M 1M", "base"]);
    sh("qemu-img", &["create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "mid"]);
    sh("qemu-io", &["-c", "write -P 3 512k 1M", "-c", "write -z -u 4M 1M", "mid"]);
    sh("qemu-img", &["create", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top"]);
    sh("qemu-io", &["-c", "write -P 4 768k 64k", "-c", "write -z 6M 128k", "-c", "discard 768k 64k", "top"]);
    let map = |socket: &Path, context: &str| -> Value {
        let text = sh("nbdinfo", &[&format!("--map={context}"), "--json", &uri(socket)]);
        serde_json::from_str(&text).unwrap()
    };
    let all = |socket: &Path| {
        let image = sh("qemu-img", &["map", "--output=json", "-f", "raw", &uri(socket)]);
        (map(socket, "base:allocation"), map(socket, "qemu:allocation-depth"), image)
    };
    let theirs = {
        let _server = Theirs::serve(dir.path(), "top", "qcow2");
        all(&dir.path().join("theirs"))
    };
    let served = Served::image(dir, "top", Format::Qcow2, ServerOptions::default());
    assert_eq!(
        {
            let sh = |program: &str, args: &[&str]| served.run(program, args);
            let map = |context: &str| -> Value {
                let text = sh("nbdinfo", &[&format!("--map={context}"), "--json", &served.uri()]);
                serde_json::from_str(&text).unwrap()
            };
            let image = sh("qemu-img", &["map", "--output=json", "-f", "raw", &served.uri()]);
            (map("base:allocation"), map("qemu:allocation-depth"), image)
        },
        theirs
    );
}

#[test]
fn fio_writes_with_verify() {
    if !have("fio_writes_with_verify", &["fio"]) {
        return;
    }
    let served = Served::raw();
    let uri = format!("--uri={}", served.uri());
    for (pattern, block) in
        [("randrw", "4k-4k"), ("write", "256k-256k"), ("randtrim", "64k-64k"), ("randwrite", "1k-128k")]
    {
        let mut args = vec!["--name=v", "--ioengine=nbd", &uri, "--size=16M", "--iodepth=16", "--minimal"];
        let (pattern, block) = (format!("--rw={pattern}"), format!("--bsrange={block}"));
        args.extend([pattern.as_str(), block.as_str()]);
        if !pattern.contains("trim") {
            args.extend(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1"]);
        }
        served.run("fio", &args);
    }
}

#[test]
fn nbdfuse_makes_a_file_of_it() {
    let name = "nbdfuse_makes_a_file_of_it";
    if !have(name, &["nbdfuse"]) {
        return;
    }
    let served = Served::raw();
    let file = served.path("file");
    fs::write(&file, "").unwrap();
    let mut child = Command::new("nbdfuse").arg(&file).arg(served.uri()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while fs::metadata(&file).is_ok_and(|m| m.len() == 0) {
        if child.try_wait().unwrap().is_some() || Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            // A container may not mount; that says nothing of the server.
            blockmirror_testing::skip_unsupported(format_args!("{name}: no FUSE mounts here"));
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    let through = fs::File::options().read(true).write(true).open(&file).unwrap();
    let mut bytes = vec![0; 4 << 20];
    through.read_exact_at(&mut bytes, 0).unwrap();
    let same = bytes == pattern();
    through.write_all_at(&[7; 5000], 6_000_001).unwrap();
    through.sync_all().unwrap();
    drop(through);
    // Which of them is there and may do it depends on who runs this; it ends with its mount.
    let unmounted = [("umount", None), ("fusermount3", Some("-u"))].iter().any(|(program, flag)| {
        Command::new(program).args(flag).arg(&file).status().is_ok_and(|status| status.success())
    });
    if !unmounted {
        let _ = child.kill();
    }
    let _ = child.wait();
    assert!(same);
    let mut written = vec![0; 5000];
    fs::File::open(served.path("raw")).unwrap().read_exact_at(&mut written, 6_000_001).unwrap();
    assert_eq!(written, [7; 5000]);
}

#[test]
fn clients_with_tls() {
    let name = "clients_with_tls";
    if Qemu::find(name).is_none() || !have(name, &["nbdinfo", "nbdcopy"]) {
        return;
    }
    let dir = scratch().unwrap();
    crate::common::pki::credentials(dir.path(), "localhost");
    let file = fs::File::create(dir.path().join("raw")).unwrap();
    file.write_all_at(&pattern(), 0).unwrap();
    let mut options = ServerOptions::default();
    options.tls = TlsPolicy::Require(x509_credentials(dir.path(), true).unwrap());
    let served = Served::image(dir, "raw", Format::Raw, options);
    let tcp = Listener::tcp("127.0.0.1", 0).unwrap();
    let port = tcp.tcp_address().unwrap().port();
    served.server.listen(tcp).unwrap();

    let creds = format!("tls-creds-x509,id=t,endpoint=client,dir={}", served.dir.path().display());
    let image =
        format!("driver=nbd,server.type=inet,server.host=localhost,server.port={port},export=d,tls-creds=t");
    served.run("qemu-img", &["convert", "--object", &creds, "--image-opts", &image, "-O", "raw", "out"]);
    assert!(fs::read(served.path("out")).unwrap() == pattern());
    let write = ["-c", "write -P 5 1M 1M", "-c", "read -P 5 1M 1M", "-c", "flush"];
    let mut args = vec!["--object", &creds, "--image-opts"];
    args.extend(write);
    args.push(&image);
    let said = served.run("qemu-io", &args);
    assert!(!said.contains("failed"), "{said}");

    let uri = format!("nbds://localhost:{port}/d?tls-certificates={}", served.dir.path().display());
    let info: Value = serde_json::from_str(&served.run("nbdinfo", &["--json", &uri])).unwrap();
    assert_eq!(info["TLS"], true);
    served.run("nbdcopy", &["-C", "4", &uri, "out2"]);
    assert!(fs::read(served.path("out2")).unwrap() == fs::read(served.path("raw")).unwrap());
    // Without TLS, nothing.
    assert!(run("nbdinfo", served.dir.path(), [format!("nbd://localhost:{port}/d")]).is_err());
}
