//! Every command in every kind of reply, on a disk in memory that logs what it is asked.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::common::{MODES, Mode, Peer, Piece, serve};
use blockmirror_block::testing::{DiskOp, Fault, FaultDisk, Faults, MemoryDisk, OpKind, Rng};
use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, Extent, Geometry, Result, Visit, WriteFlags, ZeroFlags,
};
use blockmirror_nbd::proto::{Command, CommandFlags, Errno, PayloadFilter, TransmissionFlags};
use blockmirror_nbd::server::{Export, MetaContext, Server, ServerOptions};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const NONE: CommandFlags = CommandFlags::NONE;

fn disk() -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::new(8 * MIB).with_cluster_size(64 * KIB).logged())
}

#[test]
fn what_is_written_is_read_at_any_offset_and_length() {
    for mode in MODES {
        let disk = disk();
        let server = serve(disk.clone());
        let mut peer = Peer::ready(&server, mode, &[]);
        let mut model = vec![0u8; usize::try_from(8 * MIB).unwrap()];
        let mut rng = Rng::from_state(7);
        for _ in 0..200 {
            // Short and long, so that all ways through the server are taken.
            let longest = [600, 70_000, 3_000_000][usize::try_from(rng.below(3)).unwrap()];
            let len = 1 + rng.below(longest);
            let offset = rng.below(8 * MIB - len + 1);
            let (start, n) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
            match rng.below(4) {
                0 => {
                    let data = rng.bytes(n);
                    peer.write_at(NONE, offset, &data).unwrap();
                    model[start..start + n].copy_from_slice(&data);
                }
                1 => {
                    assert_eq!(peer.run(Command::WriteZeroes, NONE, offset, len), [Piece::Done]);
                    model[start..start + n].fill(0);
                }
                _ => {
                    let data = peer.read_at(offset, u32::try_from(len).unwrap()).unwrap();
                    assert!(data == model[start..start + n], "{mode:?}: {len} bytes at {offset}");
                }
            }
        }
        peer.disconnect();
        assert!(disk.contents().unwrap() == model);
    }
}

#[test]
fn many_requests_at_once_are_all_answered() {
    for mode in MODES {
        let server = serve(disk());
        let mut peer = Peer::ready(&server, mode, &[]);
        let block = |i: u64| vec![u8::try_from(i % 251).unwrap() + 1; usize::try_from(4 * KIB).unwrap()];
        let mut open: Vec<u64> = (0..500).map(|i| peer.send_write(NONE, i * 4 * KIB, &block(i))).collect();
        while !open.is_empty() {
            let (cookie, piece, done) = peer.receive(0);
            assert_eq!((piece, done), (Piece::Done, true));
            open.retain(|c| *c != cookie);
        }
        let mut open: Vec<_> =
            (0..500).map(|i| (peer.send(Command::Read, NONE, i * 4 * KIB, 4 * KIB), i)).collect();
        while !open.is_empty() {
            let (cookie, piece, _) = peer.receive(4096);
            let i = open.iter().position(|(c, _)| *c == cookie).unwrap();
            let (_, at) = open.swap_remove(i);
            match piece {
                Piece::Data(_, data) => assert_eq!(data, block(at)),
                other => panic!("{other:?}"),
            }
        }
        peer.disconnect();
    }
}

