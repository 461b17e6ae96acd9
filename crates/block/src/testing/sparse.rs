//! Bytes in memory, most of which may be absent.
//!
//! The contents of all doubles. Pages are shared between copies until written, so that a thousand images of
//! one crash test cost little more than one. Must hold: no byte past the length is other than zero.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::{ByteRange, StorageExtent, Visit};

const PAGE: usize = 4096;

type Page = [u8; PAGE];

#[derive(Clone, Debug, Default)]
pub(crate) struct SparseBytes {
    pages: BTreeMap<u64, Arc<Page>>,
    len: u64,
}

impl SparseBytes {
    /// `len` bytes, none of them present.
    pub(crate) fn new(len: u64) -> Self {
        Self { pages: BTreeMap::new(), len }
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes in pages that are present.
    pub(crate) fn present(&self) -> u64 {
        (self.pages.len() * PAGE) as u64
    }

    /// Grows with absent bytes, or shrinks.
    pub(crate) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(ByteRange::new(len, self.len));
        }
        self.len = len;
    }

    /// Fills `buf` from `offset`, with zeros where nothing is.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) {
        for piece in pieces(offset, buf.len()) {
            match self.pages.get(&piece.page) {
                Some(page) => buf[piece.outer].copy_from_slice(&page[piece.inner]),
                None => buf[piece.outer].fill(0),
            }
        }
    }

    /// Writes `buf` at `offset`, growing as needed. The end must lie inside the 64-bit space.
    pub(crate) fn write(&mut self, buf: &[u8], offset: u64) {
        for piece in pieces(offset, buf.len()) {
            let page = self.pages.entry(piece.page).or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[piece.inner].copy_from_slice(&buf[piece.outer]);
        }
        self.len = self.len.max(offset + buf.len() as u64);
    }

    /// Makes `range` zero without growing. Pages that it covers become absent.
    pub(crate) fn zero(&mut self, range: ByteRange) {
        let unit = PAGE as u64;
        let inner = range.align_inward(unit);
        if inner.is_empty() {
            self.zero_present(range);
            return;
        }
        self.zero_present(ByteRange::new(range.start(), inner.start()));
        self.zero_present(ByteRange::new(inner.end(), range.end()));
        let gone: Vec<u64> =
            self.pages.range(inner.start() / unit..inner.end() / unit).map(|(index, _)| *index).collect();
        for index in gone {
            self.pages.remove(&index);
        }
    }

    /// Writes zeros into the pages of `range` that are present.
    fn zero_present(&mut self, range: ByteRange) {
        for piece in range.pieces(PAGE as u64) {
            let page = piece.start() / PAGE as u64;
            if let Some(bytes) = self.pages.get_mut(&page) {
                let start = (piece.start() % PAGE as u64) as usize;
                Arc::make_mut(bytes)[start..start + piece.len() as usize].fill(0);
            }
        }
    }

    /// Holes and data of `range`, clipped to the length.
    pub(crate) fn extents(&self, range: ByteRange) -> Vec<StorageExtent> {
        let range = range.intersect(ByteRange::new(0, self.len));
        let mut out: Vec<StorageExtent> = Vec::new();
        let mut push = |part: ByteRange, hole: bool| match out.last_mut() {
            _ if part.is_empty() => {}
            Some(last) if last.hole == hole => last.range = ByteRange::new(last.range.start(), part.end()),
            _ => out.push(StorageExtent { range: part, hole }),
        };
        let mut at = range.start();
        let touched = range.align_outward(PAGE as u64);
        for (index, _) in self.pages.range(touched.start() / PAGE as u64..touched.end() / PAGE as u64) {
            let page = ByteRange::at(index * PAGE as u64, PAGE as u64).intersect(range);
            push(ByteRange::new(at, page.start()), true);
            push(page, false);
            at = page.end();
        }
        push(ByteRange::new(at, range.end()), true);
        out
    }

    /// [`extents`](Self::extents) for a visitor.
    pub(crate) fn visit(extents: Vec<StorageExtent>, visit: &mut dyn FnMut(StorageExtent) -> Visit) {
        for extent in extents {
            if visit(extent).is_break() {
                return;
            }
        }
    }

    /// All bytes.
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; usize::try_from(self.len).unwrap_or(usize::MAX)];
        self.read(&mut out, 0);
        out
    }
}

/// The part of a request that lies in one page.
struct Piece {
    page: u64,
    /// Where it is in the page.
    inner: Range<usize>,
    /// Where it is in the caller's buffer.
    outer: Range<usize>,
}

fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset.checked_add(done as u64)?;
        let start = (at % PAGE as u64) as usize;
        let n = (PAGE - start).min(len - done);
        let outer = done..done + n;
        done += n;
        Some(Piece { page: at / PAGE as u64, inner: start..start + n, outer })
    })
}
