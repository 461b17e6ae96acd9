//! Operations that carry no data: how many, how long, and what waits for them.

use super::*;
use crate::machine::Admission;
use crate::options::CopyMode;

const G: u64 = 1 << 30;

/// A device that zeroes one range after the other at so many bytes a second.
struct Disk {
    rate: u64,
    free_at: Duration,
    under_way: Vec<(Duration, Action)>,
}

impl Disk {
    fn new(rate: u64) -> Self {
        Self { rate, free_at: Duration::ZERO, under_way: Vec::new() }
    }

    /// Begins all that the core wants done.
    fn begin(&mut self, core: &mut Core, now: Duration) {
        while let Next::Do(action) = core.next(now) {
            let bytes = match action.work {
                Work::Zero { range, .. } => range.len(),
                _ => 0,
            };
            let takes = Duration::from_micros(bytes.saturating_mul(1_000_000) / self.rate);
            self.free_at = self.free_at.max(now) + takes;
            let ends = if bytes == 0 { now } else { self.free_at };
            self.under_way.push((ends, action));
        }
    }

    /// Ends the one that ends first.
    fn end(&mut self, core: &mut Core, now: &mut Duration) -> Option<Work> {
        let first = self.under_way.iter().enumerate().min_by_key(|(_, (ends, _))| *ends)?.0;
        let (ends, action) = self.under_way.remove(first);
        *now = (*now).max(ends);
        core.on_completion(
            *now,
            action.id,
            Ok(scanned_as_zero(action.work).unwrap_or_else(|| honest(action.work))),
        );
        Some(action.work)
    }

    /// How long a cancel would wait now.
    fn busy(&self, now: Duration) -> Duration {
        let last = self.under_way.iter().map(|(ends, _)| *ends).max();
        last.unwrap_or_default().saturating_sub(now)
    }
}

/// The buffer's size cut zeroing into pieces of 512 KiB: 204,800 for 100 GiB.
#[test]
fn a_fast_device_zeroes_100_gib_in_a_few_hundred_calls_and_the_speed_limit_is_not_theirs() {
    let mut core = core(100 * G, MirrorOptions::new().speed(1 << 20));
    let (mut disk, mut now, mut calls) = (Disk::new(1 << 40), Duration::ZERO, 0);
    loop {
        disk.begin(&mut core, now);
        match disk.end(&mut core, &mut now) {
            Some(Work::Zero { range, .. }) => {
                calls += 1;
                assert!(range.start() % range.len().next_power_of_two().min(G) == 0, "{range}");
            }
            Some(_) => {}
            None => break,
        }
    }
    assert!(core.take_result().unwrap().is_ok());
    assert!(calls < 1000, "{calls}");
    assert!(now < Duration::from_secs(10), "a limit of 1 MiB a second delayed it: {now:?}");
}

#[test]
fn a_slow_device_is_never_busy_for_a_second_with_what_was_begun() {
    let mut core = core(100 * G, MirrorOptions::new());
    let (mut disk, mut now, mut longest) = (Disk::new(200 * M), Duration::ZERO, Duration::ZERO);
    for _ in 0..2000 {
        disk.begin(&mut core, now);
        longest = longest.max(disk.busy(now));
        if disk.end(&mut core, &mut now).is_none() {
            break;
        }
    }
    assert!(longest < Duration::from_millis(500), "{longest:?}");
    core.abort(Error::Cancelled);
    let left = disk.under_way.len();
    disk.begin(&mut core, now);
    assert_eq!(disk.under_way.len(), left, "nothing more is begun");
    while disk.end(&mut core, &mut now).is_some() {}
    assert!(core.is_concluded());
}

#[test]
fn a_guest_write_waits_for_one_call_and_makes_the_next_ones_shorter() {
    let options = MirrorOptions::new().copy_mode(CopyMode::WriteBlocking);
    let mut core = core(100 * G, options);
    core.config.live = true;
    let (mut disk, mut now) = (Disk::new(1 << 40), Duration::ZERO);
    for _ in 0..40 {
        disk.begin(&mut core, now);
        disk.end(&mut core, &mut now);
    }
    disk.begin(&mut core, now);
    let zeroing = |disk: &Disk| {
        disk.under_way.iter().find_map(|(_, action)| match action.work {
            Work::Zero { range, .. } => Some(range),
            _ => None,
        })
    };
    let busy = zeroing(&disk).unwrap();
    assert!(busy.len() >= G / 2, "{busy}");
    let write = ByteRange::at(busy.start() + 4096, 4096);
    let ticket = core.on_guest_write(write);
    assert_eq!(core.guest_admit(ticket), Admission::Wait);
    let index = disk
        .under_way
        .iter()
        .position(|(_, action)| matches!(action.work, Work::Zero { range, .. } if range == busy));
    let (_, action) = disk.under_way.remove(index.unwrap());
    core.on_completion(now, action.id, Ok(Done::Zeroed));
    assert_eq!(core.guest_admit(ticket), Admission::SourceAndTarget, "it waits for no other call");
    assert!(core.pacing.zero_size(&core.config) <= busy.len() / 2, "{}", core.pacing.zero_size(&core.config));
}
