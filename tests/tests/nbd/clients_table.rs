//! The table of docs/nbd-clients.md: each client that others wrote against our server, as the daemon runs it,
//! and our client against each server that others wrote, feature by feature. The table is what this prints:
//! one that says something else is a failure. `UPDATE_TABLE=1` writes it anew.
//!
//! Skipped, visibly, without the programs (Debian: qemu-utils, libnbd-bin, nbdkit, fio, openssl).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::common::host::Host;
use crate::common::nbd::{Server, agrees_with_a_vector, noise};
use crate::common::{ours, ours_ok};
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_nbd::{ClientOptions, NbdUri};
use blockmirror_testing::qemu::{have, run};
use blockmirror_testing::report;
use blockmirror_testing::scratch::scratch;
use blockmirror_testing::workspace_root;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const DISK: u64 = 16 * MIB;

/// Rows: who, what, and what came of it.
#[derive(Default)]
struct Table(Vec<[String; 3]>);

impl Table {
    /// Adds what has just been seen.
    fn row(&mut self, who: &str, what: &str, result: impl Into<String>) {
        self.0.push([who.to_owned(), what.to_owned(), result.into()]);
    }

    fn markdown(&self, head: [&str; 3]) -> String {
        let mut text = format!("| {} | {} | {} |\n|---|---|---|\n", head[0], head[1], head[2]);
        for [who, what, result] in &self.0 {
            writeln!(text, "| {who} | {what} | {result} |").unwrap();
        }
        text
    }
}

/// A daemon that exports `disk`: an overlay on a base, with a dirty bitmap.
struct Ours {
    host: Host,
    dir: tempfile::TempDir,
}

impl Ours {
    fn serve() -> Self {
        let dir = scratch().unwrap();
        let sh = |program: &str, args: &[&str]| run(program, dir.path(), args).unwrap();
        sh("qemu-img", &["create", "-q", "-f", "qcow2", "base", "16M"]);
        sh("qemu-io", &["-c", "write -P 1 0 4M", "base"]);
        sh("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"]);
        sh("qemu-io", &["-c", "write -P 2 1M 1M", "-c", "write -z 3M 1M", "top"]);
        let mut words: Vec<String> =
            crate::common::host::image("disk", "qcow2", &dir.path().join("top")).into();
        words.extend(crate::common::host::nbd_server(dir.path(), "ours"));
        let mut host = Host::start(dir.path(), "ours", None, &words);
        host.must(
            "block-dirty-bitmap-add",
            json!({"node": "disk", "name": "bits", "granularity": 65536, "persistent": false}),
        );
        host.must(
            "block-export-add",
            json!({"type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": true,
                   "description": "the disk", "allocation-depth": true, "bitmaps": ["bits"]}),
        );
        Self { host, dir }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.host.nbd_socket().display())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, program: &str, args: &[&str]) -> String {
        run(program, self.dir.path(), args).unwrap()
    }

    /// Whether `program` fails.
    fn fails(&self, program: &str, args: &[&str]) -> bool {
        run(program, self.dir.path(), args).is_err()
    }
}

fn map(text: &str) -> Vec<(u64, u64, u64)> {
    let rows: Value = serde_json::from_str(text).unwrap();
    let field = |row: &Value, name: &str| row[name].as_u64().unwrap();
    let row = |row| (field(row, "offset"), field(row, "length"), field(row, "type"));
    rows.as_array().unwrap().iter().map(row).collect()
}

