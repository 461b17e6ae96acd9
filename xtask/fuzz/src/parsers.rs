//! The parsers of the format, each with bytes that are almost right: the header with its extensions, the
//! snapshot table, the bitmap directory, entries of L1 and L2 tables, and refcounts.
//!
//! Beside panics: what is accepted keeps to the caps, and what was decoded and encoded again is the same.

use blockmirror_block::testing::{MemoryStorage, Rng};
use blockmirror_qcow2::format::bitmaps::Bitmaps;
use blockmirror_qcow2::format::entry::{Entry, EntryFormat, L1Entry};
use blockmirror_qcow2::format::refcount::RefcountWidth;
use blockmirror_qcow2::format::snapshot::Snapshots;
use blockmirror_qcow2::limits;
use blockmirror_qcow2::offset::{ClusterSize, GuestOffset};
use blockmirror_qcow2::{Header, OpenOptions};
use blockmirror_testing::Outcome;
use xtask_fuzz::corpus::Corpus;

use crate::edges;
use crate::pool::Pool;
use crate::run::{Target, Verdict, save};

/// Bytes of a header, with its extensions and names, that are changed.
const HEADER: usize = 1024;
/// Bytes of a directory that are changed.
const DIRECTORY: usize = 512;
/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 8] = [0, 1, 511, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 63, u64::MAX];

/// A parser.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parser {
    Header,
    Snapshots,
    Bitmaps,
    Entries,
    Refcounts,
}

impl Parser {
    const ALL: [Self; 5] = [Self::Header, Self::Snapshots, Self::Bitmaps, Self::Entries, Self::Refcounts];
}

/// What the parsers of one thread are given.
pub(crate) struct Parsers<'a> {
    seeds: &'a Seeds,
    pools: [Pool<Vec<u8>>; Parser::ALL.len()],
}

/// Sound input of each parser.
pub(crate) struct Seeds {
    inputs: [Vec<Vec<u8>>; Parser::ALL.len()],
    /// A header with snapshots and bitmaps, whose directories lie at the start of a file.
    header: Header,
}

impl Seeds {
    pub(crate) fn of(corpus: &Corpus) -> Outcome<Self> {
        let mut inputs: [Vec<Vec<u8>>; Parser::ALL.len()] = Default::default();
        let mut any = None;
        for image in corpus.images() {
            let header = Header::parse(image)?;
            let part = |at: u64| {
                let start = usize::try_from(at).unwrap_or(0).min(image.len());
                image[start..(start + DIRECTORY).min(image.len())].to_vec()
            };
            inputs[Parser::Header as usize].push(image[..HEADER.min(image.len())].to_vec());
            if header.snapshot_count > 0 {
                inputs[Parser::Snapshots as usize].push(part(header.snapshots_offset));
            }
            if let Some(bitmaps) = &header.bitmaps {
                inputs[Parser::Bitmaps as usize].push(part(bitmaps.directory_offset));
                any = Some(header.clone());
            }
            inputs[Parser::Entries as usize].push(part(header.l1_offset));
            inputs[Parser::Refcounts as usize].push(part(header.refcount_table_offset));
        }
        let mut header = any.ok_or("no image has bitmaps")?;
        (header.snapshots_offset, header.snapshot_count) = (0, 4);
        if let Some(bitmaps) = &mut header.bitmaps {
            (bitmaps.directory_offset, bitmaps.directory_size, bitmaps.count) = (0, DIRECTORY as u64, 4);
        }
        Ok(Self { inputs, header })
    }
}

impl<'a> Parsers<'a> {
    pub(crate) fn new(seeds: &'a Seeds) -> Self {
        Self { seeds, pools: std::array::from_fn(|_| Pool::new()) }
    }
}

impl Target for Parsers<'_> {
    fn run(&mut self, rng: &mut Rng) -> Outcome<Verdict> {
        let parser = rng.pick(&Parser::ALL);
        let (seeds, pool) = (&self.seeds.inputs[parser as usize], &mut self.pools[parser as usize]);
        let mut input = match pool.pick(rng) {
            Some(kept) if rng.chance(75) => kept.clone(),
            _ => rng.pick(seeds),
        };
        let honest = rng.one_in(50) && seeds.contains(&input);
        if !honest {
            change(rng, &mut input);
        }
        edges::clear();
        let header = &self.seeds.header;
        let parse = || parse(parser, header, &input);
        let parsed = std::panic::catch_unwind(parse).unwrap_or_else(|_| Err("a panic".into()));
        let accepted =
            parsed.map_err(|why| format!("{parser:?}: {why}; the input is {}", save(&input, "bin")))?;
        if pool.is_new() {
            let len = input.len();
            pool.keep(input, len, rng);
        }
        Ok(Verdict { honest, accepted })
    }

    fn reached(&self) -> (usize, usize) {
        let edges = self.pools.iter().map(Pool::edges).sum();
        (edges, self.pools.iter().map(Pool::len).sum())
    }
}

