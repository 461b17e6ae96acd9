//! The schema of all commands is in order, and what the daemon answers is what its schema says.

use std::collections::BTreeSet;

use blockmirror_qmp::schema::{Member, Object, Type, lint};
use serde_json::{Value, json};

use super::Client;
use crate::command::{Services, table};

#[test]
fn the_schema_is_in_order() {
    let table = table(&Services::new(Vec::new(), Vec::new()));
    assert_eq!(lint(table.commands(), table.events()), [""; 0]);
}

/// Answers that are not as the schema says are errors in tests (`Table::check_answers`), so it is enough to
/// ask for all there is, in a daemon that has something of everything: each kind of node, bitmaps, exports,
/// jobs of each kind in several states.
#[test]
fn what_is_answered_is_what_the_schema_says() {
    let mut client = Client::new();
    client.chain();
    client.image("target.qcow2", 4, None);
    client.add("target", "target.qcow2", Value::Null);
    let limits = json!({"bps-total": 1 << 30});
    client.run("object-add", json!({"qom-type": "throttle-group", "id": "g", "limits": limits}));
    let path = client.path("nbd");
    let address = json!({"type": "unix", "data": {"path": path}});
    client.run("nbd-server-start", json!({"addr": address}));
    let empty = |name: &str| json!({"driver": "null-co", "node-name": name, "size": super::SIZE, "read-zeroes": true});
    let rule = json!({"event": "write_aio", "errno": 28});
    for node in [
        empty("null"),
        empty("null2"),
        json!({"driver": "throttle", "node-name": "slow", "throttle-group": "g", "file": empty("n1")}),
        json!({"driver": "copy-on-read", "node-name": "cor", "file": empty("n2")}),
        json!({"driver": "blkdebug", "node-name": "bad", "image": empty("n3"), "inject-error": [rule]}),
        json!({"driver": "raw", "node-name": "raw", "file": empty("n4"), "detect-zeroes": "on"}),
    ] {
        client.run("blockdev-add", node);
    }
    let export = json!({"type": "nbd", "id": "e", "node-name": "raw", "writable": true});
    client.run("block-export-add", export);
    let server = json!({"type": "unix", "path": path});
    client
        .run("blockdev-add", json!({"driver": "nbd", "node-name": "nbd", "server": server, "export": "raw"}));
    for (name, disabled) in [("b1", false), ("b2", true)] {
        client.run("block-dirty-bitmap-add", json!({"node": "top", "name": name, "disabled": disabled}));
    }

    let ask_all = |client: &mut Client| {
        for command in queries() {
            client.run(&command, json!({}));
        }
        client.run("query-named-block-nodes", json!({"flat": true}));
        client.run("query-blockstats", json!({"query-nodes": true}));
    };
    ask_all(&mut client);
    // A mirror that stands still, one that is ready, one that an error has stopped, one that failed.
    let mirror = |id: &str, device: &str, target: &str| json!({"job-id": id, "device": device, "target": target, "sync": "full", "auto-dismiss": false});
    let with = |mut arguments: Value, key: &str, value: Value| {
        arguments[key] = value;
        arguments
    };
    client.run("blockdev-mirror", with(mirror("still", "top", "target"), "speed", json!(1)));
    ask_all(&mut client);
    client.run("job-pause", json!({"id": "still"}));
    ask_all(&mut client);
    client.run("blockdev-mirror", mirror("ready", "null", "null2"));
    client.wait("BLOCK_JOB_READY");
    ask_all(&mut client);
    client.run("blockdev-mirror", with(mirror("short", "cor", "slow"), "copy-mode", json!("auto")));
    client.wait("BLOCK_JOB_READY");
    client.run("block-job-cancel", json!({"device": "short"}));
    client.wait("BLOCK_JOB_COMPLETED");
    ask_all(&mut client);
    let other = json!({"driver": "null-co", "node-name": "other", "size": 512});
    client.run("blockdev-add", other);
    client.run("blockdev-mirror", mirror("failed", "nbd", "other"));
    client.wait("BLOCK_JOB_COMPLETED");
    ask_all(&mut client);
    let file = json!({"driver": "file", "filename": client.path("new"), "size": 0});
    client.run("blockdev-create", json!({"job-id": "create", "options": file}));
    client.wait_for_status("concluded");
    ask_all(&mut client);
    client.run("job-cancel", json!({"id": "still"}));
    client.wait("BLOCK_JOB_CANCELLED");
    let stream = json!({"job-id": "stream", "device": "top", "auto-dismiss": false});
    client.run("block-stream", stream);
    client.wait("BLOCK_JOB_COMPLETED");
    ask_all(&mut client);
    let listed = client.run("query-block-jobs", json!({}));
    let kinds: BTreeSet<_> =
        listed.as_array().into_iter().flatten().map(|job| job["type"].to_string()).collect();
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["\"mirror\"", "\"stream\""]);
    assert!(!client.events.iter().any(|event| event["event"] == "SCHEMA_VIOLATION"), "{:?}", client.events);
}