fn nbdinfo(ours: &Ours, table: &mut Table) {
    let who = "nbdinfo";
    let uri = ours.uri();
    let info: Value = serde_json::from_str(&ours.run(who, &["--json", &uri])).unwrap();
    let export = &info["exports"][0];
    assert_eq!((&info["protocol"], &info["structured"]), (&"newstyle-fixed".into(), &true.into()));
    assert_eq!(
        (&export["export-size"], &export["description"]),
        (&DISK.into(), &"the disk".into()),
        "{export}"
    );
    let contexts = export["contexts"].as_array().unwrap();
    let names: Vec<_> = contexts.iter().map(|name| format!("`{}`", name.as_str().unwrap())).collect();
    table.row(who, "`--json`", format!("newstyle-fixed, structured replies; contexts {}", names.join(", ")));
    assert!(ours.run(who, &["--list", &uri]).contains("export=\"disk\""));
    table.row(who, "`--list`", "the export and its description");
    assert_eq!(ours.run(who, &["--size", &uri]).trim(), DISK.to_string());
    table.row(who, "`--size`", "right");
    let all = [
        "cache",
        "connect",
        "df",
        "fast-zero",
        "flush",
        "fua",
        "multi-conn",
        "read",
        "trim",
        "write",
        "zero",
    ];
    let can: Vec<_> = all.into_iter().filter(|can| !ours.fails(who, &["--can", can, &uri])).collect();
    assert_eq!(can, all, "what it can");
    table.row(who, "`--can` each", format!("yes: {}", can.join(", ")));
    for (is, expected) in [("read-only", false), ("rotational", false), ("tls", false)] {
        assert_eq!(!ours.fails(who, &["--is", is, &uri]), expected, "{is}");
    }
    table.row(who, "`--is` each", "no: read-only, rotational, tls");
    let context = |name: &str| map(&ours.run(who, &[&format!("--map={name}"), "--json", &uri]));
    assert_eq!(context("base:allocation"), [(0, 3 * MIB, 0), (3 * MIB, 13 * MIB, 3)]);
    table.row(who, "`--map=base:allocation`", "as the image is");
    assert_eq!(
        context("qemu:allocation-depth"),
        [(0, MIB, 2), (MIB, MIB, 1), (2 * MIB, MIB, 2), (3 * MIB, MIB, 1), (4 * MIB, 12 * MIB, 0)]
    );
    table.row(who, "`--map=qemu:allocation-depth`", "as the chain is");
    assert_eq!(context("qemu:dirty-bitmap:bits"), [(0, DISK, 0)]);
    ours.run("qemu-io", &["-f", "raw", "-c", "write -P 7 5M 64k", "-c", "flush", &uri]);
    assert_eq!(
        context("qemu:dirty-bitmap:bits"),
        [(0, 5 * MIB, 0), (5 * MIB, 65536, 1), (5 * MIB + 65536, 11 * MIB - 65536, 0)]
    );
    table.row(who, "`--map=qemu:dirty-bitmap:NAME`", "what was written since the bitmap was made");
}

fn nbdcopy(ours: &Ours, table: &mut Table) {
    let (who, uri) = ("nbdcopy", ours.uri());
    let mut bytes = noise(4, DISK as usize);
    bytes[3 * MIB as usize..7 * MIB as usize].fill(0);
    fs::write(ours.path("in"), &bytes).unwrap();
    ours.run(who, &["-C", "4", "--flush", "in", &uri]);
    table.row(who, "in, 4 connections", "the same bytes");
    ours.run(who, &["-C", "4", &uri, "out"]);
    assert!(fs::read(ours.path("out")).unwrap() == bytes);
    table.row(who, "out, 4 connections", "the same bytes");
    let relay = format!("nbdcopy -C 4 \"$uri\" {}", ours.path("relayed").display());
    let plugin = format!("uri={uri}");
    ours.run("nbdkit", &["-U", "-", "nbd", &plugin, "shared=true", "--run", &relay]);
    assert!(fs::read(ours.path("relayed")).unwrap() == bytes);
    let back = format!("nbdcopy -C 4 --flush {} \"$uri\"", ours.path("in").display());
    ours.run("qemu-io", &["-f", "raw", "-c", "write -P 9 0 16M", &uri]);
    ours.run("nbdkit", &["-U", "-", "nbd", &plugin, "--run", &back]);
    ours.run("nbdcopy", &[&uri, "out"]);
    assert!(fs::read(ours.path("out")).unwrap() == bytes);
    table.row("nbdkit's nbd plugin", "between nbdcopy and the export, both ways", "the same bytes");
}

fn qemu(ours: &Ours, table: &mut Table) {
    let uri = ours.uri();
    ours.run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, "copy"]);
    ours.run("qemu-img", &["check", "copy"]);
    table.row("qemu-img", "convert from it", "`qemu-img check` is clean");
    ours.run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, "copy"]);
    ours.run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 7M 1M", "copy"]);
    assert!(ours.fails("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, "copy"]));
    table.row("qemu-img", "compare", "finds equal what is, and different what is not");
    ours.run("qemu-img", &["convert", "-n", "-W", "-m", "8", "-f", "qcow2", "-O", "raw", "copy", &uri]);
    ours.run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, "copy"]);
    table.row("qemu-img", "convert into it, 8 at a time", "the same bytes");
    let text = ours.run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    let rows: Value = serde_json::from_str(&text).unwrap();
    let length: u64 = rows.as_array().unwrap().iter().map(|row| row["length"].as_u64().unwrap()).sum();
    assert!(length == DISK && rows.as_array().unwrap().iter().any(|row| row["zero"] == true), "{rows}");
    table.row("qemu-img", "map", "zeros and data");
    let script = [
        "write -P 0x11 1 999999",
        "read -P 0x11 1 999999",
        "write -f -P 0x22 5000000 512",
        "write -z -u 8M 2M",
        "read -P 0 8M 2M",
        "discard 12M 1M",
        "aio_write -P 0x44 9M 64k",
        "aio_flush",
        "read -P 0x44 9M 64k",
        "flush",
    ];
    let mut args = vec!["-f", "raw"];
    args.extend(script.iter().flat_map(|command| ["-c", command]));
    args.push(&uri);
    let said = ours.run("qemu-io", &args);
    assert!(!said.contains("failed") && !said.contains("error"), "{said}");
    table.row(
        "qemu-io",
        "write, FUA, zeroes with and without unmap, discard, flush",
        "what was written is read",
    );
}

