//! The page about the plan of a copy: the drawing, the same figures as a table, what the columns mean.

use blockmirror_block::size::human_size;

use crate::Format;
use crate::page::{Mood, Page};
use crate::plan::{CopyPlan, drawing, sentence, space_and_time, with_added};
use crate::text::size_and_share;

impl CopyPlan<'_> {
    /// The picture.
    pub fn picture(&self, format: Format) -> String {
        match format {
            Format::Svg => drawing(self, true),
            Format::Html => page(self),
        }
    }
}

fn page(plan: &CopyPlan<'_>) -> String {
    let mut page = Page::new(&sentence(plan), Mood::Plain);
    page.subtitle(&format!("{} → {}", plan.source, plan.target));
    for line in space_and_time(plan) {
        page.paragraph(&line);
    }
    let without = CopyPlan { space: None, time: None, ..plan.clone() };
    page.figure(&drawing(&without, false), "");
    page.heading("Figures");
    let share = |bytes| size_and_share(bytes, plan.len);
    let rows = [
        ("copy", share(plan.copy)),
        ("make zero", share(plan.zero)),
        ("skip", share(plan.skip)),
        ("allocated in the target", human_size(plan.allocation)),
    ];
    let rows: Vec<_> = rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
    page.table(&["", "bytes"], &rows, None);
    page.heading("Each granularity");
    let small = human_size(plan.small_write);
    let head = ["granularity", "memory, at most", "copied", "whole granules: copied", "and allocated"];
    let rows = plan.rows.iter().map(|row| {
        vec![
            human_size(row.granularity),
            human_size(row.memory),
            human_size(row.write),
            human_size(row.whole_write),
            with_added(row.whole_allocation, plan.allocation),
        ]
    });
    let rows: Vec<_> = rows.collect();
    page.table(&head, &rows, plan.rows.iter().position(|row| row.chosen));
    page.heading("How to read it");
    page.paragraph(&format!("The granularity is {}.", plan.granularity));
    for text in [
        format!(
            "Copied: what a write of {small} that the guest makes during a live mirror costs. This mirror keeps \
             what is dirty finer than the granularity, in units of 4 KiB (more on disks above 1 TiB), and copies \
             these. A mirror that copies whole granules, as QEMU's does, copies the granule around each write."
        ),
        "Allocated: the space that the data takes in the target after the first pass. This mirror copies what the \
         source has allocated and no more, whatever the granularity: rounded to the target's clusters that is \
         the space needed. Copying whole granules adds what lies beside the data."
            .to_owned(),
        "Memory: what the dirty bitmaps of the job take at most, when writes are spread over all of the disk. \
         Parts that are all clean or all dirty take none."
            .to_owned(),
    ] {
        page.paragraph(&text);
    }
    page.finish()
}