#[test]
fn flags_reach_the_device() {
    let disk = disk();
    let server = serve(disk.clone());
    let mut peer = Peer::ready(&server, Mode::Structured, &[]);
    disk.take_log();
    peer.write_at(CommandFlags::FUA, 0, &[1; 512]).unwrap();
    peer.run(Command::Flush, NONE, 0, 0);
    peer.run(Command::Trim, CommandFlags::FUA, 512, 512);
    peer.run(Command::WriteZeroes, CommandFlags::NO_HOLE, 0, 4096);
    peer.run(Command::WriteZeroes, CommandFlags::FUA | CommandFlags::FAST_ZERO, 0, 65536);
    peer.run(Command::Cache, NONE, 4096, 100);
    let at = |start, len| ByteRange::at(start, len);
    let expected = [
        DiskOp::Write(at(0, 512), WriteFlags::FUA),
        DiskOp::Flush,
        DiskOp::Discard(at(512, 512)),
        DiskOp::Flush,
        DiskOp::WriteZeroes(at(0, 4096), ZeroFlags::NONE),
        DiskOp::WriteZeroes(at(0, 65536), ZeroFlags::MAY_UNMAP | ZeroFlags::FUA | ZeroFlags::NO_FALLBACK),
        DiskOp::Read(at(4096, 100)),
    ];
    assert_eq!(disk.take_log(), expected);
    peer.disconnect();
}

#[test]
fn holes_are_not_sent_but_for_those_who_want_one_piece() {
    let disk = disk();
    disk.write_at(&[7; 65536], 64 * KIB, WriteFlags::NONE).unwrap();
    for mode in [Mode::Structured, Mode::Extended] {
        let server = serve(disk.clone());
        let mut peer = Peer::ready(&server, mode, &[]);
        let pieces = peer.run(Command::Read, NONE, 0, 256 * KIB);
        let expected =
            [Piece::Hole(0, 65536), Piece::Data(64 * KIB, vec![7; 65536]), Piece::Hole(128 * KIB, 128 << 10)];
        assert_eq!(pieces, expected);
        match peer.run(Command::Read, CommandFlags::DF, 0, 256 * KIB).as_slice() {
            [Piece::Data(0, data)] => assert_eq!(data.len(), 256 << 10),
            other => panic!("{other:?}"),
        }
        // A short read is a hole if it holds zeros, whatever is allocated.
        assert_eq!(peer.run(Command::Read, NONE, 4096, 4096), [Piece::Hole(4096, 4096)]);
        let data = Piece::Data(64 * KIB, vec![7; 4096]);
        assert_eq!(peer.run(Command::Read, NONE, 64 * KIB, 4096), [data]);
        peer.disconnect();
    }
}

#[test]
fn data_that_becomes_a_hole_is_read_as_zeros() {
    let server = serve(disk());
    let mut peer = Peer::ready(&server, Mode::Structured, &[]);
    peer.write_at(NONE, 0, &vec![9; 1 << 20]).unwrap();
    // The server remembers by now that here is data.
    assert_eq!(peer.read_at(0, 128 << 10).unwrap(), vec![9; 128 << 10]);
    assert_eq!(peer.run(Command::Trim, NONE, 0, MIB), [Piece::Done]);
    assert_eq!(peer.run(Command::Read, NONE, 0, 128 * KIB), [Piece::Hole(0, 128 << 10)]);
    peer.disconnect();
}

#[test]
fn a_request_past_the_end_fails_and_touches_nothing() {
    for mode in MODES {
        let disk = disk();
        let server = serve(disk.clone());
        let mut peer = Peer::ready(&server, mode, &["base:allocation"][..usize::from(mode != Mode::Simple)]);
        disk.take_log();
        let end = 8 * MIB;
        assert_eq!(peer.read_at(end - 1, 2), Err(Errno::INVAL));
        assert_eq!(peer.read_at(u64::MAX, 2), Err(Errno::INVAL));
        assert_eq!(peer.write_at(NONE, end - 1, &[0; 2]), Err(Errno::NOSPC));
        assert_eq!(peer.run(Command::Trim, NONE, end, 1), [Piece::Error(Errno::INVAL)]);
        assert_eq!(peer.run(Command::WriteZeroes, NONE, end, 1), [Piece::Error(Errno::NOSPC)]);
        assert_eq!(peer.run(Command::Cache, NONE, end, 1), [Piece::Error(Errno::INVAL)]);
        if mode != Mode::Simple {
            assert_eq!(peer.run(Command::BlockStatus, NONE, end, 1), [Piece::Error(Errno::INVAL)]);
        }
        assert_eq!(disk.take_log(), []);
        assert_eq!(peer.read_at(end, 0), Ok(vec![]));
        assert_eq!(peer.read_at(end - 1, 1), Ok(vec![0]));
        peer.disconnect();
    }
}