fn fio(ours: &Ours, table: &mut Table) {
    let uri = format!("--uri={}", ours.uri());
    for pattern in ["randwrite", "randrw", "write"] {
        let pattern = format!("--rw={pattern}");
        let args = ["--name=v", "--ioengine=nbd", &uri, "--size=16M", "--iodepth=16", "--bsrange=1k-128k"];
        let verify = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--minimal", &pattern];
        ours.run("fio", &[&args[..], &verify[..]].concat());
    }
    table.row("fio, nbd engine", "write, randwrite, randrw of 1 to 128 KiB with verify", "no mismatch");
    let trim = ["--name=t", "--ioengine=nbd", &uri, "--size=16M", "--bs=64k", "--rw=randtrim", "--minimal"];
    ours.run("fio", &trim);
    table.row("fio, nbd engine", "randtrim", "no error");
}

/// TLS by certificates, both ends theirs in turn.
fn tls_server(table: &mut Table) {
    let dir = scratch().unwrap();
    crate::common::pki::credentials(dir.path(), "localhost");
    let bytes = noise(6, 4 * MIB as usize);
    fs::write(dir.path().join("raw"), &bytes).unwrap();
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let creds =
        |end: &str| format!("tls-creds-x509,id=t,endpoint={end},verify-peer=on,dir={}", dir.path().display());
    let mut words = vec!["--object".to_owned(), creds("server")];
    words.extend(crate::common::host::image("disk", "raw", &dir.path().join("raw")));
    words.push("--nbd-server".into());
    words.push(format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port},tls-creds=t"));
    words.extend(crate::common::host::export("disk", "disk"));
    let host = Host::start(dir.path(), "tls", None, &words);
    let sh = |program: &str, args: &[&str]| run(program, dir.path(), args);
    let image = format!(
        "driver=nbd,server.type=inet,server.host=localhost,server.port={port},export=disk,tls-creds=t"
    );
    let client = creds("client");
    sh("qemu-img", &["convert", "--object", &client, "--image-opts", &image, "-O", "raw", "out"]).unwrap();
    assert!(fs::read(dir.path().join("out")).unwrap() == bytes);
    table.row("qemu-img", "TLS, each side knows the other by its certificate", "the same bytes");
    let uri = format!("nbds://localhost:{port}/disk?tls-certificates={}", dir.path().display());
    sh("nbdcopy", &["-C", "4", &uri, "out2"]).unwrap();
    assert!(fs::read(dir.path().join("out2")).unwrap() == bytes);
    sh("nbdinfo", &["--is", "tls", &uri]).unwrap();
    table.row("nbdcopy, nbdinfo", "TLS", "the same bytes; `--is tls`: yes");
    assert!(sh("nbdinfo", &[&format!("nbd://localhost:{port}/disk")]).is_err());
    table.row("nbdinfo", "no TLS where the server wants it", "refused");
    host.quit();
}

