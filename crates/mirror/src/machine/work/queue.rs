//! Queue of scanned extents that wait for their operation, by where they lie on the disk.
//!
//! They are taken in the order of an elevator: from the cursor to the end, then from the start again. Guest
//! writes to the target cut pieces out of the queue, so a look-up must stay cheap with many pieces. Must
//! hold: extents do not overlap (all are in progress), and none is empty.

use blockmirror_block::ByteRange;

use super::QueuedExtent;
use crate::range_map::RangeMap;
use crate::scan::CopyAction;

/// What is known of a queued extent besides its range.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    pub(super) action: CopyAction,
    tries: u32,
    first_pass: bool,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Queue {
    extents: RangeMap<Answer>,
    /// Where the next one is looked for.
    cursor: u64,
    /// Bytes of them that have to be read.
    copy: u64,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.extents.len()
    }

    /// Bytes that have to be read.
    pub(super) fn copy_bytes(&self) -> u64 {
        self.copy
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = QueuedExtent> {
        self.extents.iter().map(extent)
    }

    /// What is known of all of them, to change it; not what they need.
    pub(super) fn answers_mut(&mut self) -> impl Iterator<Item = &mut Answer> {
        self.extents.values_mut()
    }

    pub(super) fn push(&mut self, queued: QueuedExtent) {
        let QueuedExtent { range, action, tries, first_pass } = queued;
        self.copy += to_read(range, action);
        self.extents.insert(range, Answer { action, tries, first_pass });
    }

    /// The next extent.
    pub(super) fn front(&self) -> Option<QueuedExtent> {
        self.extents.first_from(self.cursor).or_else(|| self.extents.first_from(0)).map(extent)
    }

    /// What lies in `range` comes next, if anything does.
    pub(super) fn turn_to(&mut self, range: ByteRange) {
        if let Some((queued, _)) = self.extents.first_overlap(range) {
            self.cursor = queued.start();
        }
    }

    /// Takes `range` out, the start of an extent, and goes on behind it.
    pub(super) fn begin(&mut self, range: ByteRange) {
        self.cut(range, |_| {});
        self.cursor = range.end();
    }

    /// Takes out what lies in `range`; hands each piece to `each`.
    pub(super) fn cut(&mut self, range: ByteRange, mut each: impl FnMut(ByteRange)) {
        let Self { extents, copy, .. } = self;
        extents.cut(range, |piece, answer| {
            *copy -= to_read(piece, answer.action);
            each(piece);
        });
    }

    /// Takes all of them out, in order.
    pub(super) fn take_all(&mut self) -> Vec<QueuedExtent> {
        self.copy = 0;
        std::mem::take(&mut self.extents).iter().map(extent).collect()
    }
}

fn extent((range, answer): (ByteRange, &Answer)) -> QueuedExtent {
    let Answer { action, tries, first_pass } = *answer;
    QueuedExtent { range, action, tries, first_pass }
}

fn to_read(range: ByteRange, action: CopyAction) -> u64 {
    if matches!(action, CopyAction::Copy { .. }) { range.len() } else { 0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn queued(start: u64, end: u64, action: CopyAction) -> QueuedExtent {
        QueuedExtent { range: ByteRange::new(start, end), action, tries: 0, first_pass: false }
    }

    #[test]
    fn the_turn_goes_round_the_disk_and_to_what_is_wanted() {
        let mut queue = Queue::default();
        for at in [30, 0, 10] {
            queue.push(queued(at, at + 10, CopyAction::Copy { target_zero: false }));
        }
        let mut order = Vec::new();
        let mut next = |queue: &mut Queue, len| {
            let front = queue.front().unwrap().range;
            queue.begin(ByteRange::at(front.start(), len));
            order.push(front.start());
        };
        next(&mut queue, 10);
        next(&mut queue, 4);
        queue.turn_to(ByteRange::at(35, 1));
        next(&mut queue, 10);
        next(&mut queue, 6);
        assert_eq!(order, [0, 10, 30, 14]);
        assert!(queue.len() == 0 && queue.front().is_none() && queue.copy_bytes() == 0);
    }

    proptest! {
        #[test]
        fn what_is_cut_is_gone_and_the_rest_is_kept(
            lens in prop::collection::vec((1u64..9, any::<bool>(), any::<bool>()), 1..12),
            cuts in prop::collection::vec((0u64..80, 0u64..12), 0..12),
        ) {
            let mut queue = Queue::default();
            let mut model = [None; 128];
            let mut at = 0;
            for (len, there, copy) in lens {
                let action = if copy { CopyAction::Copy { target_zero: false } } else { CopyAction::Zero };
                if there {
                    queue.push(queued(at, at + len, action));
                    model[at as usize..(at + len) as usize].fill(Some(action));
                }
                at += len;
            }
            for (start, len) in cuts {
                let range = ByteRange::at(start, len);
                let mut bytes = 0;
                queue.cut(range, |part| bytes += part.len());
                let there = model[start as usize..(start + len) as usize].iter().flatten().count();
                prop_assert_eq!(bytes, there as u64);
                model[start as usize..(start + len) as usize].fill(None);
                let is_copy = |action: &&_| matches!(action, Some(CopyAction::Copy { .. }));
                let copy = model.iter().filter(is_copy).count();
                prop_assert_eq!(queue.copy_bytes(), copy as u64);
                let mut seen = [None; 128];
                for queued in queue.iter() {
                    prop_assert!(!queued.range.is_empty());
                    let range = queued.range.start() as usize..queued.range.end() as usize;
                    seen[range].fill(Some(queued.action));
                }
                prop_assert_eq!(&seen[..], &model[..]);
            }
        }
    }
}