/// Options that are accepted and do nothing. None changes content; LIMITS names each.
const HINTS: &str = "
    BlkdebugInjectErrorOptions.immediately BlockExportOptions.allow-inactive
    BlockExportOptions.fixed-iothread BlockExportOptions.iothread BlockdevCreateOptionsFile.extent-size-hint
    BlockdevOptionsFile.aio BlockdevOptionsFile.aio-max-batch BlockdevOptionsFile.drop-cache
    BlockdevOptionsFile.x-check-cache-dropped BlockdevOptionsQcow2.cache-clean-interval
    BlockdevOptionsQcow2.discard-no-unref BlockdevOptionsQcow2.l2-cache-entry-size
    BlockdevOptionsQcow2.lazy-refcounts
    BlockdevOptionsQcow2.pass-discard-other BlockdevOptionsQcow2.pass-discard-request
    BlockdevOptionsQcow2.pass-discard-snapshot BlockdevOptionsQcow2.refcount-cache-size
    InetSocketAddress.ipv4 InetSocketAddress.ipv6 InetSocketAddress.keep-alive InetSocketAddress.mptcp
    InetSocketAddress.numeric block-commit.backing-mask-protocol block-stream.backing-mask-protocol";

/// Options that are refused, always or with a value that would have to do something.
const REFUSED: &str = "
    BlockExportOptions.writethrough BlockdevCreateOptionsFile.nocow BlockdevCreateOptionsQcow2.encrypt
    BlockdevOptions.active BlockdevOptionsCor.bottom BlockdevOptionsFile.pr-manager
    BlockdevOptionsNbd.x-dirty-bitmap BlockdevOptionsQcow2.encrypt
    BlockdevQcow2Encryption.format InetSocketAddress.to
    QCryptoBlockCreateOptions.format nbd-server-start.tls-authz";