#[test]
fn a_read_only_export_refuses_writes_and_takes_their_payload() {
    for mode in MODES {
        let server = Server::new(ServerOptions::default()).unwrap();
        server.add(Export::new("disk", disk())).unwrap();
        let mut peer = Peer::ready(&server, mode, &[]);
        assert!(peer.flags.contains(TransmissionFlags::READ_ONLY));
        assert!(!peer.flags.contains(TransmissionFlags::SEND_WRITE_ZEROES));
        assert_eq!(peer.write_at(NONE, 0, &[1; 100_000]), Err(Errno::PERM));
        assert_eq!(peer.run(Command::Trim, NONE, 0, 1), [Piece::Error(Errno::PERM)]);
        assert_eq!(peer.run(Command::WriteZeroes, NONE, 0, 1), [Piece::Error(Errno::PERM)]);
        assert_eq!(peer.run(Command::Flush, NONE, 0, 0), [Piece::Done]);
        peer.disconnect();
    }
}

#[test]
fn what_is_too_long_or_unknown_is_refused_and_the_connection_goes_on() {
    for mode in MODES {
        let server = serve(Arc::new(MemoryDisk::new(64 * MIB)));
        let mut peer = Peer::ready(&server, mode, &[]);
        let cookie = peer.send(Command::Read, NONE, 0, (32 << 20) + 1);
        let too_long = if mode == Mode::Extended { Errno::OVERFLOW } else { Errno::INVAL };
        assert_eq!(peer.reply(cookie, 0), [Piece::Error(too_long)]);
        assert_eq!(peer.run(Command::Other(77), NONE, 0, 0), [Piece::Error(Errno::INVAL)]);
        assert_eq!(
            peer.run(Command::Flush, CommandFlags::from_bits(0x4000), 0, 0),
            [Piece::Error(Errno::INVAL)]
        );
        assert_eq!(peer.run(Command::Flush, CommandFlags::DF, 0, 0), [Piece::Error(Errno::INVAL)]);
        assert_eq!(peer.read_at(0, 1), Ok(vec![0]));
        // A write whose payload is longer than a client may send is answered, and ends the connection.
        let cookie = peer.send(Command::Write, NONE, 0, (32 << 20) + 1);
        assert_eq!(peer.reply(cookie, 0), [Piece::Error(Errno::INVAL)]);
        assert!(peer.is_closed());
    }
}

#[test]
fn errors_of_the_device_keep_their_meaning() {
    for (kind, errno) in [
        (ErrorKind::Io, Errno::IO),
        (ErrorKind::NoSpace, Errno::NOSPC),
        (ErrorKind::Corrupt, Errno::IO),
        (ErrorKind::ReadOnly, Errno::PERM),
    ] {
        for mode in MODES {
            let faults = Faults::new();
            let server = serve(Arc::new(FaultDisk::new(disk(), faults.clone())));
            let mut peer = Peer::ready(&server, mode, &[]);
            faults.inject(Fault::on(OpKind::Any).forever().with(kind));
            assert_eq!(peer.write_at(NONE, 0, &[1; 512]), Err(errno));
            assert_eq!(peer.write_at(NONE, 0, &vec![1; 1 << 20]), Err(errno));
            assert_eq!(peer.read_at(0, 512), Err(errno));
            assert_eq!(peer.read_at(0, 1 << 20), Err(errno));
            assert_eq!(peer.run(Command::Flush, NONE, 0, 0), [Piece::Error(errno)]);
            peer.disconnect();
        }
    }
}

/// A disk that can make zeros only by writing them.
#[derive(Debug)]
struct SlowZeroes(MemoryDisk);

