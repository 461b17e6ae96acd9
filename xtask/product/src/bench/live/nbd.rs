//! Just enough of an NBD client to write to an export, one request at a time.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use blockmirror_testing::Outcome;

use super::guest::Writer;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
/// Fixed newstyle, and no padding after the export's facts.
const CLIENT_FLAGS: u32 = 0b11;
const OPTION_EXPORT_NAME: u32 = 1;
const COMMAND_WRITE: u16 = 1;

pub(super) struct Connection {
    stream: UnixStream,
    handle: u64,
}

impl Connection {
    pub(super) fn open(socket: &Path, export: &str) -> Outcome<Self> {
        let mut stream = UnixStream::connect(socket)?;
        // Two magic numbers, and the server's flags.
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        if greeting[8..16] != OPTION_MAGIC.to_be_bytes() {
            return Err("not a newstyle NBD server".into());
        }
        let mut hello = CLIENT_FLAGS.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend(OPTION_EXPORT_NAME.to_be_bytes());
        hello.extend(u32::try_from(export.len())?.to_be_bytes());
        hello.extend(export.as_bytes());
        stream.write_all(&hello)?;
        // Length and flags of the export; a server that does not know it hangs up.
        stream.read_exact(&mut [0; 10])?;
        Ok(Self { stream, handle: 0 })
    }
}

impl Writer for Connection {
    fn write(&mut self, offset: u64, block: &[u8]) -> Outcome {
        self.handle += 1;
        let mut request = Vec::with_capacity(28 + block.len());
        request.extend(REQUEST_MAGIC.to_be_bytes());
        request.extend(0_u16.to_be_bytes());
        request.extend(COMMAND_WRITE.to_be_bytes());
        request.extend(self.handle.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(u32::try_from(block.len())?.to_be_bytes());
        request.extend(block);
        self.stream.write_all(&request)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        if reply[..4] != REPLY_MAGIC.to_be_bytes() || reply[8..] != self.handle.to_be_bytes() {
            return Err("an answer to something else".into());
        }
        match reply[4..8] {
            [0, 0, 0, 0] => Ok(()),
            [a, b, c, d] => {
                Err(format!("the server answers with error {}", u32::from_be_bytes([a, b, c, d])).into())
            }
            _ => Err("a short answer".into()),
        }
    }
}
