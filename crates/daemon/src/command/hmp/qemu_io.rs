//! `qemu-io`: requests to a node by hand, in the words of the tool of that name, and with its answers.
//!
//! Requests go through the node's tap, so a mirror sees what they write. They move in pieces of [`PIECE`]
//! bytes, whatever length is asked for.

use std::fmt::Write;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmirror_block::{BlockDevice, ByteRange, Error, ErrorKind, WriteFlags, ZeroFlags};
use blockmirror_image_lock::Permission;
use blockmirror_mirror::Tap;
use blockmirror_qmp::QmpError;

use super::size;
use crate::Reply;
use crate::arguments::arguments;
use crate::context::Context;
use crate::errors::is_read_only;
use crate::graph::{ALL_PERMS, AttachmentId, Parent, Perms};

/// Bytes that are moved at once.
const PIECE: u64 = 1 << 20;
/// The longest request but one of zeros, as in the tool.
const LONGEST: u64 = 2_147_483_136;
/// The most bytes that are shown, and kept of a file to be written.
const SHOWN: u64 = 1 << 20;
/// What is written if nothing else is said.
const FILLING: u8 = 0xcd;

/// A command of the tool.
struct Tool {
    name: &'static str,
    alias: &'static str,
    /// As `getopt` takes them: a colon follows those that have an argument.
    flags: &'static str,
    usage: &'static str,
    /// How many arguments there are beside flags.
    arguments: usize,
    writes: bool,
    run: fn(&Tap, &Given<'_>) -> Result<String, String>,
}

static TOOLS: [Tool; 4] = [
    Tool {
        name: "read",
        alias: "r",
        flags: "Cl:P:pqrs:v",
        usage: "[-Cqrv] [-P pattern [-s off] [-l len]] off len -- reads a number of bytes at a specified \
         offset",
        arguments: 2,
        writes: false,
        run: read,
    },
    Tool {
        name: "write",
        alias: "w",
        flags: "CfnpP:qrs:uz",
        usage: "[-Cfnqruz] [-P pattern | -s source_file] off len -- writes a number of bytes at a specified \
         offset",
        arguments: 2,
        writes: true,
        run: write,
    },
    Tool {
        name: "discard",
        alias: "d",
        flags: "Cq",
        usage: "[-Cq] off len -- discards a number of bytes at a specified offset",
        arguments: 2,
        writes: true,
        run: discard,
    },
    Tool {
        name: "flush",
        alias: "f",
        flags: "",
        usage: "-- flush all in-core file state to disk",
        arguments: 0,
        writes: false,
        run: |tap, _| tap.flush().map(|()| String::new()).map_err(|error| failed("flush", &error)),
    },
];

/// What a command of the tool was given.
struct Given<'a> {
    flags: Vec<(char, &'a str)>,
    arguments: Vec<&'a str>,
}

impl Given<'_> {
    fn has(&self, flag: char) -> bool {
        self.flags.iter().any(|(letter, _)| *letter == flag)
    }

    /// The argument of the last such flag.
    fn value(&self, flag: char) -> Option<&str> {
        self.flags.iter().rev().find(|(letter, _)| *letter == flag).map(|(_, value)| *value)
    }

    fn number(&self, text: &str) -> Result<u64, String> {
        size::whole(text).filter(|bytes| i64::try_from(*bytes).is_ok()).ok_or_else(|| {
            format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}\n")
        })
    }

    /// Where the request is, at most `longest` bytes long; `hint` tells how it could be longer.
    fn range(&self, longest: u64, hint: &str) -> Result<ByteRange, String> {
        let [offset, len] = self.arguments[..] else { return Err(String::new()) };
        let (offset, bytes) = (self.number(offset)?, self.number(len)?);
        if bytes > longest {
            return Err(format!("length cannot exceed {longest}{hint}, given {len}\n"));
        }
        // Both are below 2^63.
        Ok(ByteRange::at(offset, bytes))
    }

    fn pattern(&self) -> Result<Option<u8>, String> {
        let Some(text) = self.value('P') else { return Ok(None) };
        let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(digits) => (digits, 16),
            None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
            None => (text, 10),
        };
        let byte = u8::from_str_radix(digits, radix).ok().filter(|_| !digits.starts_with('+'));
        byte.map(Some).ok_or_else(|| format!("{text} is not a valid pattern byte\n"))
    }

    /// The report of a request of `len` bytes at `offset` that took `time`.
    fn report(&self, verb: &str, range: ByteRange, time: Duration) -> String {
        let len = range.len();
        let seconds = time.as_secs_f64().max(1e-9);
        let (rate, operations) = (len as f64 / seconds, 1.0 / seconds);
        if self.has('q') {
            String::new()
        } else if self.has('C') {
            format!("{len},1,{},{rate:.3},{operations:.3}\n", clock(time, true))
        } else {
            format!(
                "{verb} {len}/{len} bytes at offset {}\n{}, 1 ops; {} ({}/sec and {operations:.4} ops/sec)\n",
                range.start(),
                amount(len as f64),
                clock(time, false),
                amount(rate),
            )
        }
    }
}