/// Changes up to four places.
fn change(rng: &mut Rng, bytes: &mut Vec<u8>) {
    for _ in 0..rng.range(1, 4) {
        let at = rng.index(bytes.len());
        match rng.below(8) {
            0 => bytes.truncate(at),
            1..=3 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = if rng.chance(50) { *byte ^ 1 << rng.below(8) } else { rng.next() as u8 };
                }
            }
            _ => {
                let width = rng.pick(&[2, 4, 8]);
                let number = rng.pick(&EDGES).wrapping_add(rng.below(3)).to_be_bytes();
                let at = at / width * width;
                if let Some(field) = bytes.get_mut(at..at + width) {
                    field.copy_from_slice(&number[8 - width..]);
                }
            }
        }
    }
}

/// Whether `input` is accepted. An error says what did not hold.
fn parse(parser: Parser, header: &Header, input: &[u8]) -> Result<bool, String> {
    match parser {
        Parser::Header => parse_header(input),
        Parser::Snapshots => {
            let storage = MemoryStorage::with_contents(input);
            let snapshots = Snapshots::new(&storage, header).map_err(|e| e.to_string())?;
            Ok(snapshots.map(|entry| entry.is_ok()).fold(true, |all, one| all & one))
        }
        Parser::Bitmaps => {
            let mut extension = header.bitmaps.ok_or("no bitmaps")?;
            extension.directory_size = input.len() as u64;
            let storage = MemoryStorage::with_contents(input);
            let bitmaps = Bitmaps::new(&storage, &extension).map_err(|e| e.to_string())?;
            Ok(bitmaps.map(|entry| entry.is_ok()).fold(true, |all, one| all & one))
        }
        Parser::Entries => parse_entries(input),
        Parser::Refcounts => parse_refcounts(input),
    }
}

fn parse_header(input: &[u8]) -> Result<bool, String> {
    let Ok(header) = Header::parse(input) else { return Ok(false) };
    let table_bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
    let keeps_caps = (9..=21).contains(&header.cluster_bits)
        && u64::from(header.l1_entries) * 8 <= limits::MAX_L1_BYTES
        && table_bytes <= limits::MAX_REFCOUNT_TABLE_BYTES
        && header.snapshot_count <= limits::MAX_SNAPSHOTS
        && header.refcount_order <= limits::MAX_REFCOUNT_ORDER
        && header.l1_offset <= limits::MAX_HOST_OFFSET
        && header.bitmaps.is_none_or(|b| b.directory_size <= limits::MAX_BITMAP_DIRECTORY_BYTES);
    if !keeps_caps {
        return Err(format!("past a cap: {header:?}"));
    }
    // The file has nothing but its header: an L1 table is missing, or empty.
    let storage = std::sync::Arc::new(MemoryStorage::with_contents(input));
    let _ = OpenOptions::new().cache_bytes(0).open(storage);
    Ok(true)
}

fn words(input: &[u8]) -> impl Iterator<Item = u64> {
    input.chunks_exact(8).map(|word| word.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

fn parse_entries(input: &[u8]) -> Result<bool, String> {
    let mut all = true;
    let mut before = 0;
    for (word, index) in words(input).zip(0_u32..) {
        let _ = L1Entry(word).table();
        // Each word in another of the layouts that there are.
        let format = EntryFormat {
            cluster: ClusterSize::from_bits(9 + index % 13).ok_or("no cluster size")?,
            extended: index % 2 == 1,
            has_zero: index % 3 != 0,
            external_data: index % 5 == 0,
        };
        let guest = GuestOffset(u64::from(index) * format.cluster.bytes());
        match format.decode(word, before, guest) {
            Ok(Entry::Plain(mut plain)) => {
                // A flag of nothing.
                plain.copied &= plain.host.is_some();
                let (word0, word1) = format.encode(plain);
                if format.decode(word0, word1, guest) != Ok(Entry::Plain(plain)) {
                    return Err(format!(
                        "{word:#x} {before:#x} is {plain:?}, which is {word0:#x} {word1:#x}"
                    ));
                }
            }
            Ok(Entry::Compressed(run)) => {
                if run.len == 0 || run.len > 2 * format.cluster.bytes() + 512 {
                    return Err(format!("{word:#x}: a compressed run of {} bytes", run.len));
                }
            }
            Err(_) => all = false,
        }
        before = word;
    }
    Ok(all)
}

fn parse_refcounts(input: &[u8]) -> Result<bool, String> {
    let mut block = input.to_vec();
    for order in 0..=limits::MAX_REFCOUNT_ORDER {
        let width = RefcountWidth::from_order(order).ok_or("no such width")?;
        for index in 0..width.entries(input.len() as u64) as usize {
            let count = width.get(&block, index);
            width.set(&mut block, index, width.max() - count);
            width.set(&mut block, index, count);
        }
    }
    if block != input { Err("refcounts that were set and set back".into()) } else { Ok(!input.is_empty()) }
}