/// All others: each does what it says.
const EFFECTIVE: &str = "
    BlkdebugInjectErrorOptions.errno BlkdebugInjectErrorOptions.event BlkdebugInjectErrorOptions.iotype
    BlkdebugInjectErrorOptions.once BlkdebugInjectErrorOptions.sector BlkdebugInjectErrorOptions.state
    BlkdebugSetStateOptions.event BlkdebugSetStateOptions.new_state BlkdebugSetStateOptions.state
    BlockDirtyBitmap.name BlockDirtyBitmap.node BlockExportOptions.id BlockExportOptions.node-name
    BlockExportOptions.type BlockExportOptions.writable BlockExportOptionsNbd.allocation-depth
    BlockExportOptionsNbd.bitmaps BlockExportOptionsNbd.description BlockExportOptionsNbd.name
    BlockdevCacheOptions.direct BlockdevCacheOptions.no-flush BlockdevCreateOptions.driver
    BlockdevCreateOptionsFile.filename BlockdevCreateOptionsFile.preallocation
    BlockdevCreateOptionsFile.size BlockdevCreateOptionsQcow2.backing-file
    BlockdevCreateOptionsQcow2.backing-fmt BlockdevCreateOptionsQcow2.cluster-size
    BlockdevCreateOptionsQcow2.compression-type BlockdevCreateOptionsQcow2.data-file
    BlockdevCreateOptionsQcow2.data-file-raw BlockdevCreateOptionsQcow2.extended-l2
    BlockdevCreateOptionsQcow2.file BlockdevCreateOptionsQcow2.lazy-refcounts
    BlockdevCreateOptionsQcow2.preallocation BlockdevCreateOptionsQcow2.refcount-bits
    BlockdevCreateOptionsQcow2.size BlockdevCreateOptionsQcow2.version BlockdevOptions.auto-read-only
    BlockdevOptions.cache BlockdevOptions.detect-zeroes BlockdevOptions.discard BlockdevOptions.driver
    BlockdevOptions.force-share BlockdevOptions.node-name BlockdevOptions.read-only
    BlockdevOptionsBlkdebug.align BlockdevOptionsBlkdebug.config BlockdevOptionsBlkdebug.image
    BlockdevOptionsBlkdebug.inject-error BlockdevOptionsBlkdebug.max-discard
    BlockdevOptionsBlkdebug.max-transfer BlockdevOptionsBlkdebug.max-write-zero
    BlockdevOptionsBlkdebug.opt-discard BlockdevOptionsBlkdebug.opt-write-zero
    BlockdevOptionsBlkdebug.set-state BlockdevOptionsBlkdebug.take-child-perms
    BlockdevOptionsBlkdebug.unshare-child-perms BlockdevOptionsBlkverify.raw
    BlockdevOptionsBlkverify.test BlockdevOptionsCor.file BlockdevOptionsFile.filename
    BlockdevOptionsFile.locking BlockdevOptionsNbd.export BlockdevOptionsNbd.io-timeout BlockdevOptionsNbd.open-timeout
    BlockdevOptionsNbd.reconnect-delay BlockdevOptionsNbd.server BlockdevOptionsNbd.tls-creds
    BlockdevOptionsNbd.tls-hostname BlockdevOptionsNull.latency-ns BlockdevOptionsNull.read-zeroes
    BlockdevOptionsNull.size BlockdevOptionsQcow2.backing BlockdevOptionsQcow2.cache-size
    BlockdevOptionsQcow2.data-file BlockdevOptionsQcow2.file BlockdevOptionsQcow2.l2-cache-size
    BlockdevOptionsQcow2.overlap-check
    BlockdevOptionsRaw.file BlockdevOptionsRaw.offset BlockdevOptionsRaw.size BlockdevOptionsThrottle.file \
     BlockdevOptionsThrottle.throttle-group
    FdSocketAddress.str FdSocketAddressWrapper.data InetSocketAddress.host InetSocketAddress.port
    InetSocketAddressWrapper.data Qcow2OverlapCheckFlags.active-l1 Qcow2OverlapCheckFlags.active-l2
    Qcow2OverlapCheckFlags.bitmap-directory Qcow2OverlapCheckFlags.inactive-l1
    Qcow2OverlapCheckFlags.inactive-l2 Qcow2OverlapCheckFlags.main-header
    Qcow2OverlapCheckFlags.refcount-block Qcow2OverlapCheckFlags.refcount-table
    Qcow2OverlapCheckFlags.snapshot-table Qcow2OverlapCheckFlags.template
    SocketAddress.type SocketAddressLegacy.type UnixSocketAddress.path
    UnixSocketAddressWrapper.data block-commit.auto-dismiss block-commit.auto-finalize
    block-commit.backing-file block-commit.base block-commit.base-node block-commit.device
    block-commit.filter-node-name block-commit.job-id block-commit.on-error block-commit.speed
    block-commit.top block-commit.top-node block-stream.auto-dismiss block-stream.auto-finalize
    block-stream.backing-file block-stream.base block-stream.base-node block-stream.bottom
    block-stream.device block-stream.filter-node-name block-stream.job-id block-stream.on-error
    block-stream.speed blockdev-create.job-id blockdev-create.options blockdev-mirror.auto-dismiss
    blockdev-mirror.auto-finalize blockdev-mirror.bitmap blockdev-mirror.bitmap-mode
    blockdev-mirror.buf-size blockdev-mirror.copy-mode blockdev-mirror.device
    blockdev-mirror.filter-node-name blockdev-mirror.granularity blockdev-mirror.job-id
    blockdev-mirror.on-source-error blockdev-mirror.on-target-error blockdev-mirror.replaces
    blockdev-mirror.speed blockdev-mirror.sync blockdev-mirror.target blockdev-mirror.target-is-zero
    blockdev-mirror.x-log blockdev-mirror.x-reflink blockdev-reopen.options
    drive-mirror.auto-dismiss drive-mirror.auto-finalize drive-mirror.bitmap
    drive-mirror.bitmap-mode drive-mirror.buf-size drive-mirror.copy-mode drive-mirror.device
    drive-mirror.filter-node-name drive-mirror.format drive-mirror.granularity drive-mirror.job-id
    drive-mirror.mode drive-mirror.node-name drive-mirror.on-source-error drive-mirror.on-target-error
    drive-mirror.replaces drive-mirror.speed drive-mirror.sync drive-mirror.target
    drive-mirror.target-is-zero drive-mirror.unmap drive-mirror.x-reflink nbd-server-add.bitmap nbd-server-add.description
    nbd-server-add.device nbd-server-add.name nbd-server-add.writable nbd-server-start.addr
    nbd-server-start.handshake-max-seconds nbd-server-start.max-connections nbd-server-start.tls-creds";