/// Bytes in the largest unit that they fill.
fn amount(bytes: f64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut value, mut unit) = (bytes, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let value = format!("{value:.3}");
    format!("{} {}", value.strip_suffix(".000").unwrap_or(&value), units[unit])
}

fn clock(time: Duration, full: bool) -> String {
    let seconds = time.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let rest = format!("{:02}.{:02}", seconds % 60, time.subsec_millis() / 10);
    match (hours, minutes) {
        _ if full || hours > 0 => format!("{hours}:{minutes:02}:{rest}"),
        (_, 0) => format!("{rest} sec"),
        _ => format!("{minutes}:{rest}"),
    }
}

arguments! {
    /// What the verb was given.
    pub(super) struct QemuIoArgs {
        qdev: Option<bool> = "qdev", "whether a guest's device is meant";
        device: String = "device", "the node";
        command: String = "command", "the command";
    }
}

/// `qemu-io`.
pub(super) fn run(context: &Context, args: &QemuIoArgs) -> Reply<String> {
    let device = &*args.device;
    if args.qdev.is_some() {
        return Err(QmpError::generic(format!("Device '{device}' not found")));
    }
    context.graph.lock().find_node(device)?;
    let mut words = args.command.split(' ').filter(|word| !word.is_empty());
    let Some(name) = words.next() else { return Ok(String::new()) };
    let Some(tool) = TOOLS.iter().find(|tool| tool.name == name || tool.alias == name) else {
        return Ok(format!("command \"{name}\" not found\n"));
    };
    let (tap, held) = match hold(context, device, tool.writes) {
        Ok(held) => held,
        Err(error) => return Ok(format!("{}\n", error.desc)),
    };
    let done = given(tool, words.collect()).and_then(|given| (tool.run)(&tap, &given));
    context.detach_all(&held);
    Ok(done.unwrap_or_else(|text| text))
}

/// The tap of the node `device`, and what holds it for a command that `writes`. Both under one lock: the end
/// of a mirror may give the tap to another node in between.
fn hold(context: &Context, device: &str, writes: bool) -> Reply<(Arc<Tap>, Vec<AttachmentId>)> {
    let mut graph = context.graph.lock();
    let node = graph.find_node(device)?;
    if !writes {
        return Ok((Arc::clone(&node.tap), Vec::new()));
    }
    if node.read_only {
        return Err(is_read_only());
    }
    let tap = Arc::clone(&node.tap);
    let perm = Perms::NONE.with(Permission::Write);
    Ok((tap, vec![graph.attach(device, Parent::Monitor, perm, ALL_PERMS)?]))
}

/// Parts flags from arguments, as `getopt` does.
fn given<'a>(tool: &Tool, words: Vec<&'a str>) -> Result<Given<'a>, String> {
    let (name, count) = (tool.name, words.len());
    match tool.arguments {
        0 if count > 0 => {
            return Err(format!("bad argument count {count} to {name}, expected 0 arguments\n"));
        }
        least if count < least => {
            return Err(format!(
                "bad argument count {count} to {name}, expected at least {least} arguments\n"
            ));
        }
        _ => {}
    }
    let wrong = |text: String| format!("{name}: {text}\n{name} {}\n", tool.usage);
    let mut given = Given { flags: Vec::new(), arguments: Vec::new() };
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let Some(letters) = word.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
            given.arguments.push(word);
            continue;
        };
        if letters == "-" {
            given.arguments.extend(words);
            break;
        }
        for (at, letter) in letters.char_indices() {
            let known = tool.flags.find(letter).filter(|_| letter != ':');
            let Some(known) = known else { return Err(wrong(format!("invalid option -- '{letter}'"))) };
            if !tool.flags[known + 1..].starts_with(':') {
                given.flags.push((letter, ""));
                continue;
            }
            let value = match &letters[at + letter.len_utf8()..] {
                "" => words.next(),
                attached => Some(attached),
            };
            let value = value.ok_or_else(|| wrong(format!("option requires an argument -- '{letter}'")))?;
            given.flags.push((letter, value));
            break;
        }
    }
    if given.arguments.len() == tool.arguments {
        return Ok(given);
    }
    Err(format!("{name} {}\n", tool.usage))
}

fn failed(verb: &str, error: &Error) -> String {
    let reason = match error.kind() {
        ErrorKind::NoSpace => "No space left on device",
        ErrorKind::PermissionDenied | ErrorKind::ReadOnly => "Operation not permitted",
        ErrorKind::Unsupported => "Operation not supported",
        ErrorKind::Cancelled => "Operation canceled",
        _ => "Input/output error",
    };
    format!("{verb} failed: {reason}\n")
}

/// Whether a request is inside the disk: the pieces of one that is not would be done up to the end.
fn check(tap: &Tap, verb: &str, range: ByteRange) -> Result<(), String> {
    if range.end() <= tap.len() {
        Ok(())
    } else {
        Err(failed(verb, &Error::new(ErrorKind::OutOfBounds, "request")))
    }
}

