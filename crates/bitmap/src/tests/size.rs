//! What a bitmap over 8 TiB costs.

use crate::DirtyBitmap;

const DISK: u64 = 8 << 40;

fn bitmap() -> DirtyBitmap {
    DirtyBitmap::new(DISK, 4096).unwrap()
}

#[test]
fn all_clean_and_all_dirty_cost_next_to_nothing() {
    let mut bitmap = bitmap();
    assert!(bitmap.heap_bytes() < 1024, "clean: {}", bitmap.heap_bytes());
    bitmap.set_all();
    assert!(bitmap.heap_bytes() < 1024, "dirty: {}", bitmap.heap_bytes());
    bitmap.clear(0..DISK);
    assert!(bitmap.heap_bytes() < 1024, "clean again: {}", bitmap.heap_bytes());
}

#[test]
fn memory_follows_what_is_mixed() {
    let mut bitmap = bitmap();
    for i in 0..256 {
        bitmap.set(i * (32 << 30)..i * (32 << 30) + (1 << 20));
    }
    assert!(bitmap.heap_bytes() < 600 << 10, "{}", bitmap.heap_bytes());
    assert_eq!(bitmap.dirty_bytes(), 256 << 20);
    for i in 0..256 {
        bitmap.clear(i * (32 << 30)..(i + 1) * (32 << 30));
    }
    assert!(bitmap.heap_bytes() < 1024, "{}", bitmap.heap_bytes());
}

#[test]
fn one_percent_dirty_in_runs_of_64_mib_costs_a_few_mebibytes() {
    let mut bitmap = bitmap();
    let run = 64 << 20;
    let runs = DISK / 100 / run;
    // Wherever a run begins it cuts leaves at both ends; spread like this, no two share one.
    for i in 0..runs {
        let at = (i * ((DISK / runs) >> 12) + i * 7919 % 4096) * 4096;
        bitmap.set(at..at + run);
    }
    assert_eq!(bitmap.dirty_bytes(), runs * run);
    assert!(bitmap.heap_bytes() < 16 << 20, "{}", bitmap.heap_bytes());
    // What it comes to.
    assert!(bitmap.heap_bytes() < 4 << 20, "{}", bitmap.heap_bytes());
}

/// The worst case: a mixed leaf for each 4096 granules. Who needs a bound chooses the granularity by the
/// length of the disk.
#[test]
fn a_mixed_leaf_costs_600_bytes() {
    let leaf = 4096 * 4096;
    let mut bitmap = DirtyBitmap::new(1 << 40, 4096).unwrap();
    let leaves = (1 << 40) / leaf;
    for i in 0..leaves {
        bitmap.set(i * leaf..i * leaf + 1);
    }
    assert!(bitmap.heap_bytes() as u64 <= leaves * 600, "{}", bitmap.heap_bytes());
}

#[test]
fn one_bit_in_eight_tebibytes_is_found_from_either_side() {
    let mut bitmap = bitmap();
    bitmap.set(DISK - 1..DISK);
    assert_eq!(bitmap.next_dirty(0, u64::MAX), Some(DISK - 4096..DISK));
    bitmap.set_all();
    bitmap.clear(DISK / 2..DISK / 2 + 4096);
    assert_eq!(bitmap.next_clean(0, u64::MAX), Some(DISK / 2..DISK / 2 + 4096));
}

/// The figure is promised to users before there is a bitmap.
#[test]
fn the_worst_case_is_never_exceeded_and_is_met() {
    for (len, granularity) in
        [(0, 512), (1, 512), (4096 << 9, 512), (1 << 32, 4096), (1 << 34, 512), (3 << 30, 65536)]
    {
        let mut bitmap = DirtyBitmap::new(len, granularity).unwrap();
        let mut at = 0;
        while at < len {
            bitmap.set(at..at + 1);
            at += granularity * 4096;
        }
        let (taken, most) = (bitmap.heap_bytes() as u64, crate::worst_case_bytes(len, granularity));
        assert!(taken <= most && most <= taken + taken / 8 + 1024, "{len} {granularity}: {taken} {most}");
    }
}
