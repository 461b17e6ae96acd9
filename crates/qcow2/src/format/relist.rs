//! Other fixed fields and extensions in the header, for another version of the format or another data file:
//! which bytes of the first cluster change, in which order.
//!
//! Pure, as `rewrite` is, which changes the backing file: the first cluster comes in, writes come out, each
//! to be durable before the next. What the header says changes with the first sector, which is written as a
//! whole:
//!
//! 1. where the new extensions reach into the backing file's name, a copy of the name near the end of the
//!    cluster;
//! 2. the first sector, with all of the new header but the names of features, which no reader needs;
//! 3. if the names of features reach past the first sector: what lies there, then the first sector once more.
//!
//! So whatever a crash leaves, the header is the old one or the new one. Clusters of 1 and 2 KiB may have no
//! room for two long names; there all is one write, which a crash may tear.

use super::extension::{self, DATA_FILE, END, FEATURE_NAMES};
use super::feature::FeatureName;
use super::rewrite::{Parts, SECTOR, Step, point_at};
use crate::error::{Error, Result};

/// What becomes of the names of features. They are left out where they do not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FeatureNames {
    /// Those that are there stay.
    Kept,
    /// Those of all features that this version knows.
    Known,
    /// Version 2 has no features.
    Dropped,
}

/// What the header is to begin with.
#[derive(Debug)]
pub(crate) struct NewList<'a> {
    /// The fixed fields, as many as there are to be.
    pub(crate) fixed: Vec<u8>,
    /// The name of the data file, if that changes.
    pub(crate) data_file: Option<&'a [u8]>,
    pub(crate) feature_names: FeatureNames,
    /// The option that asks for the change.
    pub(crate) option: &'static str,
}

/// The writes that make the header in `cluster`, the whole first cluster, begin with `new`. Extensions that
/// are not named in it stay. The header was found to be sound.
///
/// # Errors
/// What every reader needs does not fit into the first sector.
pub(crate) fn change_list(cluster: &[u8], header_length: usize, new: &NewList<'_>) -> Result<Vec<Step>> {
    let parts = Parts::new(cluster, header_length)?;
    let (whole, short) = (new.bytes(&parts, true), new.bytes(&parts, false));
    let name = &cluster[parts.old.clone()];
    let has_room = short.len() <= SECTOR && (cluster.len() > SECTOR || short.len() + name.len() <= SECTOR);
    if !has_room {
        let problem = format!("the header's first {SECTOR} bytes have no room for it");
        return Err(Error::Option { option: new.option, problem });
    }
    let careful = [&whole, &short].into_iter().find_map(|list| careful_steps(&parts, list, &short));
    if let Some(steps) = careful {
        return Ok(steps);
    }
    let mut head = short;
    let at = head.len();
    if at + name.len() > cluster.len() {
        let problem = format!("the backing file's name does not fit into a cluster of {}", cluster.len());
        return Err(Error::Option { option: new.option, problem });
    }
    point_at(&mut head, at, name.len());
    head.extend(name);
    Ok(vec![Step { at: 0, bytes: head }])
}

impl NewList<'_> {
    /// Fixed fields and extensions, with the names of features last or left out.
    fn bytes(&self, parts: &Parts<'_>, names: bool) -> Vec<u8> {
        let mut out = self.fixed.clone();
        for (magic, data) in &parts.records {
            match (*magic, self.data_file) {
                (FEATURE_NAMES, _) | (DATA_FILE, Some(_)) => {}
                _ => extension::append(&mut out, *magic, data),
            }
        }
        if let Some(name) = self.data_file {
            extension::append(&mut out, DATA_FILE, name);
        }
        let table = match self.feature_names {
            FeatureNames::Kept => {
                let kept = parts.records.iter().find(|(magic, _)| *magic == FEATURE_NAMES);
                kept.map(|(_, table)| table.to_vec())
            }
            FeatureNames::Known => Some(FeatureName::encode_known()),
            FeatureNames::Dropped => None,
        };
        if let Some(table) = table.filter(|_| names) {
            extension::append(&mut out, FEATURE_NAMES, &table);
        }
        extension::append(&mut out, END, &[]);
        out
    }
}

