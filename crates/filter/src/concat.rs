//! Several disks as one, end to end: the sources of `convert A B TARGET`.
//!
//! It is read only. Each part keeps its own length and its own gaps; where two parts meet an extent may go
//! on.

use std::sync::Arc;

use blockmirror_block::{
    Backing, BlockDevice, ByteRange, Error, ErrorKind, Extent, ExtentMerger, Geometry, Result, Visit,
    WriteFlags, ZeroFlags,
};

/// Disks behind each other, for reading.
#[derive(Debug)]
pub struct Concat {
    name: Arc<str>,
    parts: Vec<Part>,
    len: u64,
}

#[derive(Debug)]
struct Part {
    device: Arc<dyn BlockDevice>,
    /// Where it lies in the whole.
    range: ByteRange,
}

impl Concat {
    /// Puts `devices` behind each other, in order. Their lengths do not change from now on.
    ///
    /// # Errors
    /// [`ErrorKind::LimitExceeded`] if they are longer together than a disk can be.
    pub fn new(devices: impl IntoIterator<Item = Arc<dyn BlockDevice>>) -> Result<Self> {
        let mut parts: Vec<Part> = Vec::new();
        let mut len = 0_u64;
        for device in devices {
            let end = len.checked_add(device.len()).filter(|end| i64::try_from(*end).is_ok());
            let Some(end) = end else {
                return Err(Error::new(ErrorKind::LimitExceeded, "open")
                    .in_file(device.name())
                    .because("with the disks before it, it is longer than a disk can be"));
            };
            parts.push(Part { device, range: ByteRange::new(len, end) });
            len = end;
        }
        let name = match &*parts {
            [] => Arc::from("nothing"),
            [only] => Arc::from(only.device.name()),
            [first, rest @ ..] => Arc::from(format!("{} and {} more", first.device.name(), rest.len())),
        };
        Ok(Self { name, parts, len })
    }

    fn check(&self, offset: u64, len: u64, operation: &'static str) -> Result<ByteRange> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(ByteRange::new(offset, end)),
            _ => Err(Error::out_of_bounds(operation, offset, len, self.len).in_file(Arc::clone(&self.name))),
        }
    }

    /// The parts that `range` touches, each with what it has of it.
    fn parts_in(&self, range: ByteRange) -> impl Iterator<Item = (&Part, ByteRange)> {
        let first = self.parts.partition_point(|part| part.range.end() <= range.start());
        let touched = self.parts.get(first..).unwrap_or_default().iter();
        touched
            .take_while(move |part| part.range.start() < range.end())
            .map(move |part| (part, part.range.intersect(range)))
            .filter(|(_, shared)| !shared.is_empty())
    }

    fn read_only(&self, operation: &'static str) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, operation).in_file(Arc::clone(&self.name)))
    }
}

/// The more of a disk may come from below, the higher.
fn rank(backing: Backing) -> u8 {
    match backing {
        Backing::Possible => 1,
        Backing::Attached => 2,
        Backing::Remote { .. } => 3,
        Backing::Hidden => 4,
        // None; what else there may be one day is at least not unknown.
        _ => 0,
    }
}

impl BlockDevice for Concat {
    fn len(&self) -> u64 {
        self.len
    }

    fn name(&self) -> &str {
        &self.name
    }

    /// That of a plain disk that suits all parts.
    fn geometry(&self) -> Geometry {
        let mut all = Geometry::plain();
        all.writable = false;
        for part in &self.parts {
            let one = part.device.geometry();
            all.request_alignment = all.request_alignment.max(one.request_alignment);
            all.forgetful |= one.forgetful;
            if rank(one.backing) > rank(all.backing) {
                all.backing = one.backing;
            }
        }
        all
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = self.check(offset, buf.len() as u64, "read")?;
        let mut rest = buf;
        for (part, shared) in self.parts_in(range) {
            // A piece of the buffer's range.
            let (now, later) = rest.split_at_mut(shared.len() as usize);
            part.device.read_at(now, shared.start() - part.range.start())?;
            rest = later;
        }
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64, _: WriteFlags) -> Result<()> {
        self.read_only("write")
    }

    fn write_zeroes(&self, _: ByteRange, _: ZeroFlags) -> Result<()> {
        self.read_only("write zeroes")
    }

    fn discard(&self, _: ByteRange) -> Result<()> {
        self.read_only("discard")
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        let range = self.check(range.start(), range.len(), "map")?;
        let mut merger = ExtentMerger::default();
        for (part, shared) in self.parts_in(range) {
            let start = part.range.start();
            let inside = ByteRange::new(shared.start() - start, shared.end() - start);
            let mut stopped = false;
            part.device.extents(inside, &mut |mut extent| {
                extent.range = ByteRange::at(start + extent.range.start(), extent.range.len());
                let answer = merger.push(extent, visit);
                stopped = answer.is_break();
                answer
            })?;
            if stopped {
                return Ok(());
            }
        }
        let _ = merger.finish(visit);
        Ok(())
    }

    fn cancel_in_flight(&self) {
        self.parts.iter().for_each(|part| part.device.cancel_in_flight());
    }
}

