//! A guest played by fio over NBD: random writes of 4 KiB, sixteen under way, over one connection.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use blockmirror_testing::Outcome;
use serde::Serialize;
use serde_json::Value;

const JOB: [&str; 8] = [
    "--name=guest",
    "--ioengine=nbd",
    "--rw=randwrite",
    "--bs=4k",
    "--iodepth=16",
    "--time_based",
    "--norandommap",
    "--output-format=json",
];

/// What the guest got done.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Writes {
    /// A second.
    pub(super) rate: f64,
    /// Microseconds that half of them, and 99 and 999 of a thousand, did not exceed.
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
}

/// fio at work.
pub(super) struct Fio {
    child: Option<Child>,
    cut_short: bool,
}

/// What fio's exit code is after a signal; its report is whole all the same.
const INTERRUPTED: i32 = 128;

impl Fio {
    /// Whether fio is installed and knows NBD.
    pub(super) fn is_there() -> bool {
        let help = Command::new("fio").arg("--enghelp=nbd").output();
        help.is_ok_and(|help| help.status.success())
    }

    /// Writes for `time`; what it does in the `ramp` before that is not counted.
    pub(super) fn start(uri: &str, seed: u64, ramp: Duration, time: Duration) -> Outcome<Self> {
        let child = Command::new("fio")
            .args(JOB)
            .arg(format!("--uri={uri}"))
            .arg(format!("--randseed={}", seed + 1))
            .arg(format!("--ramp_time={}ms", ramp.as_millis()))
            .arg(format!("--runtime={}ms", time.as_millis()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| format!("fio: {e}"))?;
        Ok(Self { child: Some(child), cut_short: false })
    }

    /// Whether it still writes.
    pub(super) fn writes(&mut self) -> Outcome<bool> {
        Ok(match &mut self.child {
            Some(child) => child.try_wait()?.is_none(),
            None => false,
        })
    }

    /// Ends it before its time; what it has written until now counts.
    pub(super) fn cut_short(&mut self) -> Outcome {
        if let Some(child) = &self.child {
            rustix::process::kill_process(
                rustix::process::Pid::from_child(child),
                rustix::process::Signal::INT,
            )?;
            self.cut_short = true;
        }
        Ok(())
    }

    /// Waits for its end.
    pub(super) fn finish(mut self) -> Outcome<Writes> {
        let child = self.child.take().ok_or("fio has been waited for")?;
        let output = child.wait_with_output()?;
        let text = String::from_utf8(output.stdout)?;
        let was_cut_short = self.cut_short && output.status.code() == Some(INTERRUPTED);
        if !(output.status.success() || was_cut_short) {
            return Err(format!("fio: {}: {text}", output.status).into());
        }
        // Remarks may come before the report.
        let report: Value = serde_json::from_str(text.get(text.find('{').unwrap_or(0)..).unwrap_or(""))?;
        let writes = &report["jobs"][0]["write"];
        let figure = |value: &Value| value.as_f64().filter(|&v| v > 0.0).ok_or("fio has not written");
        let percentile = |name: &str| figure(&writes["clat_ns"]["percentile"][name]).map(|ns| ns / 1000.0);
        Ok(Writes {
            rate: figure(&writes["iops"])?,
            p50: percentile("50.000000")?,
            p99: percentile("99.000000")?,
            p999: percentile("99.900000")?,
        })
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It may have gone by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