/// The steps to `list`, by way of `short` where it is longer than a sector; `None` if there is no room for
/// the backing file's name.
fn careful_steps(parts: &Parts<'_>, list: &[u8], short: &[u8]) -> Option<Vec<Step>> {
    let mut cluster = parts.cluster.to_vec();
    let mut steps = Vec::new();
    let mut take = |at: usize, bytes: &[u8]| {
        // Each lies inside the cluster: checked below, or a sector.
        cluster[at..at + bytes.len()].copy_from_slice(bytes);
        let whole_sector = at == 0;
        let bytes = if whole_sector { cluster[..SECTOR].to_vec() } else { bytes.to_vec() };
        steps.push(Step { at, bytes });
    };
    let old = parts.old.clone();
    let name = &parts.cluster[old.clone()];
    let in_the_way = !old.is_empty() && old.start < list.len();
    let is_one_sector = parts.cluster.len() == SECTOR;
    let place = match (in_the_way, is_one_sector) {
        (false, _) => old.start,
        (true, true) => list.len(),
        (true, false) => (parts.cluster.len() - name.len()) & !7,
    };
    let clear_of = if is_one_sector { list.len() } else { list.len().max(old.end) };
    let fits = list.len() <= parts.cluster.len() && place + name.len() <= parts.cluster.len();
    if !fits || in_the_way && place < clear_of {
        return None;
    }
    let pointing = |head: &[u8]| {
        let mut head = head.to_vec();
        point_at(&mut head, place, name.len());
        head
    };
    if in_the_way && is_one_sector {
        let mut head = pointing(list);
        head.extend(name);
        take(0, &head);
        return Some(steps);
    }
    if in_the_way {
        take(place, name);
    }
    if let Some(rest) = list.get(SECTOR..).filter(|rest| !rest.is_empty()) {
        take(0, &pointing(short));
        take(SECTOR, rest);
    }
    take(0, &pointing(&list[..list.len().min(SECTOR)]));
    Some(steps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::header::Header;
    use crate::format::rewrite::{NewBacking, change_backing};

    /// The first cluster of an image of version 3 with a backing file of that name.
    fn first_cluster(len: usize, name: &[u8]) -> Vec<u8> {
        let storage = blockmirror_block::testing::MemoryStorage::new();
        let mut options = crate::CreateOptions::new(1 << 20);
        options.cluster_size = len as u64;
        options.create(&storage, None).unwrap();
        let mut cluster = storage.to_vec()[..len].to_vec();
        let new = NewBacking { name, format: Some("raw") };
        for step in change_backing(&cluster, 112, Some(new)).unwrap() {
            cluster[step.at..step.at + step.bytes.len()].copy_from_slice(&step.bytes);
        }
        cluster
    }

    fn as_version_2(cluster: &[u8]) -> NewList<'static> {
        let mut fixed = cluster[..72].to_vec();
        fixed[7] = 2;
        NewList { fixed, data_file: None, feature_names: FeatureNames::Dropped, option: "compat" }
    }

    fn as_version_3(cluster: &[u8]) -> NewList<'static> {
        let mut fixed = cluster[..72].to_vec();
        fixed[7] = 3;
        fixed.resize(112, 0);
        (fixed[99], fixed[103]) = (4, 112);
        let feature_names = FeatureNames::Known;
        NewList { fixed, data_file: None, feature_names, option: "compat" }
    }

    /// After each step, and with each write torn at sectors, the header is the old one or the new one; the
    /// backing file is always the same.
    #[test]
    fn each_step_leaves_the_old_header_or_the_new_one() {
        for (len, name_len) in [
            (512, 20),
            (512, 200),
            (1024, 40),
            (1024, 200),
            (2048, 300),
            (4096, 1023),
            (65536, 1023),
            (65536, 1),
        ] {
            let name = vec![b'n'; name_len];
            let mut cluster = first_cluster(len, &name);
            for version in [2, 3, 2] {
                let old = Header::parse(&cluster).unwrap();
                let new = if version == 2 { as_version_2(&cluster) } else { as_version_3(&cluster) };
                let steps = change_list(&cluster, old.header_length as usize, &new).unwrap();
                for step in steps {
                    let sectors = step.bytes.len().div_ceil(SECTOR);
                    for torn in 0..1 << sectors.min(4) {
                        let mut after = cluster.clone();
                        for (index, piece) in step.bytes.chunks(SECTOR).enumerate() {
                            if torn >> index & 1 == 1 {
                                let at = step.at + index * SECTOR;
                                after[at..at + piece.len()].copy_from_slice(piece);
                            }
                        }
                        let found = Header::parse(&after).unwrap();
                        assert_eq!(found.backing, old.backing, "{len} {name_len}");
                        assert!(found.version == old.version || found.version == version);
                    }
                    cluster[step.at..step.at + step.bytes.len()].copy_from_slice(&step.bytes);
                }
                assert_eq!(Header::parse(&cluster).unwrap().version, version, "{len} {name_len}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_into_the_first_sector_is_refused() {
        let cluster = first_cluster(65536, b"base");
        let name = vec![b'd'; 500];
        let fixed = cluster[..112].to_vec();
        let feature_names = FeatureNames::Kept;
        let new = NewList { fixed, data_file: Some(&name), feature_names, option: "data_file" };
        let error = change_list(&cluster, 112, &new).unwrap_err();
        assert!(error.to_string().starts_with("option data_file: the header's first 512 bytes"), "{error}");
    }
}
