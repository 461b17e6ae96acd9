//! What becomes of a malformed image: the answers to opening it for reading and reading all of it, to opening
//! it for writing and changing it, and to a check.

use std::fmt;
use std::sync::Arc;

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{BlockDevice, Error as BlockError, Storage};
use blockmirror_qcow2::format::entry::EntryError;
use blockmirror_qcow2::{CheckObserver, Damage, Error, Finding, OpenOptions, check};

use super::row::{Row, data_file};
use crate::check::SIZE;

/// Kinds of findings that are shown.
const SHOWN: usize = 3;
/// The longest disk that is read whole.
const MOST: u64 = 4 * SIZE;

/// An error, or that there was none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    Failed {
        /// Names of the types that it is: of the error, and of its cause.
        types: Vec<String>,
        text: String,
    },
}

/// The answers to a row.
#[derive(Clone, Debug)]
pub(super) struct Answers {
    open: Answer,
    /// Reading all of the disk, if it can be opened.
    read: Answer,
    open_writable: Answer,
    /// What the row asks for, if it can be opened for writing.
    ask: Answer,
    check: Answer,
    /// What the check has found, of each kind the first and how many.
    pub(super) found: Vec<(String, String, u64)>,
}

impl Answer {
    fn of(result: Result<(), Error>) -> Self {
        let Err(error) = result else { return Self::Done };
        let mut types = vec![variant(&error)];
        if let Error::NotWritable(refusal) = &error {
            types.push(variant(refusal));
        }
        if let Error::Bitmap { problem, .. } = &error {
            types.push(variant(problem));
        }
        let kind = error.kind();
        let error = error.in_file(&Arc::from("image"));
        types.extend(cause_of(&error));
        Self::Failed { text: format!("{kind:?}, {}: {error}", types.join(" ")), types }
    }

    pub(super) fn types(&self) -> &[String] {
        match self {
            Self::Done => &[],
            Self::Failed { types, .. } => types,
        }
    }
}

/// The name of a variant.
fn variant(value: &impl fmt::Debug) -> String {
    let text = format!("{value:?}");
    text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
}

/// The type that an error of reading or writing has for its cause.
fn cause_of(error: &BlockError) -> Option<String> {
    let cause = error.cause()?;
    let damage = cause.downcast_ref::<Damage>().map(variant);
    let entry = cause.downcast_ref::<EntryError>().map(variant);
    let format = cause.downcast_ref::<Error>().filter(|error| matches!(error, Error::Decompress { .. }));
    damage.or(entry).or(format.map(variant))
}

/// The first finding of each kind.
#[derive(Default)]
struct Findings(Vec<(String, String, u64)>);

impl CheckObserver for Findings {
    fn found(&mut self, finding: &Finding, times: u64) {
        let kind = variant(finding);
        match self.0.iter_mut().find(|(known, ..)| *known == kind) {
            Some((.., count)) => *count += times,
            None => self.0.push((kind, finding.to_string(), times)),
        }
    }
}

impl Answers {
    pub(super) fn of(row: &Row) -> Self {
        let (storage, has_data) = row.make();
        let options = |writable| {
            let options = OpenOptions::new().writable(writable);
            if has_data { options.data_file(data_file()) } else { options }
        };
        let mut read = Answer::Done;
        let open = (row.reading)(options(false)).open(storage.clone()).map(|disk| {
            read = Answer::of(read_all(&disk));
        });
        let open = Answer::of(open);
        let before = contents(&storage);
        let mut findings = Findings::default();
        let check = Answer::of(check(&*storage, &mut findings).map(drop));
        assert!(contents(&storage) == before, "{}: the check has written something", row.name);
        // The last, since it writes.
        let mut ask = Answer::Done;
        let writable = options(true).open(storage.clone()).map(|disk| ask = Answer::of((row.ask)(&disk)));
        let is_dirty = before.as_ref().is_some_and(|bytes| bytes.get(79).is_some_and(|byte| byte & 1 == 1));
        let is_kept = writable.is_ok() || is_dirty || contents(&storage) == before;
        assert!(is_kept, "{}: it was refused, and something was written", row.name);
        Self { open, read, open_writable: Answer::of(writable), ask, check, found: findings.0 }
    }

    pub(super) fn all(&self) -> [&Answer; 5] {
        [&self.open, &self.read, &self.open_writable, &self.ask, &self.check]
    }
}

/// All bytes, unless most of them are holes.
fn contents(storage: &MemoryStorage) -> Option<Vec<u8>> {
    (storage.len().unwrap() <= MOST).then(|| storage.to_vec())
}

fn read_all(disk: &dyn BlockDevice) -> Result<(), Error> {
    let len = disk.len().min(MOST);
    // At most MOST bytes.
    disk.read_at(&mut vec![0; len as usize], 0)?;
    Ok(())
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Failed { text, .. } => f.write_str(text),
        }
    }
}

impl fmt::Display for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps =
            [("open", &self.open), ("read", &self.read), ("write", &self.open_writable), ("ask", &self.ask)];
        // What was not come to has no line.
        let is_reached = |name: &str| match name {
            "read" => self.open == Answer::Done,
            "ask" => self.open_writable == Answer::Done,
            _ => true,
        };
        for (name, answer) in steps.into_iter().filter(|(name, _)| is_reached(name)) {
            writeln!(f, "    {name}: {answer}")?;
        }
        if self.check != Answer::Done {
            return writeln!(f, "    check: {}", self.check);
        }
        let found: Vec<_> = self
            .found
            .iter()
            .take(SHOWN)
            .map(|(kind, first, times)| format!("{times} {kind}, the first: {first}"))
            .collect();
        let more = self.found.len().saturating_sub(SHOWN);
        let more = if more > 0 { format!("; {more} other kinds") } else { String::new() };
        let found = if found.is_empty() { "clean".into() } else { found.join("; ") };
        writeln!(f, "    check: {found}{more}")
    }
}