#[cfg(test)]
mod tests {
    use blockmirror_block::ExtentKind;
    use blockmirror_block::testing::MemoryDisk;
    use proptest::prelude::*;

    use super::*;

    fn disk(bytes: &[u8]) -> Arc<dyn BlockDevice> {
        let disk = MemoryDisk::new(bytes.len() as u64);
        for (at, run) in bytes.chunk_by(|a, b| (*a == 0) == (*b == 0)).scan(0, |at, run| {
            let start = *at;
            *at += run.len();
            Some((start, run))
        }) {
            if run[0] != 0 {
                disk.write_at(run, at as u64, WriteFlags::NONE).unwrap();
            }
        }
        Arc::new(disk)
    }

    fn extents(disk: &dyn BlockDevice, range: ByteRange) -> Vec<(ByteRange, ExtentKind)> {
        let mut seen = Vec::new();
        disk.extents(range, &mut |extent| {
            seen.push((extent.range, extent.kind));
            Visit::Continue(())
        })
        .unwrap();
        seen
    }

    /// Parts of any length, none included, with zeros and data.
    fn parts() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let run = (prop_oneof![Just(0_u8), 1..=9_u8], 1..1500_usize);
        let part = prop::collection::vec(run, 0..6).prop_map(|runs| {
            runs.into_iter().flat_map(|(byte, len)| std::iter::repeat_n(byte, len)).collect()
        });
        prop::collection::vec(part, 1..6)
    }

    proptest! {
        #[test]
        fn it_is_one_flat_disk(parts in parts(), cuts in (0..20_000_u64, 0..20_000_u64), spare in 1..1000_u64) {
            let flat: Vec<u8> = parts.concat();
            let disks: Vec<_> = parts.iter().map(|part| disk(part)).collect();
            // What each disk says of each of its bytes.
            let kinds: Vec<ExtentKind> = disks
                .iter()
                .flat_map(|disk| extents(&**disk, ByteRange::new(0, disk.len())))
                .flat_map(|(run, kind)| std::iter::repeat_n(kind, run.len() as usize))
                .collect();
            let whole = Concat::new(disks).unwrap();
            let len = flat.len() as u64;
            prop_assert_eq!(whole.len(), len);
            let (a, b) = (cuts.0.min(len), cuts.1.min(len));
            let range = ByteRange::new(a.min(b), a.max(b));
            let mut read = vec![7; range.len() as usize];
            whole.read_at(&mut read, range.start()).unwrap();
            prop_assert_eq!(&read, &flat[range.start() as usize..range.end() as usize]);
            // Each byte has its kind, and neighbours differ across the borders of parts too.
            let seen = extents(&whole, range);
            let mut at = range.start();
            for (i, (run, kind)) in seen.iter().enumerate() {
                prop_assert_eq!(run.start(), at);
                prop_assert!(!run.is_empty());
                prop_assert!(i == 0 || seen[i - 1].1 != *kind, "{:?}", seen);
                let there = &kinds[run.start() as usize..run.end() as usize];
                prop_assert!(there.iter().all(|each| each == kind), "{:?}", seen);
                at = run.end();
            }
            prop_assert_eq!(at, range.end());
            // Past the end nothing is touched.
            let mut past = vec![7; spare as usize];
            for offset in [len, len.saturating_sub(spare - 1), u64::MAX] {
                let error = whole.read_at(&mut past, offset).unwrap_err();
                prop_assert_eq!(error.kind(), ErrorKind::OutOfBounds);
                prop_assert!(past.iter().all(|byte| *byte == 7));
            }
        }
    }

    #[test]
    fn a_visitor_that_stops_is_not_asked_again() {
        let whole = Concat::new([disk(&[1; 512]), disk(&[0; 512]), disk(&[1; 512])]).unwrap();
        let mut asked = 0;
        whole
            .extents(ByteRange::new(0, 1536), &mut |_| {
                asked += 1;
                Visit::Break(())
            })
            .unwrap();
        assert_eq!(asked, 1);
    }

    #[test]
    fn it_takes_no_writes_and_keeps_to_its_limit() {
        let whole = Concat::new([disk(&[1; 512]), disk(&[2; 512])]).unwrap();
        assert!(!whole.geometry().writable);
        assert_eq!(whole.write_at(&[0; 4], 0, WriteFlags::NONE).unwrap_err().kind(), ErrorKind::ReadOnly);
        let all = ByteRange::new(0, 1024);
        assert_eq!(whole.write_zeroes(all, ZeroFlags::NONE).unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(whole.discard(all).unwrap_err().kind(), ErrorKind::ReadOnly);
        let half: Arc<dyn BlockDevice> = Arc::new(crate::NullDisk::new(1 << 62));
        assert_eq!(Concat::new([Arc::clone(&half)]).unwrap().len(), 1 << 62);
        assert_eq!(Concat::new([Arc::clone(&half), half]).unwrap_err().kind(), ErrorKind::LimitExceeded);
        assert!(Concat::new([]).unwrap().is_empty());
    }
}
