//! The end of a log: with its job, and what is said if it cannot be ended.

use super::*;

/// The process is about to end, and with it the job.
#[test]
fn what_is_written_after_the_end_of_a_job_that_keeps_its_log_is_marked() {
    let (source, target, (log, _)) = (filled(), empty(), Log::new());
    let tap = tap(&source, &log);
    let job = attach(&tap, &target, options(&log));
    until(&job, &Event::Ready);
    job.control().keep_log();
    end(job);
    write(&*tap, 6 * REGION, 10, 8);
    assert_eq!(log.marked(), [6]);
    assert!(!log.kept.lock().ended);
    let other = Log::new().0;
    let refused = MirrorJob::attach(&tap, Arc::clone(&target) as _, options(&other)).unwrap_err();
    assert_eq!(refused.to_string(), "watched has the log the log");
}

/// Else it would be believed after writes that are not in it.
#[test]
fn a_log_has_ended_before_its_job_is_over() {
    for how in ["cancel", "keep", "fail", "abandon"] {
        let (source, target, (log, faults)) = (filled(), empty(), Log::new());
        let tap = tap(&source, &log);
        let (failing, target_faults) = faulty(&target);
        let ended = || log.kept.lock().ended && tap.log_name().is_none();
        if how == "abandon" {
            MirrorJob::prepare(&tap, Arc::clone(&failing) as _, options(&log)).unwrap().abandon();
            assert!(ended());
            continue;
        }
        let job = attach(&tap, &failing, options(&log));
        until(&job, &Event::Ready);
        let gate = faults.hold(OpKind::Flush, None);
        match how {
            "cancel" => job.control().cancel(),
            "keep" => job.control().keep_copy().unwrap(),
            _ => {
                target_faults.inject(Fault::on(OpKind::Flush).forever());
                job.control().complete().unwrap();
            }
        }
        gate.wait_held(1);
        let over = job.control().events().into_iter();
        assert!(!over.into_iter().any(|event| matches!(event, Event::Completed { .. } | Event::Cancelled)));
        gate.open();
        assert_eq!(job.wait().is_ok(), how == "keep", "{how}");
        assert!(ended(), "{how}");
        write(&*tap, 0, 100, 1);
        assert_eq!(log.marked(), [], "{how}");
    }
}

#[test]
fn a_job_says_so_if_its_log_is_believed_after_its_end() {
    for invalidates in [true, false] {
        let (source, target, (log, faults)) = (filled(), empty(), Log::new());
        let tap = tap(&source, &log);
        let job = attach(&tap, &target, options(&log));
        until(&job, &Event::Ready);
        faults.inject(Fault::on(OpKind::Flush).forever());
        if !invalidates {
            faults.inject(Fault::on(OpKind::Discard).forever());
        }
        job.control().cancel();
        let error = job.wait().unwrap_err();
        assert_eq!(matches!(error, Error::Cancelled), invalidates, "{error}");
        assert_eq!(error.to_string().contains("remove the log"), !invalidates, "{error}");
        assert_eq!(log.kept.lock().invalid, invalidates);
    }
}

/// The log of a job that goes on without it would be believed by nothing.
#[test]
fn a_job_whose_log_is_given_up_fails() {
    let (source, target, (log, _)) = (filled(), empty(), Log::new());
    let tap = tap(&source, &log);
    let job = attach(&tap, &target, options(&log));
    until(&job, &Event::Ready);
    tap.give_up_log();
    assert!(log.kept.lock().invalid);
    job.control().complete().unwrap();
    assert!(matches!(job.wait(), Err(Error::Log(_))));
    assert_eq!(tap.device().name(), "watched");
}
