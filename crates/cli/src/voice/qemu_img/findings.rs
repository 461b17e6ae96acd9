//! `check` under the name `qemu-img`: a line for each finding as it is met, then the verdict.

use std::fmt::Write;

use blockmirror_image::{CheckReport, Finding, Mending, Severity, Structure};

use crate::args::Mend;
use crate::failure::one_line;

/// A finding, with what becomes of it under `mend`.
pub(super) fn line(finding: &Finding, times: u64, mend: Option<Mend>) -> String {
    let is_mended = match (mend, finding.severity()) {
        (Some(Mend::All), severity) => severity != Severity::CheckError,
        (Some(Mend::Leaks), severity) => severity == Severity::Leak,
        (None, _) => false,
    };
    // Refcounts are compared first and set right after.
    let is_refcount = matches!(finding, Finding::RefcountTooLow { .. } | Finding::Leak { .. });
    let verb = match finding.severity() {
        _ if is_mended && !is_refcount => "Repairing",
        Severity::Leak => "Leaked",
        _ => "ERROR",
    };
    let what = match finding {
        Finding::RefcountTooLow { cluster, refcount, references }
        | Finding::Leak { cluster, refcount, references } => {
            format!("cluster {cluster} refcount={refcount} reference={references}")
        }
        Finding::CopiedWrong { structure, index, offset, copied, refcount, .. } => {
            let entry = offset | u64::from(*copied) << 63;
            match structure {
                Structure::L2Table => {
                    format!(
                        "OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}"
                    )
                }
                _ => format!("OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}"),
            }
        }
        Finding::PastEnd { offset, len, .. } => {
            // QEMU writes it with a colon, whatever is repaired.
            return one_line(&format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
                 offset {offset:#x} size {len:#x}"
            )) + "\n";
        }
        other => other.to_string(),
    };
    let often = if times > 1 { format!(" ({times} times)") } else { String::new() };
    one_line(&format!("{verb} {what}{often}")) + "\n"
}

/// What a repair is about to write.
pub(super) fn mending(mending: &Mending) -> Option<String> {
    match mending {
        Mending::NewRefcounts => Some("Rebuilding refcount structure\n".to_owned()),
        Mending::Refcount { cluster, refcount, references } => {
            Some(format!("Repairing cluster {cluster} refcount={refcount} reference={references}\n"))
        }
        _ => None,
    }
}

/// What a check comes to.
pub(super) fn verdict(report: &CheckReport) -> String {
    let mut out = String::new();
    let (leaks, corruptions) = (report.leaks_fixed, report.corruptions_fixed);
    if leaks > 0 || corruptions > 0 {
        let _ = write!(
            out,
            "The following inconsistencies were found and repaired:\n\n    {leaks} leaked clusters\n    \
             {corruptions} corruptions\n\nDouble checking the fixed image now...\n"
        );
    }
    if report.is_clean() {
        out.push_str("No errors were found on the image.\n");
    }
    if report.corruptions > 0 {
        let _ = write!(
            out,
            "\n{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        let _ = write!(
            out,
            "\n{} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n",
            report.leaks
        );
    }
    if report.check_errors > 0 {
        let _ = write!(out, "\n{} internal errors have occurred during the check.\n", report.check_errors);
    }
    let (allocated, total) = (report.allocated_clusters, report.total_clusters);
    if allocated > 0 && total > 0 {
        let share = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        let _ = writeln!(
            out,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            share(allocated, total),
            share(report.fragmented_clusters, allocated),
            share(report.compressed_clusters, allocated)
        );
    }
    if report.image_end_offset > 0 {
        let _ = writeln!(out, "Image end offset: {}", report.image_end_offset);
    }
    out
}
