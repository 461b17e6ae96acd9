//! The log: what the libraries trace, on standard error. Started once, before a command runs.
//!
//! `RUST_LOG` says what is logged. Without it only the notices of the daemon are printed, each as a line of
//! the command itself.
//!
//! What must hold: nothing goes to standard output, nor into a file that the command writes, and a standard
//! error that cannot be written ends nothing.

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use blockmirror_daemon::NOTICE;
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::args::LogFormat;
use crate::failure::one_line;

/// Standard error leads into a file that the command writes.
static SILENT: AtomicBool = AtomicBool::new(false);

/// Starts the log of this process; returns what is wrong with `RUST_LOG`.
pub(crate) fn start(format: Option<LogFormat>) -> Option<String> {
    let wanted = std::env::var("RUST_LOG").unwrap_or_default();
    let notices = format!("{NOTICE}=warn");
    let parsed = EnvFilter::builder().with_regex(false).parse(format!("{wanted},{notices}"));
    let problem = parsed.as_ref().err().map(|error| format!("RUST_LOG is ignored: {error}"));
    let filter = parsed.unwrap_or_else(|_| EnvFilter::new(notices));
    let log = tracing_subscriber::fmt().with_writer(|| Stderr).log_internal_errors(false);
    let log = log.with_env_filter(filter);
    // Refused if this process has a log already.
    let _ = match format {
        Some(LogFormat::Json) => log.json().try_init(),
        None if wanted.is_empty() => log.event_format(Plain).try_init(),
        _ => log.try_init(),
    };
    problem
}

/// What is said where no log is started, because programs read the standard error: that `RUST_LOG` asks in
/// vain.
pub(crate) fn left_out() -> Option<String> {
    let wanted = std::env::var_os("RUST_LOG").filter(|wanted| !wanted.is_empty());
    wanted.map(|_| "RUST_LOG is ignored: --progress=json has the standard error to itself".to_owned())
}

/// From here on nothing is logged: what is printed would become a part of it.
pub(crate) fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

/// The stream of the log. It is given a line at a time; whatever a name or a peer's text holds, it stays one.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !SILENT.load(Ordering::Relaxed) {
            let text = String::from_utf8_lossy(line);
            let text = one_line(text.strip_suffix('\n').unwrap_or(&text)) + "\n";
            // There is no other place to report a failure.
            let _ = io::stderr().write_all(text.as_bytes());
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An event as a line of the command: what it says, and nothing of where and when.
struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut to: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        to.write_str("blockmirror: ")?;
        context.field_format().format_fields(to.by_ref(), event)?;
        to.write_char('\n')
    }
}
