//! What wakes a caller that never waits, and whose write is refused for the log's sake.

use super::room::full;
use super::*;
use crate::queue::Caller;

#[test]
fn the_mark_of_its_regions_and_a_failure_of_the_log_wake_the_caller() {
    for fails in [false, true] {
        let (source, target, (log, faults)) = (filled(), empty(), Log::new());
        let tap = tap(&source, &log);
        let job = attach(&tap, &target, options(&log));
        until(&job, &Event::Ready);
        let gate = faults.hold(OpKind::Flush, None);
        let caller = Caller::new(&tap);
        let ticket = caller.woken_by(ByteRange::at(5 * REGION, 512), || {
            gate.wait_held(1);
            if fails {
                faults.inject(Fault::on(OpKind::Flush).forever());
            }
            gate.open();
        });
        assert_eq!(log.kept.lock().invalid, fails);
        assert_eq!(log.marked().contains(&5), !fails);
        ticket.complete(Ok(()), None).unwrap();
        if fails {
            assert!(matches!(job.wait(), Err(Error::Log(_))));
        } else {
            end(job);
        }
    }
}

#[test]
fn a_flush_and_the_end_of_the_limit_wake_the_caller_that_lacks_room() {
    for how in 0..3 {
        let full = full();
        let caller = Caller::new(&full.tap);
        let range = ByteRange::at(9 * REGION, 10);
        let within = caller.refused(range).unwrap();
        assert!(within <= std::time::Duration::from_millis(20), "the last flush may have come too early");
        let ticket = match how {
            0 => caller.woken_in_time_by(range, || full.gate.open()),
            1 => caller.woken_by(range, || full.job.control().pause().unwrap()),
            _ => caller.woken_by(range, || full.job.control().cancel()),
        };
        ticket.complete(Ok(()), None).unwrap();
        full.gate.open();
        end(full.job);
    }
}