impl BlockDevice for SlowZeroes {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn name(&self) -> &str {
        "slow zeroes"
    }
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.0.write_at(buf, offset, flags)
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if flags.contains(ZeroFlags::NO_FALLBACK) {
            return Err(Error::new(ErrorKind::Unsupported, "write zeroes"));
        }
        self.0.write_zeroes(range, flags)
    }
    fn discard(&self, range: ByteRange) -> Result<()> {
        self.0.discard(range)
    }
    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.0.extents(range, visit)
    }
}

#[test]
fn zeros_that_cannot_be_fast_are_refused_as_such() {
    let server = serve(Arc::new(SlowZeroes(MemoryDisk::new(MIB))));
    let mut peer = Peer::ready(&server, Mode::Structured, &[]);
    let fast = CommandFlags::FAST_ZERO;
    assert_eq!(peer.run(Command::WriteZeroes, fast, 0, MIB), [Piece::Error(Errno::NOTSUP)]);
    assert_eq!(peer.run(Command::WriteZeroes, NONE, 0, MIB), [Piece::Done]);
    peer.disconnect();
}

/// Every other 64 KiB is dirty.
struct Stripes;

impl MetaContext for Stripes {
    fn name(&self) -> &'static str {
        "qemu:dirty-bitmap:stripes"
    }

    fn visit(&self, range: ByteRange, visit: &mut dyn FnMut(ByteRange, u32) -> Visit) -> Result<()> {
        for piece in range.pieces(64 * KIB) {
            let dirty = u32::from((piece.start() / (64 * KIB)) % 2 == 1);
            if visit(piece, dirty).is_break() {
                break;
            }
        }
        Ok(())
    }
}

fn mapped() -> Arc<Server> {
    let below: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::new(8 * MIB).with_cluster_size(64 * KIB));
    below.write_at(&[1; 512], MIB, WriteFlags::NONE).unwrap();
    let disk = disk();
    let disk = Arc::into_inner(disk).unwrap().with_backing(below);
    disk.write_at(&[1; 512], 0, WriteFlags::NONE).unwrap();
    disk.write_zeroes(ByteRange::at(64 * KIB, 64 * KIB), ZeroFlags::MAY_UNMAP).unwrap();
    let server = Server::new(ServerOptions::default()).unwrap();
    let export = Export::new("disk", Arc::new(disk)).allocation_depth(true).context(Arc::new(Stripes));
    server.add(export).unwrap();
    server
}

#[test]
fn status_tells_what_each_context_says() {
    let server = mapped();
    for mode in [Mode::Structured, Mode::Extended] {
        let contexts = ["qemu:allocation-depth", "base:allocation", "qemu:dirty-bitmap:stripes"];
        let mut peer = Peer::ready(&server, mode, &contexts);
        let k = 64 * KIB;
        let expected = [
            // Allocation: data, zeros, nothing, data of the layer below.
            (0, k, 0),
            (0, MIB - k, 3),
            (0, k, 0),
            // Depth: here, here too, nowhere, one below.
            (1, 2 * k, 1),
            (1, MIB - 2 * k, 0),
            (1, k, 2),
        ];
        let found = peer.status(NONE, 0, MIB + k);
        assert_eq!(found[..6], expected);
        assert_eq!(found[6..].len(), 17);
        assert!(found[6..].iter().enumerate().all(|(i, run)| *run == (2, k, u64::from(i % 2 == 1))));
        assert_eq!(peer.status(CommandFlags::REQ_ONE, k, MIB), [(0, MIB - k, 3), (1, k, 1), (2, k, 1)]);
        // Clipped at both ends.
        assert_eq!(peer.status(CommandFlags::REQ_ONE, k + 1, 5), [(0, 5, 3), (1, 5, 1), (2, 5, 1)]);
        assert_eq!(peer.run(Command::BlockStatus, NONE, 0, 0), [Piece::Error(Errno::INVAL)]);
        peer.disconnect();
    }
}

