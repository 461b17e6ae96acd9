//! References to host clusters, as the checker counts them.
//!
//! Sparse and compact: two bytes a cluster, in pages that exist only where something was counted, so that
//! memory follows what the image uses and not what it declares. A page with a count that two bytes cannot
//! hold is widened.

use std::ops::Range;

/// Clusters of a page.
pub(super) const PAGE: u64 = 1024;

/// An active entry with, or without, the COPIED flag maps the cluster.
pub(super) const COPIED: u8 = 1;
pub(super) const NOT_COPIED: u8 = 2;

const NARROW_MAX: u64 = (1 << 14) - 1;
const WIDE_MAX: u64 = (1 << 62) - 1;

/// The two highest bits of an element are flags, the rest is the count.
#[derive(Debug)]
enum Page {
    Narrow(Box<[u16]>),
    Wide(Box<[u64]>),
}

impl Page {
    fn get(&self, index: usize) -> (u64, u8) {
        // The flags are the two highest bits.
        match self {
            Self::Narrow(page) => (u64::from(page[index]) & NARROW_MAX, (page[index] >> 14) as u8),
            Self::Wide(page) => (page[index] & WIDE_MAX, (page[index] >> 62) as u8),
        }
    }

    fn set(&mut self, index: usize, count: u64, flags: u8) {
        if count > NARROW_MAX {
            self.widen();
        }
        match self {
            // The count is at most 14 bits here, else the page is wide.
            Self::Narrow(page) => page[index] = count as u16 | u16::from(flags) << 14,
            Self::Wide(page) => page[index] = count.min(WIDE_MAX) | u64::from(flags) << 62,
        }
    }

    fn widen(&mut self) {
        if let Self::Narrow(page) = self {
            let wide = page.iter().map(|e| u64::from(*e) & NARROW_MAX | u64::from(e >> 14) << 62);
            *self = Self::Wide(wide.collect());
        }
    }
}

/// How often each cluster of a file is referred to.
#[derive(Debug)]
pub(crate) struct Counts {
    pages: Vec<Option<Page>>,
    /// What a refcount of the image can say. References beyond it are counted all the same.
    max: u64,
    /// A cluster has references beyond it.
    is_beyond: bool,
    /// One past the last cluster that was counted.
    end: u64,
}

impl Counts {
    /// For a file of `clusters` clusters, whose refcounts say `max` at most.
    pub(super) fn new(clusters: u64, max: u64) -> Self {
        // At most 2^21 pages: the checker refuses longer files. One more, as a file may end inside the
        // cluster behind its last whole one.
        let pages = (clusters / PAGE + 1) as usize;
        Self { pages: std::iter::repeat_with(|| None).take(pages).collect(), max, is_beyond: false, end: 0 }
    }

    /// Adds `by` references with `flags` to `cluster`; returns how many of them its refcount cannot say.
    pub(super) fn add(&mut self, cluster: u64, by: u64, flags: u8) -> u64 {
        let at = usize::try_from(cluster / PAGE).unwrap_or(usize::MAX);
        let Some(page) = self.pages.get_mut(at) else { return 0 };
        let page = page.get_or_insert_with(|| Page::Narrow(vec![0; PAGE as usize].into()));
        // Below PAGE.
        let index = (cluster % PAGE) as usize;
        let (count, before) = page.get(index);
        let sum = count.saturating_add(by);
        page.set(index, sum, before | flags);
        self.end = self.end.max(cluster + 1);
        self.is_beyond |= sum > self.max;
        sum.max(self.max) - count.max(self.max)
    }

    /// Counts `clusters`, which may lie behind the end of the file, once each.
    pub(crate) fn reserve(&mut self, clusters: Range<u64>) {
        let pages = (clusters.end / PAGE + 1) as usize;
        if pages > self.pages.len() {
            self.pages.resize_with(pages, || None);
        }
        for cluster in clusters {
            self.add(cluster, 1, 0);
        }
    }

    /// The references to `cluster`.
    pub(crate) fn get(&self, cluster: u64) -> u64 {
        self.get_flagged(cluster).0
    }

    /// What the refcount of `cluster` should be: the references, as far as it can say them.
    pub(crate) fn refcount(&self, cluster: u64) -> u64 {
        self.get(cluster).min(self.max)
    }

    /// What the refcount of `cluster` should be, and the flags that they had.
    pub(super) fn refcount_flagged(&self, cluster: u64) -> (u64, u8) {
        let (count, flags) = self.get_flagged(cluster);
        (count.min(self.max), flags)
    }

    fn get_flagged(&self, cluster: u64) -> (u64, u8) {
        let page = usize::try_from(cluster / PAGE).ok().and_then(|at| self.pages.get(at)?.as_ref());
        page.map_or((0, 0), |page| page.get((cluster % PAGE) as usize))
    }

    /// Whether something is counted in the page of `cluster`.
    pub(crate) fn has_page(&self, cluster: u64) -> bool {
        usize::try_from(cluster / PAGE).is_ok_and(|at| self.pages.get(at).is_some_and(Option::is_some))
    }

    /// Whether any of the clusters `first..last` is referred to.
    pub(crate) fn any(&self, first: u64, last: u64) -> bool {
        let mut cluster = first;
        while cluster < last.min(self.end) {
            let page_end = ((cluster / PAGE + 1) * PAGE).min(last);
            if self.has_page(cluster) && (cluster..page_end).any(|cluster| self.get(cluster) > 0) {
                return true;
            }
            cluster = page_end;
        }
        false
    }

    /// Whether a refcount could not say how many references its cluster has, were there fewer by what
    /// `leaving` says.
    pub(super) fn any_beyond(&self, leaving: impl Fn(u64) -> u64) -> bool {
        self.is_beyond
            && (0..self.end).any(|cluster| {
                let count = self.get(cluster);
                count > self.max && count.saturating_sub(leaving(cluster)) > self.max
            })
    }

    /// One past the last cluster that was counted.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_beyond_what_refcounts_say() {
        let mut counts = Counts::new(5000, 70_000);
        assert_eq!(counts.add(3, 1, COPIED), 0);
        assert_eq!(counts.add(3, 2, NOT_COPIED), 0);
        assert_eq!(counts.get_flagged(3), (3, COPIED | NOT_COPIED));
        assert_eq!(counts.add(4, 16_383, 0), 0);
        assert_eq!(counts.add(4, 50_000, COPIED), 0);
        assert_eq!((counts.get_flagged(4), counts.get(3)), ((66_383, COPIED), 3), "a wide page");
        assert_eq!(counts.add(4, 10_000, 0), 6_383);
        assert_eq!(counts.add(4, 1, 0), 1);
        assert_eq!((counts.get(4), counts.refcount(4)), (76_384, 70_000));
        assert_eq!(counts.refcount_flagged(4), (70_000, COPIED));
        assert_eq!(counts.end(), 5);
        assert!(counts.has_page(0) && !counts.has_page(2048));
        assert_eq!((counts.get(4999), counts.get(1 << 60)), (0, 0));
    }
}
