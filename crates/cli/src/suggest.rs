//! What a mistyped word may have been meant to be.
//!
//! Used for formats and for the keys of `-o`; commands, options and their values are compared by `clap` in
//! the same way.

/// How much alike two words must be, from 0 to 1.
const ALIKE: f64 = 0.8;

/// `; did you mean ..?`, with those of `known` that `word` is the beginning of, or else the one that is most
/// like it; nothing if none is.
pub(crate) fn did_you_mean<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known: Vec<_> = known.into_iter().collect();
    let lower = word.to_lowercase();
    let longer: Vec<_> =
        known.iter().copied().filter(|name| lower.len() > 1 && name.starts_with(&lower)).collect();
    if !longer.is_empty() {
        return question(&longer);
    }
    let alike = |name: &&str| strsim::jaro(&lower, name);
    let best = known.into_iter().max_by(|a, b| alike(a).total_cmp(&alike(b)));
    best.filter(|name| alike(name) >= ALIKE).map_or_else(String::new, |name| question(&[name]))
}

/// The question with `names`.
pub(crate) fn question(names: &[&str]) -> String {
    format!("; did you mean {}?", names.join(" or "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_are_alike_are_found() {
        let formats = ["raw", "qcow2"];
        for (word, meant) in [
            ("qcow", "; did you mean qcow2?"),
            ("QCOW2", "; did you mean qcow2?"),
            ("qcwo2", "; did you mean qcow2?"),
            ("raww", "; did you mean raw?"),
            ("vmdk", ""),
            ("vhdx", ""),
            ("r", ""),
            ("", ""),
        ] {
            assert_eq!(did_you_mean(word, formats), meant, "{word}");
        }
        let keys = ["backing_file", "backing_fmt", "cluster_size", "compat", "size"];
        assert_eq!(did_you_mean("backing", keys), "; did you mean backing_file or backing_fmt?");
        assert_eq!(did_you_mean("clustersize", keys), "; did you mean cluster_size?");
        assert_eq!(did_you_mean("encrypt", keys), "");
    }
}