#[test]
fn a_filter_picks_contexts() {
    let server = mapped();
    let mut peer = Peer::ready(&server, Mode::Extended, &["qemu:allocation-depth", "base:allocation"]);
    assert!(peer.flags.contains(TransmissionFlags::BLOCK_STAT_PAYLOAD));
    let mut ask = |length, ids: &[u32]| {
        let payload = PayloadFilter { length, ids: ids.to_vec() }.encode();
        let flags = CommandFlags::PAYLOAD_LEN;
        let cookie = peer.send(Command::BlockStatus, flags, 0, payload.len() as u64);
        peer.write(&payload);
        peer.reply(cookie, 0)
    };
    match ask(64 * KIB, &[1]).as_slice() {
        [Piece::Status(status)] => {
            assert_eq!(status.id, 1);
            assert_eq!(status.descriptors[0].length, 64 * KIB);
        }
        other => panic!("{other:?}"),
    }
    for (length, ids) in
        [(64 * KIB, &[2][..]), (64 * KIB, &[0, 0]), (64 * KIB, &[]), (9 * MIB, &[0]), (0, &[0])]
    {
        assert_eq!(ask(length, ids), [Piece::Error(Errno::INVAL)], "{length} {ids:?}");
    }
    peer.disconnect();
}

#[test]
fn a_disk_of_many_runs_is_told_as_far_as_an_answer_goes() {
    let disk = MemoryDisk::new(128 * MIB);
    for at in (0..128 * MIB).step_by(1024) {
        disk.write_at(&[1; 512], at, WriteFlags::NONE).unwrap();
    }
    let server = serve(Arc::new(disk));
    let mut peer = Peer::ready(&server, Mode::Structured, &["base:allocation"]);
    let found = peer.status(NONE, 0, 128 * MIB);
    assert_eq!(found.len(), 8192);
    assert!(found.iter().all(|run| run.1 == 512));
    peer.disconnect();
}

/// Sectors that all are alike: their run never ends.
struct Endless(AtomicU64);

impl MetaContext for Endless {
    fn name(&self) -> &'static str {
        "x:endless"
    }

    fn visit(&self, range: ByteRange, visit: &mut dyn FnMut(ByteRange, u32) -> Visit) -> Result<()> {
        for piece in range.pieces(512) {
            self.0.fetch_add(1, Ordering::Relaxed);
            if visit(piece, 1).is_break() {
                break;
            }
        }
        Ok(())
    }
}

#[test]
fn a_status_answer_ends_early_where_the_work_for_it_would_not() {
    const LEN: u64 = 1 << 50;
    let endless = Arc::new(Endless(AtomicU64::new(0)));
    let server = Server::new(ServerOptions::default()).unwrap();
    server.add(Export::new("disk", Arc::new(MemoryDisk::new(LEN))).context(endless.clone())).unwrap();
    let mut peer = Peer::ready(&server, Mode::Extended, &["x:endless"]);
    for _ in 0..40 {
        peer.send(Command::BlockStatus, CommandFlags::NONE, 0, LEN);
    }
    for _ in 0..40 {
        let (_, piece, done) = peer.receive(0);
        assert!(done);
        let Piece::Status(status) = piece else { panic!("{piece:?}") };
        assert!(matches!(status.descriptors.as_slice(), [run] if run.flags == 1 && run.length == 32 << 20));
    }
    assert!(endless.0.load(Ordering::Relaxed) <= 40 * (65536 + 1));
    peer.disconnect();
}

/// A disk whose file was cut short at 1 MiB and 512 bytes.
#[derive(Debug)]
struct CutDisk(MemoryDisk);

const CUT: u64 = MIB + 512;