#[test]
fn the_table_is_true() {
    let tools = ["nbdinfo", "nbdcopy", "nbdkit", "qemu-img", "qemu-io", "qemu-nbd", "fio"];
    if !have("the_table_is_true", &tools) {
        return;
    }
    let mut server = Table::default();
    let ours = Ours::serve();
    nbdinfo(&ours, &mut server);
    nbdcopy(&ours, &mut server);
    qemu(&ours, &mut server);
    fio(&ours, &mut server);
    let top = ours.path("top");
    ours.host.quit();
    run("qemu-img", Path::new("."), ["check", top.to_str().unwrap()]).unwrap();
    tls_server(&mut server);
    server.row("nbd-client", "the kernel's", "not tried: it needs a kernel module");

    let mut client = Table::default();
    with_qemu_nbd(&mut client);
    with_nbdkit(&mut client);

    let text = format!(
        "{}\n## Our client against other servers\n\n{}",
        server.markdown(["client", "what", "result"]),
        client.markdown(["server", "what", "result"])
    );
    let path = workspace_root().join("docs/nbd-clients.md");
    let document = fs::read_to_string(&path).unwrap();
    let (head, old) = document.split_once("## Other clients against our server\n\n").unwrap();
    if std::env::var_os("UPDATE_TABLE").is_some() {
        fs::write(&path, format!("{head}## Other clients against our server\n\n{text}")).unwrap();
        report(format_args!("{} was written", path.display()));
    } else {
        assert_eq!(old, text, "docs/nbd-clients.md says something else; UPDATE_TABLE=1 writes it anew");
    }
}

fn with_qemu_nbd(table: &mut Table) {
    let server = Server::qemu_raw(4 * MIB, &[]);
    agrees_with_a_vector(&server.open(), 1, 300);
    table.row("qemu-nbd, raw", "300 random operations beside a model", "agree");
    let dir = scratch().unwrap();
    run("qemu-img", dir.path(), ["create", "-q", "-f", "qcow2", "image", "4M"]).unwrap();
    let server = Server::qemu(dir, "qcow2", "image", &[]);
    agrees_with_a_vector(&server.open(), 2, 300);
    table.row("qemu-nbd, qcow2", "300 random operations beside a model", "agree");

    let dir = scratch().unwrap();
    crate::common::pki::credentials(dir.path(), "localhost");
    let creds = format!("tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir={}", dir.path().display());
    let server = Server::qemu_raw(2 * MIB, &["--object", &creds, "--tls-creds", "t"]);
    agrees_with_a_vector(&with_tls(&server, dir.path()).open().unwrap(), 3, 100);
    table.row("qemu-nbd", "TLS, each side knows the other by its certificate", "100 random operations agree");
    let refused = server.options().open().unwrap_err();
    assert!(refused.to_string().contains("it wants TLS first (nbds://)"), "{refused}");
    table.row("qemu-nbd", "no TLS where the server wants it", "refused, with the reason");
    let certificates = format!("--tls-certificates={}", dir.path().display());
    let server = Server::nbdkit_memory(2 * MIB, &["--tls=require", &certificates, "--tls-verify-peer"]);
    agrees_with_a_vector(&with_tls(&server, dir.path()).open().unwrap(), 4, 100);
    table.row("nbdkit", "TLS, each side knows the other by its certificate", "100 random operations agree");
}

fn with_tls(server: &Server, directory: &Path) -> ClientOptions {
    let mut uri: NbdUri = server.uri();
    uri.tls = true;
    uri.tls_certificates = Some(directory.to_owned());
    uri.tls_hostname = Some("localhost".to_owned());
    ClientOptions::new(uri).writable(true)
}

/// nbdkit with filters under which a disk still is a disk.
const FAIR: [(&str, &[&str]); 19] = [
    ("plain", &[]),
    ("without structured replies", &["--no-sr"]),
    ("noextents", &["--filter=noextents"]),
    ("cacheextents", &["--filter=cacheextents"]),
    ("cow", &["--filter=cow"]),
    ("cache, writing back", &["--filter=cache", "cache=writeback"]),
    ("readahead", &["--filter=readahead"]),
    ("nozero: none", &["--filter=nozero", "zeromode=none"]),
    ("nozero: slow", &["--filter=nozero", "zeromode=emulate", "fastzeromode=slow"]),
    ("fua: emulated", &["--filter=fua", "fuamode=emulate"]),
    ("fua: forced", &["--filter=fua", "fuamode=force"]),
    ("multi-conn: off", &["--filter=multi-conn", "multi-conn-mode=disable"]),
    ("multi-conn: emulated", &["--filter=multi-conn", "multi-conn-mode=emulate"]),
    ("noparallel", &["--filter=noparallel", "serialize=all-requests"]),
    ("delay", &["--filter=delay", "rdelay=1ms", "wdelay=1ms"]),
    ("rate", &["--filter=rate", "rate=800M"]),
    ("limit of one client", &["--filter=limit", "limit=1"]),
    (
        "blocksize-policy, errors below 4 KiB and above 64 KiB",
        &[
            "--filter=blocksize-policy",
            "blocksize-minimum=4096",
            "blocksize-preferred=8192",
            "blocksize-maximum=65536",
            "blocksize-error-policy=error",
        ],
    ),
    (
        "blocksize-policy, blocks of 64 KiB",
        &[
            "--filter=blocksize-policy",
            "blocksize-minimum=65536",
            "blocksize-preferred=65536",
            "blocksize-error-policy=error",
        ],
    ),
];

