//! Servers that lie: each lie is a typed error, and never a panic, a hang or unbounded memory.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::fake::{BASE, Export, Fake, Peer};
use blockmirror_block::sync::Mutex;
use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, Extent, ExtentKind, Storage, Visit, WriteFlags, ZeroFlags,
};
use blockmirror_nbd::proto::{
    Chunk, Command, Errno, HandshakeFlags, Info, OptionCode, OptionReply, Request, TransmissionFlags,
};
use blockmirror_nbd::{ClientError, ClientStorage};

/// Words of the error, and what the server does in the handshake.
type Shake = (&'static str, fn(&mut Peer) -> Option<()>);

/// Words of the error, and what the server answers to a request.
type Lie = (&'static str, fn(&mut Peer, u64));

fn cause(error: &Error) -> &ClientError {
    error.cause().unwrap_or_else(|| panic!("{error:?}")).downcast_ref().unwrap()
}

/// What opening an export says to a server that does as `script` says.
fn open_error(script: impl Fn(&mut Peer) -> Option<()> + Send + Sync + Clone + 'static) -> Error {
    let fake = Fake::new(move |_, mut peer| {
        let _ = script(&mut peer);
    });
    fake.options().handshake_timeout(Duration::from_secs(20)).open().unwrap_err()
}

/// A handshake up to `GO`, which the script then answers.
fn before_go(peer: &mut Peer) -> Option<()> {
    peer.greet(HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES)?;
    loop {
        match peer.option()? {
            (OptionCode::Go, _) => return Some(()),
            (option, _) => peer.answer(option, OptionReply::ErrUnsup, &[]),
        }
    }
}

#[test]
fn lies_in_the_handshake_are_named() {
    let table: [Shake; 11] = [
        ("greeting: magic is", |p| {
            p.send(b"HTTP/1.1 400 Bad Request\r\n");
            Some(())
        }),
        ("oldstyle handshake", |p| {
            p.send(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0\0\0");
            Some(())
        }),
        ("the connection was lost: the server closed it", |p| {
            p.send(b"NBDMAGIC");
            Some(())
        }),
        ("StructuredReply answers ExtendedHeaders", |p| {
            p.greet(HandshakeFlags::FIXED_NEWSTYLE)?;
            p.option()?;
            p.answer(OptionCode::StructuredReply, OptionReply::Ack, &[]);
            p.option().map(drop)
        }),
        ("an answer of 100000 bytes", |p| {
            p.greet(HandshakeFlags::FIXED_NEWSTYLE)?;
            let (option, _) = p.option()?;
            p.answer(option, OptionReply::Ack, &[0; 100_000]);
            p.option().map(drop)
        }),
        ("MetaContext in answer to Go", |p| {
            before_go(p)?;
            p.answer(OptionCode::Go, OptionReply::MetaContext, &[0; 8]);
            p.option().map(drop)
        }),
        ("an export without a size", |p| {
            before_go(p)?;
            p.answer(OptionCode::Go, OptionReply::Ack, &[]);
            p.option().map(drop)
        }),
        ("an export of 9223372036854775808 bytes", |p| {
            before_go(p)?;
            let info = Info::Export { size: 1 << 63, flags: TransmissionFlags::HAS_FLAGS };
            p.answer(OptionCode::Go, OptionReply::Info, &info.encode());
            p.answer(OptionCode::Go, OptionReply::Ack, &[]);
            p.option().map(drop)
        }),
        ("block size: 3 is not allowed", |p| {
            before_go(p)?;
            let info = Info::BlockSize { minimum: 3, preferred: 4096, maximum: 4096 };
            p.answer(OptionCode::Go, OptionReply::Info, &info.encode());
            p.option().map(drop)
        }),
        ("a minimum block size of 1048576 bytes", |p| {
            p.handshake(&Export { blocks: Some((1 << 20, 1 << 20)), ..Export::new() })
        }),
        ("no multiple of its block size", |p| {
            p.handshake(&Export { size: 1000, blocks: Some((512, 4096)), ..Export::new() })
        }),
    ];
    for (words, script) in table {
        let error = open_error(script);
        assert!(error.to_string().contains(words), "{words}: {error}");
        assert!(error.to_string().starts_with("open: nbd+unix:///x?socket=/"), "{error}");
    }
}

#[test]
fn endless_facts_end() {
    let error = open_error(|peer| {
        before_go(peer)?;
        let info = Info::Name("x".into()).encode();
        for _ in 0..100_000 {
            peer.answer(OptionCode::Go, OptionReply::Info, &info);
        }
        Some(())
    });
    assert!(error.to_string().contains("too many facts"), "{error}");
}

#[test]
fn refusals_have_a_kind_and_the_servers_words() {
    for (reply, kind, words) in [
        (OptionReply::ErrUnknown, ErrorKind::NotFound, "it has none of that name: no\u{fffd}pe"),
        (OptionReply::ErrPolicy, ErrorKind::PermissionDenied, "its policy does not allow it"),
        (OptionReply::ErrTlsReqd, ErrorKind::PermissionDenied, "it wants TLS first (nbds://)"),
        (OptionReply::Other(0x8000_0099), ErrorKind::Io, "Other"),
    ] {
        let error = open_error(move |peer| {
            before_go(peer)?;
            peer.answer(OptionCode::Go, reply, b"no\xffpe\x1b\n");
            peer.option().map(drop)
        });
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(!error.to_string().contains('\x1b'));
    }
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let fake = Fake::new(|_, mut peer| {
        let _ = peer.option();
    });
    let error = fake.options().handshake_timeout(Duration::from_millis(30)).open().unwrap_err();
    assert!(matches!(cause(&error), ClientError::TimedOut(_)), "{error:?}");
}

#[test]
fn older_servers_are_understood() {
    let export = Export { structured: false, go: false, no_zeroes: false, ..Export::new() };
    let fake = Fake::serving(export, |peer, request, _| {
        peer.simple(request.cookie, None);
        peer.send(&vec![5; request.length as usize]);
    });
    let disk = fake.options().open().unwrap();
    assert_eq!((disk.len(), disk.geometry().request_alignment), (1 << 20, 512));
    let mut buf = [0; 700];
    disk.read_at(&mut buf, 5).unwrap();
    assert_eq!(buf, [5; 700]);
    // It is unknown what lies where.
    let mut found = Vec::new();
    disk.extents(ByteRange::new(3, 2000), &mut |e: Extent| {
        found.push((e.range, e.kind));
        Visit::Continue(())
    })
    .unwrap();
    assert_eq!(found, [(ByteRange::new(3, 2000), ExtentKind::Data)]);
}

/// What a read of 4096 bytes at 8192 says to a server that answers as `script` says.
fn read_error(export: Export, script: impl Fn(&mut Peer, u64) + Send + Sync + Clone + 'static) -> Error {
    let fake = Fake::serving(export, move |peer, request, _| script(peer, request.cookie));
    let disk = fake.options().open().unwrap();
    disk.read_at(&mut [0; 4096], 8192).unwrap_err()
}

#[test]
fn lies_in_replies_to_reads_are_named() {
    let table: [Lie; 17] = [
        ("a reply to request 99, which waits for none", |p, _| p.ok(99)),
        ("which waits for none", |p, c| p.data(c + 1, 8192, &[0; 4096], true)),
        ("a simple reply in answer to", |p, c| p.simple(c, None)),
        ("a reply ends before all of it was sent", |p, c| p.ok(c)),
        ("a reply ends before all of it was sent", |p, c| p.data(c, 8192, &[1; 4095], true)),
        ("bytes that were not asked for", |p, c| p.data(c, 8191, &[1; 4096], true)),
        ("bytes that were not asked for", |p, c| p.data(c, 8192, &[1; 4097], true)),
        ("bytes that were not asked for", |p, c| p.data(c, u64::MAX, &[1; 4096], true)),
        ("the same bytes twice", |p, c| {
            p.data(c, 8192, &[1; 4000], false);
            p.data(c, 12191, &[1; 97], true);
        }),
        ("a piece without bytes", |p, c| p.data(c, 8192, &[], false)),
        ("a data chunk of 7 bytes", |p, c| p.chunk(c, Chunk::OffsetData, true, &[0; 7])),
        ("bytes that were not asked for", |p, c| {
            let offset = 8192_u64.to_be_bytes();
            p.chunk_of(c, Chunk::OffsetData, true, u64::from(u32::MAX), &offset);
        }),
        ("a hole chunk of 13 bytes", |p, c| p.chunk(c, Chunk::OffsetHole, true, &[0; 13])),
        ("a chunk None of 0 bytes", |p, c| p.chunk(c, Chunk::None, false, &[])),
        ("a chunk BlockStatus of 12 bytes", |p, c| p.chunk(c, Chunk::BlockStatus, true, &[0; 12])),
        ("a chunk Other(77) of 0 bytes", |p, c| p.chunk(c, Chunk::Other(77), true, &[])),
        ("magic is", |p, _| p.send(&[0xee; 64])),
    ];
    for (words, script) in table {
        let error = read_error(Export::new(), script);
        assert!(error.to_string().contains(words), "{words}: {error}");
        assert!(matches!(cause(&error), ClientError::Violation(_) | ClientError::Proto(_)), "{error:?}");
        assert_eq!((error.kind(), error.offset()), (ErrorKind::Io, Some(8192)));
    }
}

#[test]
fn errors_in_chunks_are_bounded() {
    let error = read_error(Export::new(), |p, c| {
        p.chunk_of(c, Chunk::Error, true, 1 << 30, &[0; 100]);
    });
    assert!(error.to_string().contains("too many errors"), "{error}");
    let error = read_error(Export::new(), |p, c| {
        for _ in 0..100_000 {
            p.error(c, Errno::IO, false);
        }
    });
    assert!(error.to_string().contains("too many errors"), "{error}");
    let error =
        read_error(Export::new(), |p, c| p.error(c, Errno::from_wire(0).unwrap_or(Errno::NOSPC), true));
    assert_eq!(error.kind(), ErrorKind::NoSpace);
}

#[test]
fn extended_headers_are_held_to_the_same() {
    let export = Export { extended: true, ..Export::new() };
    let error = read_error(export, |p, c| {
        p.chunk_of(c, Chunk::OffsetData, true, u64::MAX, &8192_u64.to_be_bytes());
    });
    assert!(error.to_string().contains("bytes that were not asked for"), "{error}");
    // Simple replies have a magic of their own, which does not belong here.
    let error = read_error(export, |p, c| {
        p.simple(c, None);
        p.send(&[0; 64]);
    });
    assert!(error.to_string().contains("magic is"), "{error}");
}

#[test]
fn honest_replies_in_odd_shapes_are_taken() {
    let fake = Fake::serving(Export::new(), |peer, request, _| {
        let (cookie, offset) = (request.cookie, request.offset);
        // Backwards, with a hole, and the end on its own.
        peer.data(cookie, offset + 3000, &[3; 1096], false);
        let mut hole = (offset + 1000).to_be_bytes().to_vec();
        hole.extend_from_slice(&2000_u32.to_be_bytes());
        peer.chunk(cookie, Chunk::OffsetHole, false, &hole);
        peer.data(cookie, offset, &[1; 1000], false);
        peer.ok(cookie);
    });
    let disk = fake.options().open().unwrap();
    let mut buf = [9; 4096];
    disk.read_at(&mut buf, 512).unwrap();
    let mut expected = [0; 4096];
    expected[..1000].fill(1);
    expected[3000..].fill(3);
    assert_eq!(buf, expected);
}

fn status_error(script: impl Fn(&mut Peer, Request) + Send + Sync + Clone + 'static) -> Error {
    let export = Export { blocks: Some((512, 1 << 20)), ..Export::new() };
    let fake = Fake::serving(export, move |peer, request, _| script(peer, request));
    let disk = fake.options().open().unwrap();
    disk.extents(ByteRange::new(0, disk.len()), &mut |_| Visit::Continue(())).unwrap_err()
}

fn status(id: u32, runs: &[(u32, u32)]) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    for (length, flags) in runs {
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(&flags.to_be_bytes());
    }
    out
}

#[test]
fn lies_about_block_status_are_named() {
    let table: [Lie; 7] = [
        ("a block status chunk of 4 bytes", |p, c| p.chunk(c, Chunk::BlockStatus, true, &status(BASE, &[]))),
        ("a block status chunk of 13 bytes", |p, c| p.chunk(c, Chunk::BlockStatus, true, &[0; 13])),
        ("a block status chunk of 4294967292 bytes", |p, c| {
            p.chunk_of(c, Chunk::BlockStatus, true, u64::from(u32::MAX) - 3, &status(BASE, &[(512, 0)]));
        }),
        ("status of context 8", |p, c| p.chunk(c, Chunk::BlockStatus, true, &status(8, &[(512, 0)]))),
        ("status of context 7 twice", |p, c| {
            p.chunk(c, Chunk::BlockStatus, false, &status(BASE, &[(512, 0)]));
            p.chunk(c, Chunk::BlockStatus, true, &status(BASE, &[(512, 0)]));
        }),
        ("a reply ends before all of it was sent", |p, c| p.ok(c)),
        ("which was not agreed on", |p, c| p.chunk(c, Chunk::BlockStatusExt, true, &[0; 24])),
    ];
    for (words, script) in table {
        let error = status_error(move |peer, request| script(peer, request.cookie));
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
    let error = status_error(|p, r| p.chunk(r.cookie, Chunk::BlockStatus, true, &status(BASE, &[(0, 0)])));
    assert!(matches!(cause(&error), ClientError::Proto(_)), "{error:?}");
}

/// A server that tells about one sector at a time would be asked two thousand million times about a terabyte.
#[test]
fn crumbs_of_status_end_as_data() {
    let export = Export { size: 1 << 40, blocks: Some((512, 1 << 20)), ..Export::new() };
    let fake = Fake::serving(export, |peer, request, _| {
        let flags = if request.offset % 1024 == 0 { 3 } else { 0 };
        peer.chunk(request.cookie, Chunk::BlockStatus, true, &status(BASE, &[(512, flags)]));
    });
    let disk = fake.options().open().unwrap();
    let (mut runs, mut last) = (0, None);
    disk.extents(ByteRange::new(0, disk.len()), &mut |extent| {
        runs += 1;
        last = Some(extent);
        Visit::Continue(())
    })
    .unwrap();
    let last = last.unwrap();
    assert!(runs < 3000 && last.range.end() == 1 << 40 && last.kind == ExtentKind::Data, "{runs} {last:?}");
}

#[test]
fn more_status_than_is_kept_is_asked_for_again() {
    let export = Export { size: 512 * 200_000, blocks: Some((512, 1 << 20)), ..Export::new() };
    let fake = Fake::serving(export, |peer, request, _| {
        let first = request.offset / 512;
        let runs: Vec<_> = (first..200_000).map(|i| (512, if i % 2 == 0 { 0 } else { 3 })).collect();
        peer.chunk(request.cookie, Chunk::BlockStatus, true, &status(BASE, &runs));
    });
    let disk = fake.options().open().unwrap();
    let mut runs = 0_u64;
    disk.extents(ByteRange::new(0, disk.len()), &mut |extent| {
        assert_eq!((extent.range.start(), extent.range.len()), (runs * 512, 512));
        assert_eq!(extent.reads_as_zero(), runs % 2 == 1);
        runs += 1;
        Visit::Continue(())
    })
    .unwrap();
    assert_eq!(runs, 200_000);
}

#[test]
fn one_lie_ends_all_requests_of_the_connection() {
    let fake = Fake::serving(Export::new(), |peer, request, _| {
        // Eight threads, and the eighth request is answered with a lie.
        if request.cookie == 8 {
            peer.ok(4711);
        }
    });
    let disk = fake.options().connections(1).open().unwrap();
    std::thread::scope(|scope| {
        for i in 0..8 {
            let disk = &disk;
            scope.spawn(move || {
                let error = disk.write_at(&[1; 512], i * 512, WriteFlags::NONE).unwrap_err();
                assert!(error.to_string().contains("4711"), "{error}");
            });
        }
    });
}

#[test]
fn what_a_server_cannot_do_is_not_asked_of_it() {
    let flags = TransmissionFlags::HAS_FLAGS;
    let fake = Fake::serving(Export { flags, ..Export::new() }, |peer, request, _| match request.command {
        Command::Write => peer.ok(request.cookie),
        other => panic!("{other:?}"),
    });
    let disk = fake.options().open().unwrap();
    let range = ByteRange::new(0, 600_000);
    disk.write_zeroes(range, ZeroFlags::FUA).unwrap();
    disk.write_at(&[1; 10], 1, WriteFlags::FUA).unwrap();
    disk.discard(range).unwrap();
    disk.flush().unwrap();
    let error = disk.write_zeroes(range, ZeroFlags::NO_FALLBACK).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn a_read_only_export_is_not_opened_for_writing() {
    let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY;
    let fake = Fake::serving(Export { flags, ..Export::new() }, |_, _, _| {});
    assert_eq!(fake.options().open().unwrap_err().kind(), ErrorKind::ReadOnly);
    let disk = fake.options().writable(false).open().unwrap();
    assert_eq!(disk.write_at(&[0; 4], 0, WriteFlags::NONE).unwrap_err().kind(), ErrorKind::ReadOnly);
}

/// A reply that was honest before a few of its bytes were changed or the last ones were lost: whatever comes,
/// each call ends, and not with success where a place or a length is wrong.
#[test]
fn any_reply_ends_the_call() {
    let mut seed = 1_u64;
    let mut random = move |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let (mut wrong, mut right) = (0, 0);
    for case in 0..1500 {
        // Two chunks, written down by hand: 200 bytes and 400.
        let mut bytes = Vec::new();
        for (offset, len, done) in [(0_u64, 200_usize, 0), (200, 400, 1)] {
            bytes.extend_from_slice(&[0x66, 0x8e, 0x33, 0xef, 0, done, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
            bytes.extend_from_slice(&u32::try_from(len + 8).unwrap().to_be_bytes());
            bytes.extend_from_slice(&offset.to_be_bytes());
            bytes.extend(std::iter::repeat_n(7, len));
        }
        let changes = random(3);
        for _ in 0..changes {
            // Headers are what is worth changing.
            let at = [random(28), 228 + random(28)][random(2)];
            bytes[at] = if random(2) == 0 { random(256) as u8 } else { bytes[at] ^ (1 << random(8)) };
        }
        if case % 7 == 0 {
            bytes.truncate(random(bytes.len()));
        }
        let fake = Fake::new(move |_, mut peer| {
            if peer.handshake(&Export::new()).is_some() && peer.request().is_some() {
                peer.send(&bytes);
            }
        });
        let disk = fake.options().connections(1).open().unwrap();
        let mut buf = [0; 600];
        match disk.read_at(&mut buf, 0) {
            Ok(()) => {
                assert_eq!(buf, [7; 600]);
                right += 1;
            }
            Err(error) => {
                let _: &ClientError = cause(&error);
                wrong += 1;
            }
        }
    }
    assert!(wrong > 500 && right > 300, "{wrong} {right}");
}

/// What the server was asked, in order: `(command, offset, length)`.
type Asked = Arc<Mutex<Vec<(Command, u64, u64)>>>;

/// A server that says that it can zero and trim, refuses both as `error`, and does everything else. It loses
/// the connection at a read of the byte 13.
fn refuses(error: Errno) -> (Fake, Asked) {
    let asked = Asked::default();
    let export = Export {
        flags: Export::new().flags
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_FAST_ZERO
            | TransmissionFlags::SEND_TRIM,
        blocks: Some((512, 64 << 10)),
        ..Export::new()
    };
    let log = asked.clone();
    let fake = Fake::serving(export, move |peer, request, payload| {
        log.lock().push((request.command, request.offset, request.length));
        match request.command {
            Command::WriteZeroes | Command::Trim => peer.error(request.cookie, error, true),
            Command::Read if request.offset == 13 << 9 => {
                peer.stream.shutdown(std::net::Shutdown::Both).unwrap();
            }
            Command::Read => {
                let bytes = vec![7; request.length as usize];
                peer.data(request.cookie, request.offset, &bytes, true);
            }
            _ => {
                assert!(payload.contains(&0), "each write has some of the zeros");
                peer.ok(request.cookie);
            }
        }
    });
    (fake, asked)
}

#[test]
fn zeroing_that_the_server_refuses_is_done_with_bytes_and_not_asked_for_again() {
    for error in [Errno::NOTSUP, Errno::INVAL] {
        let (fake, asked) = refuses(error);
        let disk = fake.options().open().unwrap();
        // What may not be slow is not done with bytes; refused as slow it may be asked for again, refused as
        // unknown not.
        let quickly = ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK;
        let failed = disk.write_zeroes(ByteRange::at(0, 4096), quickly).unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::Unsupported);
        let whole = |command| asked.lock().iter().filter(|(asked, ..)| *asked == command).count();
        assert_eq!((whole(Command::WriteZeroes), whole(Command::Write)), (1, 0));
        // Parts of blocks at both ends.
        disk.write_zeroes(ByteRange::new(100, 300_000), ZeroFlags::MAY_UNMAP).unwrap();
        let zeroings = if error == Errno::INVAL { 1 } else { 2 };
        assert_eq!(whole(Command::WriteZeroes), zeroings);
        let mut written: Vec<(u64, u64)> =
            asked.lock().iter().filter(|w| w.0 == Command::Write).map(|w| (w.1, w.1 + w.2)).collect();
        written.sort_unstable();
        let mut end = 0;
        for (start, stop) in written {
            assert!(start <= end, "nothing writes {end}..{start}");
            end = stop;
        }
        assert_eq!(end, 300_032, "up to the end of the last block");
        asked.lock().clear();
        disk.write_zeroes(ByteRange::at(0, 4096), ZeroFlags::NONE).unwrap();
        assert_eq!(
            disk.write_zeroes(ByteRange::at(0, 4096), quickly).unwrap_err().kind(),
            ErrorKind::Unsupported
        );
        assert_eq!(*asked.lock(), [(Command::Write, 0, 4096)]);
    }
}

#[test]
fn trimming_that_the_server_refuses_is_ignored_and_not_asked_for_again() {
    for error in [Errno::NOTSUP, Errno::INVAL] {
        let (fake, asked) = refuses(error);
        let disk = fake.options().open().unwrap();
        disk.discard(ByteRange::at(0, 1 << 20)).unwrap();
        disk.discard(ByteRange::at(0, 4096)).unwrap();
        assert_eq!(*asked.lock(), [(Command::Trim, 0, 64 << 10)]);
        // The connection after this one is asked once more.
        disk.read_at(&mut [0; 512], 13 << 9).unwrap_err();
        disk.read_at(&mut [0; 512], 0).unwrap();
        disk.discard(ByteRange::at(0, 4096)).unwrap();
        disk.discard(ByteRange::at(0, 4096)).unwrap();
        let trims = asked.lock().iter().filter(|(command, ..)| *command == Command::Trim).count();
        assert_eq!(trims, 2);
    }
    // Any other failure is one.
    let (fake, _) = refuses(Errno::IO);
    let disk = fake.options().open().unwrap();
    assert_eq!(disk.discard(ByteRange::at(0, 4096)).unwrap_err().kind(), ErrorKind::Io);
    let failed = disk.write_zeroes(ByteRange::at(0, 4096), ZeroFlags::NONE).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Io);
}

#[test]
fn a_server_without_flush_is_known_as_one() {
    for (flags, can_flush) in [
        (TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH, true),
        (TransmissionFlags::HAS_FLAGS, false),
    ] {
        let fake = Fake::serving(Export { flags, ..Export::new() }, |_, _, _| {});
        let disk = Arc::new(fake.options().open().unwrap());
        assert_eq!(disk.geometry().can_flush, can_flush);
        assert_eq!(ClientStorage::new(disk).info().can_flush, can_flush);
    }
}

#[test]
fn a_request_that_hangs_fails_when_its_time_is_over() {
    let answered = Arc::new(AtomicU64::new(0));
    let count = answered.clone();
    // Reads of the first byte hang; the others are answered, so that the connection is never silent.
    let fake = Fake::serving(Export::new(), move |peer, request, _| {
        if request.offset != 0 || request.command != Command::Read {
            count.fetch_add(1, Ordering::Relaxed);
            peer.data(request.cookie, request.offset, &[1; 512], true);
        }
    });
    let disk = fake.options().io_timeout(Some(Duration::from_millis(300))).open().unwrap();
    let failed = disk.read_at(&mut [0; 512], 0).unwrap_err();
    assert!(matches!(cause(&failed), ClientError::NoAnswer(_)), "{failed}");
    assert_eq!(failed.kind(), ErrorKind::Io);
    disk.read_at(&mut [0; 512], 512).unwrap();
    std::thread::scope(|scope| {
        let hanging = scope.spawn(|| disk.read_at(&mut [0; 512], 0));
        while !hanging.is_finished() || answered.load(Ordering::Relaxed) <= 1 {
            // They may be on its connection when that is given up.
            let _ = disk.read_at(&mut [0; 512], 512);
        }
        let failed = hanging.join().unwrap().unwrap_err();
        assert!(matches!(cause(&failed), ClientError::NoAnswer(_)), "{failed}");
    });
    // A server that takes nothing in.
    let fake = Fake::new(|_, mut peer| {
        peer.handshake(&Export::new());
        std::thread::park();
    });
    let disk = fake.options().io_timeout(Some(Duration::from_millis(300))).open().unwrap();
    let failed = disk.write_at(&vec![1; 16 << 20], 0, WriteFlags::NONE).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::OutOfBounds);
    for _ in 0..2 {
        let failed = disk.write_at(&vec![1; 1 << 20], 0, WriteFlags::NONE).unwrap_err();
        assert!(matches!(cause(&failed), ClientError::NoAnswer(_)), "{failed}");
    }
}