impl BlockDevice for CutDisk {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn name(&self) -> &str {
        "cut"
    }

    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if offset + buf.len() as u64 > CUT {
            return Err(Error::new(ErrorKind::CutShort, "read").in_file("cut").at(CUT));
        }
        self.0.read_at(buf, offset)
    }

    /// Past the cut bytes are written only where what is lost around them may become zeros.
    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        if offset + buf.len() as u64 > CUT && !flags.contains(WriteFlags::LOST_AS_ZEROS) {
            return Err(Error::new(ErrorKind::CutShort, "read").in_file("cut").at(CUT));
        }
        self.0.write_at(buf, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if range.end() > CUT && !flags.contains(ZeroFlags::LOST_AS_ZEROS) {
            return Err(Error::new(ErrorKind::CutShort, "read").in_file("cut").at(CUT));
        }
        self.0.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.0.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.0.extents(range, visit)
    }
}

/// Clients read zeros where a file was cut short, as behind QEMU's server, everything else as it is, and it
/// is reported once.
#[test]
fn what_a_file_that_was_cut_short_lacks_is_zeros() {
    for mode in MODES {
        let device = Arc::new(CutDisk(MemoryDisk::with_contents(&vec![7; 2 << 20])));
        let server = Server::new(ServerOptions::default()).unwrap();
        let reports = Arc::new(Mutex::new(Vec::new()));
        let report = Arc::clone(&reports);
        let export =
            Export::new("disk", device).on_cut_short(move |e| report.lock().unwrap().push(e.to_string()));
        server.add(export).unwrap();
        let mut peer = Peer::ready(&server, mode, &[]);
        assert_eq!(peer.read_at(0, 4096).unwrap(), [7; 4096]);
        assert!(reports.lock().unwrap().is_empty());
        for (at, len) in [(0, 2 * MIB), (MIB, 1024), (CUT - 1, 2), (CUT, 70_000), (2 * MIB - 1, 1)] {
            let found = peer.read_at(at, u32::try_from(len).unwrap()).unwrap();
            let there = usize::try_from(CUT.saturating_sub(at)).unwrap().min(found.len());
            let (data, zeros) = found.split_at(there);
            assert!(data.iter().all(|b| *b == 7) && zeros.iter().all(|b| *b == 0), "{mode:?}: {len} at {at}");
        }
        peer.disconnect();
        assert_eq!(reports.lock().unwrap().len(), 1, "{mode:?}");
    }
}

/// A client's write beside bytes that are lost, in one cluster of a format, fails for a job only; it is
/// reported once.
#[test]
fn clients_write_beside_what_a_file_that_was_cut_short_lacks() {
    for command in [Command::Write, Command::WriteZeroes] {
        let disk = Arc::new(CutDisk(MemoryDisk::with_contents(&vec![7; 2 << 20])));
        let server = Server::new(ServerOptions::default()).unwrap();
        let reports = Arc::new(Mutex::new(0));
        let report = Arc::clone(&reports);
        let export = Export::new("disk", Arc::clone(&disk) as _).writable(true);
        server.add(export.on_cut_short(move |_| *report.lock().unwrap() += 1)).unwrap();
        let mut peer = Peer::ready(&server, Mode::Structured, &[]);
        let mut write = |at: u64, byte: u8| match command {
            Command::Write => peer.write_at(CommandFlags::FUA, at, &[byte; 512]).unwrap(),
            _ => {
                let cookie = peer.send(command, CommandFlags::NONE, at, 512);
                assert!(matches!(peer.reply(cookie, 0)[..], [Piece::Done]));
            }
        };
        write(0, 1);
        assert_eq!(*reports.lock().unwrap(), 0);
        for at in [CUT, CUT - 256, 2 * MIB - 512] {
            write(at, 2);
            let mut found = [0; 512];
            disk.0.read_at(&mut found, at).unwrap();
            assert_eq!(found, [if command == Command::Write { 2 } else { 0 }; 512], "{command:?}");
        }
        assert_eq!(*reports.lock().unwrap(), 1, "{command:?}");
        peer.disconnect();
    }
}
