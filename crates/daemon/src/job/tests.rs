//! Names of jobs that are about to start.

use std::sync::mpsc;

use super::*;
use crate::command::Services;

const GUARD: Duration = Duration::from_secs(120);

/// Such a job once started, and pivoted without the graph: exports that came later got the old disk.
#[test]
fn a_job_whose_events_have_no_thread_does_not_start() {
    let jobs = Arc::clone(&Services::new(Vec::new(), Vec::new()).jobs);
    let refused = jobs.reserve_on("j", |_, _| Err(io::ErrorKind::WouldBlock.into())).unwrap_err();
    assert!(refused.desc.starts_with("Cannot start a thread for the events of job 'j': "), "{refused:?}");
    let reserved = jobs.reserve("j").unwrap();
    assert_eq!(jobs.reserve("j").unwrap_err().desc, "Job ID 'j' already in use");
    drop(reserved);
    drop(jobs.reserve("j").unwrap());
}

#[test]
fn the_thread_of_a_job_that_does_not_start_ends() {
    let jobs = Arc::clone(&Services::new(Vec::new(), Vec::new()).jobs);
    let (ended, end) = mpsc::channel();
    let spawn = |_, work: Box<dyn FnOnce() + Send>| {
        thread::spawn(move || {
            work();
            ended.send(())
        });
        Ok(())
    };
    let reserved = jobs.reserve_on("j", spawn).unwrap();
    assert!(end.try_recv().is_err(), "it waits for the job");
    drop(reserved);
    end.recv_timeout(GUARD).unwrap();
}
