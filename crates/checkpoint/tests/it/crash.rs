//! Power cuts: every state of the storage that one could leave, from a recording of what was written.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::single_range_in_vec_init, reason = "a run of regions is a range")]

use std::ops::Range;
use std::sync::Arc;

use blockmirror_block::testing::{RecordingStorage, Rng};
use blockmirror_checkpoint::{Checkpoint, Digest, Error, Identity};

const REGION: u64 = 1 << 20;
const REGIONS: u64 = 3000;

/// What `region` is marked with, if the log has digests.
fn digest(region: u64) -> Digest {
    u128::from(region + 1).wrapping_mul(0x0123_4567_89ab_cdef_0fed_cba9_8765_4321).to_be_bytes()
}

/// The calls of a session: where in the recording each had returned, and what it marked.
struct Session {
    storage: Arc<RecordingStorage>,
    created: usize,
    calls: Vec<(usize, Range<u64>)>,
}

impl Session {
    /// A log that is opened anew every few calls, so that areas change often.
    fn play(seed: u64, calls: usize, digests: bool) -> Self {
        let storage = Arc::new(RecordingStorage::default());
        let mut identity = Identity::new();
        identity.push("seed", seed.to_string());
        let (own, len) = (Arc::clone(&storage) as _, REGIONS * REGION);
        let made = match digests {
            true => Checkpoint::create_with_digests(own, len, REGION, identity),
            false => Checkpoint::create(own, len, REGION, identity),
        };
        let mut log = made.unwrap();
        let mut session = Self { created: storage.position(), storage, calls: Vec::new() };
        let mut rng = Rng::new(seed, 0);
        for _ in 0..calls {
            if rng.one_in(3) {
                log = Checkpoint::open(Arc::clone(&session.storage) as _).unwrap();
            }
            let first = rng.below(REGIONS);
            let run = first..(first + rng.range(1, 50)).min(REGIONS);
            match digests {
                true => log.mark_with(std::slice::from_ref(&run), &mut |region| digest(region)).unwrap(),
                false => log.mark(std::slice::from_ref(&run)).unwrap(),
            }
            session.calls.push((session.storage.position(), run));
        }
        session
    }

    /// What must be marked, and what may be, if the power failed after so many entries of the recording.
    fn bounds(&self, position: usize) -> (Vec<bool>, Vec<bool>) {
        let (mut must, mut may) = (vec![false; REGIONS as usize], vec![false; REGIONS as usize]);
        let mut under_way = false;
        for (returned, run) in &self.calls {
            let run = run.start as usize..run.end as usize;
            if *returned <= position {
                must[run.clone()].fill(true);
            }
            if !under_way {
                may[run].fill(true);
            }
            under_way |= *returned > position;
        }
        (must, may)
    }

    /// Opens every state, as many as `most`; returns how many.
    fn check(&self, most: usize) -> usize {
        let mut points = 0;
        for point in self.storage.crash_points().take(most) {
            points += 1;
            match Checkpoint::open(Arc::new(point.storage())) {
                Err(Error::NoCheckpoint { .. } | Error::NotBegun { .. }) => {
                    assert!(point.position() < self.created, "{point}: the log is gone");
                }
                Err(error) => unreachable!("{point}: {error}"),
                Ok(mut log) => {
                    let (must, may) = self.bounds(point.position());
                    for region in 0..REGIONS {
                        let (marked, at) = (log.regions().get(region), region as usize);
                        assert!(
                            marked || !must[at],
                            "{point}: region {region} was reported, and is not marked"
                        );
                        assert!(
                            !marked || may[at],
                            "{point}: region {region} is marked, and was not asked for"
                        );
                        let want = (marked && log.has_digests()).then(|| digest(region));
                        assert_eq!(log.digest(region), want, "{point}: region {region}");
                    }
                    // The next run goes on from any of them.
                    match log.has_digests() {
                        true => log.mark_with(&[0..REGIONS], &mut |region| digest(region)).unwrap(),
                        false => log.mark(&[0..REGIONS]).unwrap(),
                    }
                }
            }
        }
        points
    }
}

#[test]
fn after_a_power_cut_every_mark_that_was_reported_is_there_and_no_other() {
    let mut points = 0;
    for seed in 0..6 {
        points += Session::play(seed, 30, false).check(usize::MAX);
        points += Session::play(seed, 30, true).check(usize::MAX);
    }
    assert!(points > 1000, "{points}");
}