fn with_nbdkit(table: &mut Table) {
    for (seed, (name, args)) in FAIR.into_iter().enumerate() {
        let server = Server::nbdkit_memory(2 * MIB, args);
        agrees_with_a_vector(&server.open(), seed as u64, 60);
        table.row(&format!("nbdkit, {name}"), "60 random operations beside a model", "agree");
    }

    // The same bytes, or an error: `checkwrite` fails what writes anything but what is there.
    let dir = scratch().unwrap();
    let mut bytes = noise(5, 3 * MIB as usize);
    bytes[MIB as usize..2 * MIB as usize].fill(0);
    for name in ["source", "same", "target"] {
        fs::write(dir.path().join(name), &bytes).unwrap();
    }
    let server = Server::nbdkit(dir, &["--filter=checkwrite", "file", "@same"]);
    let uri = uri_of(&server);
    let source = server.path("source");
    let source = source.to_str().unwrap();
    ours_ok(["mirror", "-q", "-n", "-O", "raw", source, &uri]);
    table.row("nbdkit, checkwrite", "`blockmirror mirror` of equal bytes", "every write is right");
    fs::write(source, noise(6, 3 * MIB as usize)).unwrap();
    let ran = ours(["mirror", "-q", "-n", "-O", "raw", source, &uri]);
    assert!(ran.code != 0 && ran.stderr.contains("the server reports EIO"), "{ran:?}");
    table.row("nbdkit, checkwrite", "`blockmirror mirror` of other bytes", "fails, with the server's error");

    let server =
        Server::nbdkit_memory(3 * MIB, &["--filter=error", "error-pwrite=EIO", "error-pwrite-rate=10%"]);
    fs::write(server.path("source"), noise(7, 3 * MIB as usize)).unwrap();
    let (source, uri) = (server.path("source"), uri_of(&server));
    let source = source.to_str().unwrap();
    let words = ["mirror", "-q", "-n", "-O", "raw", "--on-target-error", "ignore", source, &uri];
    ours_ok(words);
    ours_ok(["compare", "-f", "raw", "-F", "raw", source, &uri]);
    table.row(
        "nbdkit, error in 10 % of writes",
        "`blockmirror mirror --on-target-error ignore`",
        "equal in the end",
    );
    let server =
        Server::nbdkit_memory(MIB, &["--filter=error", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"]);
    let error = server.open().write_at(&[1; 512], 0, WriteFlags::NONE).unwrap_err();
    assert_eq!(error.kind(), blockmirror_block::ErrorKind::NoSpace);
    table.row("nbdkit, error in all writes", "a write", "the error's kind is the server's");

    // It ends when its last client does.
    let mut server = Server::nbdkit_memory(2 * MIB, &["--filter=exitlast"]);
    agrees_with_a_vector(&server.open(), 8, 40);
    assert!(server.ends(), "it is still held");
    table.row("nbdkit, exitlast", "closing the disk", "the server ends: no connection is left behind");

    let mut server = Server::nbdkit_memory(2 * MIB, &[]);
    let disk = server.options().reconnect_delay(Duration::from_secs(600)).open().unwrap();
    disk.write_at(&[1; 4096], 0, WriteFlags::NONE).unwrap();
    server.kill();
    server.restart();
    disk.write_at(&[2; 4096], 4096, WriteFlags::NONE).unwrap();
    let lost = disk.flush().unwrap_err();
    assert_eq!(lost.kind(), blockmirror_block::ErrorKind::WritesLost);
    table.row(
        "nbdkit, killed and started again",
        "a write with a reconnect delay",
        "done; the next flush tells that writes may be lost",
    );
    let old = Server::nbdkit_memory(MIB, &["--mask-handshake=0"]);
    agrees_with_a_vector(&old.open(), 9, 40);
    table.row("nbdkit, newstyle without options", "40 random operations beside a model", "agree");
    let oldest = Server::nbdkit_memory(MIB, &["-o"]);
    assert!(oldest.options().open().unwrap_err().to_string().contains("oldstyle handshake"));
    table.row("nbdkit, oldstyle", "opening", "refused by name");
}

fn uri_of(server: &Server) -> String {
    format!("nbd+unix:///?socket={}", server.path("socket").display())
}
