//! What `check` says in our own voice.

use blockmirror_image::ImageCheck;

use crate::failure::one_line;

/// What was found, for people, in our own voice.
pub(super) fn verdict(checked: &ImageCheck, found: &[String], more: u64) -> String {
    let report = &checked.report;
    let mut lines = found.to_vec();
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    let name = checked.path.display();
    let counted = |figures: [(u64, &str); 3]| {
        let some: Vec<_> =
            figures.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{what}: {n}")).collect();
        some.join(", ")
    };
    let fixed = counted([
        (report.corruptions_fixed, "corruptions"),
        (report.leaks_fixed, "leaked clusters"),
        (0, ""),
    ]);
    if !fixed.is_empty() {
        lines.push(format!("{name}: repaired: {fixed}"));
    }
    let wrong = counted([
        (report.corruptions, "corruptions"),
        (report.leaks, "leaked clusters"),
        (report.check_errors, "unreadable refcounts"),
    ]);
    let wrong = if wrong.is_empty() { "no errors".to_owned() } else { wrong };
    lines.push(format!("{name}: {wrong}"));
    let share = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 };
    let allocated = report.allocated_clusters;
    lines.push(format!(
        "{name}: {allocated} of {} clusters allocated ({:.2} %), {:.2} % of them fragmented, {:.2} % compressed; \
         the image ends at {}",
        report.total_clusters,
        share(allocated, report.total_clusters),
        share(report.fragmented_clusters, allocated),
        share(report.compressed_clusters, allocated),
        report.image_end_offset
    ));
    lines.iter().map(|line| one_line(line) + "\n").collect()
}
