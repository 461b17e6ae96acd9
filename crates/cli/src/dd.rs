//! `blockmirror dd`: a conversion of a part of an image, with the operands of `dd`.

use std::path::PathBuf;

use blockmirror_block::ByteRange;
use blockmirror_block::size::{human_size, parse_size};
use blockmirror_image::{FileId, ImageName};
use blockmirror_ops::{Convert, ConvertError, ConvertOutcome};

use crate::args::DdArgs;
use crate::console::Console;
use crate::copy::watch;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;
use crate::meter::Meter;
use crate::progress::Phase;
use crate::voice::Finished;
use crate::{lock_policy, target};

/// The most bytes of a block, as for `qemu-img`.
const MAX_BLOCK: u64 = i32::MAX as u64;

/// What the operands say.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Operands {
    pub(crate) input: PathBuf,
    pub(crate) output: PathBuf,
    block: u64,
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    /// Reads operands; of several with one name the last counts, as in dd.
    pub(crate) fn parse(operands: &[String]) -> Outcome<Self> {
        let (mut input, mut output) = (None, None);
        let (mut block, mut count, mut skip) = (512, None, 0);
        for operand in operands {
            let (name, value) = operand.split_once('=').unwrap_or((operand, ""));
            match name {
                "if" => input = Some(PathBuf::from(value)),
                "of" => output = Some(PathBuf::from(value)),
                "bs" => block = block_size(value)?,
                "count" => count = Some(number(name, value)?),
                "skip" => skip = number(name, value)?,
                _ => return Err(Failure::usage(format_args!("dd: unknown operand {operand}"))),
            }
        }
        match (input, output) {
            (Some(input), Some(output)) => Ok(Self { input, output, block, count, skip }),
            _ => Err(Failure::usage("dd: if= and of= are needed")),
        }
    }

    /// The bytes of the input that are copied, as far as it has them. `count` counts from the start of the
    /// input, as qemu-img has it.
    fn range(&self) -> ByteRange {
        let end = self.count.map_or(u64::MAX, |count| count.saturating_mul(self.block));
        ByteRange::new(self.skip.saturating_mul(self.block), end)
    }
}

fn block_size(value: &str) -> Outcome<u64> {
    let wrong = |why: &dyn std::fmt::Display| Failure::usage(format_args!("dd: bs={value}: {why}"));
    match parse_size(value).map_err(|error| wrong(&error))? {
        bytes @ 1..=MAX_BLOCK => Ok(bytes),
        _ => Err(wrong(&format_args!("it must be between 1 and {MAX_BLOCK}"))),
    }
}

/// A number without a unit, as `qemu-img` wants it.
fn number(name: &str, value: &str) -> Outcome<u64> {
    let is_plain = match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        Some(hex) => hex.bytes().all(|byte| byte.is_ascii_hexdigit()),
        None => value.bytes().all(|byte| byte.is_ascii_digit()),
    };
    let number = parse_size(value).ok().filter(|number| is_plain && i64::try_from(*number).is_ok());
    number.ok_or_else(|| Failure::usage(format_args!("dd: {name}={value}: it is not a number of blocks")))
}

pub(crate) fn run(console: &mut Console<'_>, args: &DdArgs) -> Outcome {
    let operands = Operands::parse(&args.operands)?;
    console.keep_out_of(FileId::of(&args.output));
    let mut input = ImageName::from(&args.input);
    (input.node, input.format) = (args.node.clone(), args.format);
    let convert = Convert::new(input, &args.output)
        .source_range(operands.range())
        .source_access(lock_policy::of_source(&args.access))
        .target_access(lock_policy::of_target(&args.access))
        .target_format(args.output_format)
        .target_file(args.existing.options(None))
        .allow(lock_policy::allowed(&args.access)?);
    let source = convert.open_source().map_err(failure)?;
    for note in source.notes() {
        console.note(note);
    }
    if source.device().is_empty() && operands.skip > 0 {
        console.note(format_args!(
            "{}: there is nothing to copy at skip={}",
            args.input.display(),
            operands.skip
        ));
    }
    let prepared = convert.check(source).and_then(|checked| checked.prepare()).map_err(failure)?;
    let interrupt = Interrupt::watch()?;
    if let Some(new) = prepared.new_image() {
        target::announce(console, new, Some(&interrupt));
    }
    let ended = |error: ConvertError| {
        let failure = failure(error);
        if interrupt.requested() { failure.exit(interrupt.exit()) } else { failure }
    };
    let job = prepared.start(&|| interrupt.requested()).map_err(ended)?;
    let mut meter = Meter::new(console, &args.progress, Phase::Copy);
    watch(console, job.control(), &args.output, &mut meter, &interrupt, &mut |_, _| ());
    let outcome = job.finish().map_err(ended)?;
    if !outcome.durable {
        let output = args.output.display();
        console.note(format_args!("{output}: its server has no flush command: the copy may not be durable"));
    }
    if !args.progress.quiet {
        let text = console.voice.finished(Finished::Other, one_line(&text(args, &outcome)) + "\n");
        console.report(&text);
    }
    Ok(Exit::Done)
}

fn failure(error: ConvertError) -> Failure {
    match error {
        ConvertError::Image(error) => error.into(),
        error => Failure::failed(error),
    }
}

fn text(args: &DdArgs, outcome: &ConvertOutcome) -> String {
    format!(
        "{} -> {} ({}): {} in {:.2} s",
        args.input.display(),
        args.output.display(),
        outcome.format,
        human_size(outcome.len),
        outcome.copy.elapsed.as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<(u64, u64), String> {
        let operands: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let parsed = Operands::parse(&operands).map_err(|failure| failure.message.unwrap_or_default())?;
        Ok((parsed.range().start(), parsed.range().end()))
    }

    #[test]
    fn operands_are_those_of_qemu_img() {
        assert_eq!(parse("if=a of=b"), Ok((0, u64::MAX)));
        assert_eq!(parse("if=a of=b bs=1k count=3"), Ok((0, 3072)));
        assert_eq!(parse("if=a of=b bs=1000 count=3 skip=1"), Ok((1000, 3000)));
        assert_eq!(parse("if=a of=b count=3 skip=5"), Ok((2560, 2560)));
        assert_eq!(parse("bs=1.5k skip=0x2 if=a of=b"), Ok((3072, u64::MAX)));
        assert_eq!(parse("bs=1k bs=2k skip=1 if=a of=b"), Ok((2048, u64::MAX)));
        assert_eq!(parse("bs=1M skip=9223372036854775807 if=a of=b"), Ok((u64::MAX, u64::MAX)));
        for wrong in [
            "if=a",
            "of=b",
            "bs=0",
            "bs=2G",
            "bs=x",
            "count=-1",
            "count=1k",
            "count=1.5",
            "skip=",
            "seek=1",
            "conv=notrunc",
            "foo",
            "status=none",
            "count=9223372036854775808",
        ] {
            let line = if wrong.len() < 5 { wrong.to_owned() } else { format!("if=a of=b {wrong}") };
            assert!(parse(&line).is_err(), "{line}");
        }
    }
}
