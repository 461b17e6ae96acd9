//! Clients that almost keep to the protocol, to the NBD server, over socket pairs.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use blockmirror_block::testing::{MemoryDisk, Rng};
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_nbd::proto::{
    ClientFlags, Command, CommandFlags, InfoCode, InfoRequest, MetaContextRequest, OptionCode, PayloadFilter,
    Request, encode_option,
};
use blockmirror_nbd::server::{Export, Server, ServerOptions};
use blockmirror_testing::Outcome;

use super::spoil::spoil;
use super::{HANG, Heard, Listener};

/// Length of the disk.
const DISK: u64 = 1 << 20;
/// Clients at the same time, of each thread.
const TOGETHER: usize = 24;
/// What every byte of the read-only export is.
const STILL: u8 = 0x5a;
/// Bytes that an honest client reads.
const HONEST: usize = 4096;

/// The server, with a writable disk and a read-only one.
pub(super) struct ServerListener(Arc<Server>);

impl ServerListener {
    pub(super) fn new() -> Outcome<Self> {
        let server = Server::new(ServerOptions::default())?;
        server.add(
            Export::new("disk", Arc::new(MemoryDisk::new(DISK)))
                .description("a disk")
                .writable(true)
                .allocation_depth(true),
        )?;
        let still = MemoryDisk::new(DISK);
        still.write_at(&[STILL; HONEST], 0, WriteFlags::NONE)?;
        server.add(Export::new("still", Arc::new(still)))?;
        Ok(Self(server))
    }
}

impl Listener for ServerListener {
    fn speak(&self, seed: u64, count: u64) -> Outcome<Heard> {
        let mut rng = Rng::new(seed, 1);
        let mut heard = Heard::default();
        let mut answer = Vec::new();
        let mut left = count;
        while left > 0 {
            let mut clients = Vec::new();
            for _ in 0..left.min(TOGETHER as u64) {
                left -= 1;
                let honest = rng.chance(2);
                let mut said = if honest { honest_client() } else { client(&mut rng) };
                if !honest {
                    spoil(&mut rng, &mut said);
                }
                let (mut ours, theirs) = UnixStream::pair()?;
                ours.set_read_timeout(Some(HANG))?;
                ours.set_write_timeout(Some(HANG))?;
                self.0.serve(theirs)?;
                // Some go away in the middle, without a word.
                if !honest && rng.chance(5) {
                    let _ = ours.write_all(&said.concat());
                    continue;
                }
                // The server may have closed already.
                let _ = ours.write_all(&said.concat());
                let _ = ours.shutdown(Shutdown::Write);
                clients.push((ours, honest));
            }
            for (mut client, honest) in clients {
                answer.clear();
                match client.read_to_end(&mut answer) {
                    Ok(_) => {}
                    Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {}
                    Err(e) => return Err(format!("a client that has said all it had to say: {e}").into()),
                }
                if honest {
                    let read = answer.len().checked_sub(HONEST).and_then(|at| answer.get(at..));
                    if read != Some(&[STILL; HONEST]) {
                        return Err(format!("an honest client was answered {} bytes", answer.len()).into());
                    }
                    heard.honest += 1;
                } else if answer.len() > 200 {
                    heard.done += 1;
                } else {
                    heard.refused += 1;
                }
            }
        }
        Ok(heard)
    }

    fn left(&self) -> Outcome {
        let started = Instant::now();
        while self.0.connections() > 0 || self.0.memory_in_use() > 0 {
            if started.elapsed() > HANG {
                let (connections, bytes) = (self.0.connections(), self.0.memory_in_use());
                return Err(format!("{connections} connections and {bytes} bytes are left").into());
            }
            thread::yield_now();
        }
        Ok(())
    }
}

fn option(code: OptionCode, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_option(&mut bytes, code, payload);
    bytes
}

/// A client that reads the beginning of the read-only export.
fn honest_client() -> Vec<Vec<u8>> {
    let read = Request {
        flags: CommandFlags::NONE,
        command: Command::Read,
        cookie: 1,
        offset: 0,
        length: HONEST as u64,
    };
    vec![
        (ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).encode().to_vec(),
        option(OptionCode::Go, &InfoRequest { export: "still", infos: vec![] }.encode()),
        read.encode_compact().map(Vec::from).unwrap_or_default(),
    ]
}

/// A client that asks this and that, then reads and writes.
fn client(rng: &mut Rng) -> Vec<Vec<u8>> {
    let mut said = vec![(ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).encode().to_vec()];
    let export = rng.pick(&["disk", "disk", "disk", "still", ""]);
    let (mut extended, mut structured) = (false, false);
    for _ in 0..rng.below(4) {
        let infos = vec![InfoCode::Name, InfoCode::Description, InfoCode::BlockSize];
        said.push(match rng.below(7) {
            0 => option(OptionCode::List, &[]),
            1 => option(OptionCode::Info, &InfoRequest { export, infos }.encode()),
            2 => option(OptionCode::StartTls, &[]),
            3 => {
                let queries = vec!["base:", "qemu:", "qemu:dirty-bitmap:", "base:allocation"];
                option(OptionCode::ListMetaContext, &MetaContextRequest { export, queries }.encode())
            }
            4 => {
                structured = true;
                option(OptionCode::StructuredReply, &[])
            }
            5 => {
                extended = true;
                option(OptionCode::ExtendedHeaders, &[])
            }
            _ => option(OptionCode::from_wire(rng.below(20) as u32), &[0; 12]),
        });
    }
    if structured || extended {
        let queries = vec!["base:allocation", "qemu:allocation-depth"];
        said.push(option(OptionCode::SetMetaContext, &MetaContextRequest { export, queries }.encode()));
    }
    if rng.chance(10) {
        said.push(option(OptionCode::ExportName, export.as_bytes()));
    } else {
        said.push(option(OptionCode::Go, &InfoRequest { export, infos: vec![InfoCode::BlockSize] }.encode()));
    }
    for cookie in 0..rng.below(8) {
        said.extend(request(rng, extended, cookie));
    }
    said
}

/// A request and its payload.
fn request(rng: &mut Rng, extended: bool, cookie: u64) -> Vec<Vec<u8>> {
    let command = Command::from_wire(rng.below(9) as u16);
    let offset = rng.below(DISK + 4096);
    let mut length = rng.pick(&[0, 1, 512, 4096, 65536, DISK]).min(DISK);
    let mut flags = match rng.below(3) {
        0 => CommandFlags::from_bits(rng.below(64) as u16),
        _ => CommandFlags::NONE,
    };
    let mut payload = Vec::new();
    match command {
        Command::Read => length = length.min(4096),
        Command::Write => {
            length = length.min(4096);
            payload = vec![7; length as usize];
            if extended {
                flags = flags | CommandFlags::PAYLOAD_LEN;
            }
        }
        Command::BlockStatus if extended && rng.chance(50) => {
            flags = flags | CommandFlags::PAYLOAD_LEN;
            payload = PayloadFilter { length, ids: vec![rng.below(3) as u32] }.encode();
            length = payload.len() as u64;
        }
        _ => {}
    }
    let request = Request { flags, command, cookie, offset, length };
    let header = match extended {
        true => request.encode_extended().to_vec(),
        false => request.encode_compact().map(Vec::from).unwrap_or_default(),
    };
    if payload.is_empty() { vec![header] } else { vec![header, payload] }
}
