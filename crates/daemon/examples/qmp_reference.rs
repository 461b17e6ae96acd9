//! Prints the reference of the daemon's QMP commands, events and types as Markdown: `docs/qmp.md`.

use blockmirror_daemon::Daemon;

fn main() {
    print!("{}", Daemon::reference());
}
