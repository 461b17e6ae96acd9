//! Answers to block status requests.

use blockmirror_block::{ByteRange, ExtentKind, QueryBudget, Visit};

use crate::proto::{
    BlockStatus, Command, CommandFlags, Descriptor, Errno, PayloadFilter, Request, allocation,
};

use super::connection::Connection;
use super::negotiated_params::{Context, Failure};
use super::options::{MAX_DESCRIPTORS, MAX_VISITS};

/// However many contexts are asked for, each may say this much.
const MIN_DESCRIPTORS: usize = 64;

/// Asks every wanted context, and puts one chunk for each into `out`. On failure `out` is as before.
pub(crate) fn run(
    connection: &Connection,
    request: &Request,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), Failure> {
    let selected = &connection.params.contexts;
    let mut length = request.length;
    let mut wanted: Vec<&(u32, Context)> = selected.iter().collect();
    if request.flags.contains(CommandFlags::PAYLOAD_LEN) {
        let filter = PayloadFilter::decode(payload).map_err(|e| Failure::new(Errno::INVAL, e.to_string()))?;
        length = filter.length;
        if filter.ids.is_empty() || filter.ids.len() > selected.len() {
            return Err(Failure::new(Errno::INVAL, "a filter names no context, or more than were selected"));
        }
        wanted.clear();
        for id in &filter.ids {
            match selected.iter().find(|(selected, _)| selected == id) {
                Some(context) if !wanted.iter().any(|(known, _)| known == id) => wanted.push(context),
                _ => {
                    return Err(Failure::new(
                        Errno::INVAL,
                        format!("context {id} was not selected, or is named twice"),
                    ));
                }
            }
        }
        if length == 0 {
            return Err(Failure::new(Errno::INVAL, "status of nothing"));
        }
        connection.params.check_bounds(Command::BlockStatus, request.offset, length)?;
    }
    let range = ByteRange::at(request.offset, length);
    let most = if request.flags.contains(CommandFlags::REQ_ONE) {
        1
    } else {
        (MAX_DESCRIPTORS / wanted.len().max(1)).max(MIN_DESCRIPTORS)
    };
    let start = out.len();
    for (i, (id, context)) in wanted.iter().enumerate() {
        let descriptors = match ask(connection, context, range, most) {
            Ok(descriptors) => descriptors,
            Err(failure) => {
                out.truncate(start);
                return Err(failure);
            }
        };
        let status = BlockStatus { id: *id, descriptors };
        connection.encoder().status(out, request, &status, i + 1 == wanted.len());
    }
    Ok(())
}

fn ask(
    connection: &Connection,
    context: &Context,
    range: ByteRange,
    most: usize,
) -> Result<Vec<Descriptor>, Failure> {
    let mut runs =
        Runs { connection, at: range.start(), end: range.end(), most, visits: 0, found: Vec::new() };
    let device = connection.device();
    // A short answer is legal: the client asks again from where it ends.
    let mut budget = QueryBudget::new();
    match context {
        Context::Allocation => device.extents(range, &mut |extent| {
            let flags = match extent.kind {
                ExtentKind::Data => 0,
                // Mapped, but nothing is stored there.
                ExtentKind::Zero if extent.mapped_hole => allocation::ZERO,
                // How it reads now.
                ExtentKind::Zero | ExtentKind::Unallocated | ExtentKind::Unknown => {
                    allocation::HOLE | allocation::ZERO
                }
            };
            runs.push(extent.range.end(), flags)?;
            budget.spend(&extent)
        })?,
        Context::Depth => device.extents(range, &mut |extent| {
            let depth = match extent.kind {
                ExtentKind::Unallocated | ExtentKind::Unknown => 0,
                ExtentKind::Data | ExtentKind::Zero => u64::from(extent.depth) + 1,
            };
            runs.push(extent.range.end(), depth)?;
            budget.spend(&extent)
        })?,
        Context::Custom(context) => {
            context.visit(range, &mut |run, flags| runs.push(run.end(), u64::from(flags)))?;
        }
    }
    if runs.found.is_empty() {
        connection.check_ending()?;
        return Err(Failure::new(Errno::IO, "nothing is known about the range"));
    }
    Ok(runs.found)
}

/// Maximal runs of equal flags, at most so many out of so many extents, and none for a client that has gone.
/// The last one may be shorter than it is: clients ask again from where an answer ends.
struct Runs<'a> {
    connection: &'a Connection,
    at: u64,
    end: u64,
    most: usize,
    visits: usize,
    found: Vec<Descriptor>,
}

impl Runs<'_> {
    fn push(&mut self, end: u64, flags: u64) -> Visit {
        let end = end.min(self.end);
        if end <= self.at {
            return Visit::Continue(());
        }
        if self.visits == MAX_VISITS || self.connection.is_ending() {
            return Visit::Break(());
        }
        self.visits += 1;
        let length = end - self.at;
        let full = self.found.len() == self.most;
        match self.found.last_mut() {
            Some(last) if last.flags == flags => last.length += length,
            _ if full => return Visit::Break(()),
            _ => self.found.push(Descriptor { length, flags }),
        }
        self.at = end;
        if end == self.end { Visit::Break(()) } else { Visit::Continue(()) }
    }
}
