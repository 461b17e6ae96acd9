//! Pictures of virtual disks and of copies, as SVG and as HTML.
//!
//! | picture | what it shows |
//! |---|---|
//! | [`Allocation`] | what each part of a disk holds, and how its data lies in the file |
//! | [`CopyPlan`] | what a copy would do, and what each granularity of the dirty bitmap costs |
//! | [`RunReport`] | rate, bytes left and events of a copy over time |
//!
//! Figures in, text out: nothing here opens a file, asks a clock or knows an image. The same figures give the
//! same text. A picture is bounded whatever the disk: a map has at most [`CELLS`] cells, a report at most
//! [`SAMPLES`] samples and [`EVENTS`] events. It holds no script and refers to nothing outside of itself; it
//! follows the reader's choice of a light or a dark page. Names may hold anything: what is no plain text is
//! shown as escapes.
//!
//! ```
//! use blockmirror_picture::{Allocation, Content, Format};
//!
//! let mut allocation = Allocation::new(0..1 << 30);
//! allocation.push(0..200 << 20, Content::Data, 0);
//! allocation.push(200 << 20..1 << 30, Content::Hole, 0);
//! let svg = allocation.picture("disk.qcow2", Format::Svg);
//! assert!(svg.contains("200 MiB of 1 GiB hold data, in 1 piece"));
//! ```

#![forbid(unsafe_code)]

mod allocation;
mod chart;
mod map;
mod page;
mod plan;
mod plan_page;
mod run;
mod run_page;
mod style;
mod svg;
mod text;

pub use allocation::{Allocation, CELLS, Content};
pub use chart::PictureError;
pub use plan::{CopyPlan, GranularityRow, SpaceRow};
pub use run::{EVENTS, Ending, RunRecord, RunReport, SAMPLES, Sample};

/// What a picture is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// A drawing, for a page or a viewer of images.
    Svg,
    /// A page with the drawing, its figures as tables, and how to read it.
    Html,
}
