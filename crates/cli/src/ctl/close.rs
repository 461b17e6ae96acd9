//! `close`: nodes that nothing uses are closed, with what `mirror` has opened below them.

use blockmirror_qmp::Client;
use serde_json::json;

use super::added::Added;
use super::node::find;
use crate::args::CloseArgs;
use crate::console::Console;
use crate::failure::{Failure, Outcome};

pub(super) fn close(console: &mut Console<'_>, client: &mut Client, args: &CloseArgs) -> Outcome<()> {
    for name in &args.nodes {
        let node = find(client, name)?;
        let below = Added::below_target(client, &node.name)?;
        client
            .execute("blockdev-del", json!({"node-name": node.name}))
            .map_err(|error| Failure::failed(format_args!("{name}: {error}")))?;
        below.remove(console, client);
    }
    Ok(())
}