/// Each option that is accepted has its effect, is refused, or is a hint that LIMITS names. An option that is
/// new, or that the reference says something else of, has to be put in one of the lists.
#[test]
fn no_option_is_ignored() {
    let limits = include_str!("../../../../LIMITS.md");
    let table = table(&Services::new(Vec::new(), Vec::new()));
    let (mut hints, mut refused, mut effective) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let commands =
        ["blockdev-add", "blockdev-reopen", "block-export-add", "nbd-server-add", "nbd-server-start"];
    let jobs = ["blockdev-mirror", "drive-mirror", "blockdev-create", "block-stream", "block-commit"];
    let mut open: Vec<(String, &[Member])> = Vec::new();
    let mut seen = BTreeSet::new();
    for command in table.commands().filter(|c| commands.contains(&c.name) || jobs.contains(&c.name)) {
        open.push((command.name.to_owned(), command.members));
        open.extend(command.boxed.iter().flat_map(|object| members_of(object)));
    }
    while let Some((owner, members)) = open.pop() {
        if !seen.insert(owner.clone()) {
            continue;
        }
        for member in members {
            let path = format!("{owner}.{}", member.name);
            let of = |words: &str| {
                member.doc.starts_with(words) || matches!(member.ty, Type::Enum(e) if e.doc.contains(words))
            };
            if of("without effect") {
                assert!(limits.contains(&format!("`{}`", member.name)), "LIMITS does not name {path}");
                hints.insert(path);
            } else if of("refused") {
                refused.insert(path);
            } else {
                effective.insert(path);
            }
            let mut types = vec![member.ty];
            while let Some(ty) = types.pop() {
                match ty {
                    Type::Array(inner) => types.push(*inner),
                    Type::Alternate(alternate) => types.extend(alternate.types),
                    Type::Object(object) => open.extend(members_of(object)),
                    Type::Later(ty) => types.push(ty()),
                    _ => {}
                }
            }
        }
    }
    let text = |paths: BTreeSet<String>| paths.into_iter().collect::<Vec<_>>().join(" ");
    let list = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(text(hints), list(HINTS));
    assert_eq!(text(refused), list(REFUSED));
    assert_eq!(text(effective), list(EFFECTIVE));
}

/// The members of an object and of its variants, each with the object's name.
fn members_of(object: &'static Object) -> Vec<(String, &'static [Member])> {
    let variants = object.variants.iter().flat_map(|variant| members_of(variant.object));
    std::iter::once((object.name.to_owned(), object.members)).chain(variants).collect()
}

/// All commands that answer something and need no arguments.
fn queries() -> Vec<String> {
    let table = table(&Services::new(Vec::new(), Vec::new()));
    let queries = table.commands().filter(|command| {
        command.returns.is_some()
            && command.boxed.is_none()
            && command.members.iter().all(|member| member.optional)
    });
    queries.map(|command| command.name.to_owned()).collect()
}