fn read(tap: &Tap, given: &Given<'_>) -> Result<String, String> {
    let usage = || format!("read {}\n", TOOLS[0].usage);
    let pattern = given.pattern()?;
    let range = given.range(LONGEST, "")?;
    if pattern.is_none() && (given.has('s') || given.has('l')) {
        return Err(usage());
    }
    let from = given.value('s').map_or(Ok(0), |text| given.number(text))?;
    let len = given.value('l').map_or(Ok(range.len().saturating_sub(from)), |text| given.number(text))?;
    if from.checked_add(len).is_none_or(|end| end > range.len()) {
        return Err("pattern verification range exceeds end of read data\n".to_owned());
    }
    let verified = ByteRange::at(range.start() + from, len);
    if given.has('v') && range.len() > SHOWN {
        return Err(format!("length cannot exceed {SHOWN} with -v, given {}\n", range.len()));
    }
    check(tap, "read", range)?;
    let (mut shown, mut differs) = (String::new(), false);
    let start = Instant::now();
    let mut buffer = Vec::new();
    for piece in range.pieces(PIECE) {
        // At most a piece.
        buffer.resize(piece.len() as usize, 0);
        tap.read_at(&mut buffer, piece.start()).map_err(|error| failed("read", &error))?;
        let part = piece.intersect(verified);
        if !part.is_empty() {
            let bytes = (part.start() - piece.start()) as usize..(part.end() - piece.start()) as usize;
            differs |= pattern.is_some_and(|byte| buffer[bytes].iter().any(|found| *found != byte));
        }
        if given.has('v') && !given.has('q') {
            dump(&mut shown, &buffer, piece.start());
        }
    }
    let time = start.elapsed();
    if differs {
        shown = format!("Pattern verification failed at offset {}, {len} bytes\n{shown}", verified.start());
    }
    Ok(shown + &given.report("read", range, time))
}

/// Bytes as numbers and letters, 16 to a line.
fn dump(text: &mut String, bytes: &[u8], offset: u64) {
    for (line, at) in bytes.chunks(16).zip((offset..).step_by(16)) {
        // Writing to a string does not fail.
        let _ = write!(text, "{at:08x}:  ");
        line.iter().for_each(|byte| {
            let _ = write!(text, "{byte:02x} ");
        });
        let letters = line.iter().map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '.' });
        let _ = writeln!(text, " {}", letters.collect::<String>());
    }
}

fn write(tap: &Tap, given: &Given<'_>) -> Result<String, String> {
    let ways = ['z', 'P', 's'].into_iter().filter(|flag| given.has(*flag)).count();
    if ways > 1 {
        return Err("Only one of -z, -P, and -s can be specified at the same time\n".to_owned());
    }
    for flag in ['n', 'u'] {
        if given.has(flag) && !given.has('z') {
            return Err(format!("-{flag} requires -z to be specified\n"));
        }
    }
    let pattern = given.pattern()?.unwrap_or(FILLING);
    let (longest, hint) = if given.has('n') { (u64::MAX, "") } else { (LONGEST, " without -n") };
    let range = given.range(longest, hint)?;
    let source = given.value('s').map(|path| source(path, range.len())).transpose()?;
    check(tap, "write", range)?;
    let start = Instant::now();
    if given.has('z') {
        let mut flags = ZeroFlags::NONE;
        for (flag, set) in [('u', ZeroFlags::MAY_UNMAP), ('n', ZeroFlags::NO_FALLBACK), ('f', ZeroFlags::FUA)]
        {
            if given.has(flag) {
                flags |= set;
            }
        }
        tap.write_zeroes(range, flags).map_err(|error| failed("write", &error))?;
    } else {
        let flags = if given.has('f') { WriteFlags::FUA } else { WriteFlags::NONE };
        // At most a piece.
        let mut buffer = vec![pattern; range.len().min(PIECE) as usize];
        for piece in range.pieces(PIECE) {
            if let Some(source) = &source {
                let from = (piece.start() - range.start()) as usize;
                let bytes = source.iter().cycle().skip(from % source.len());
                buffer.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            }
            let bytes = &buffer[..piece.len() as usize];
            tap.write_at(bytes, piece.start(), flags).map_err(|error| failed("write", &error))?;
        }
    }
    Ok(given.report("wrote", range, start.elapsed()))
}

/// What a file holds, to be written again and again: at most `len` bytes of it.
fn source(path: &str, len: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path);
    let read = file.and_then(|file| file.take(len.min(SHOWN + 1)).read_to_end(&mut bytes));
    match read {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(format!("{path}: No such file or directory\n"))
        }
        Err(error) => Err(format!("{path}: {error}\n")),
        Ok(0) if len > 0 => Err(format!("{path}: file is empty\n")),
        Ok(_) if bytes.len() as u64 > SHOWN => Err(format!("{path}: file is longer than {SHOWN} bytes\n")),
        Ok(_) => Ok(bytes),
    }
}

fn discard(tap: &Tap, given: &Given<'_>) -> Result<String, String> {
    let range = given.range(LONGEST, "")?;
    check(tap, "discard", range)?;
    let start = Instant::now();
    tap.discard(range).map_err(|error| failed("discard", &error))?;
    Ok(given.report("discard", range, start.elapsed()))
}
