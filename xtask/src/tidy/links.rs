//! Links in Markdown: each relative one leads to a file that exists, and its anchor to a heading there.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use blockmirror_testing::Outcome;

/// Adds links below `root` that lead nowhere to `found`. `files` are the Markdown files to look at.
pub(super) fn check(root: &Path, files: &[PathBuf], found: &mut Vec<String>) -> Outcome {
    let mut known: HashMap<PathBuf, Vec<String>> = HashMap::new();
    for file in files {
        let place = file.strip_prefix(root).unwrap_or(file).display();
        let text = fs::read_to_string(file)?;
        for (line, target) in links(&text) {
            let (path, anchor) = target.split_once('#').map_or((target, None), |(path, at)| (path, Some(at)));
            let folder = file.parent().unwrap_or(root);
            let aim = if path.is_empty() { file.clone() } else { folder.join(path) };
            if !aim.exists() {
                found.push(format!("{place}:{line}: the link leads to no file: {target}"));
                continue;
            }
            let Some(anchor) = anchor.filter(|_| aim.extension().is_some_and(|ext| ext == "md")) else {
                continue;
            };
            if !known.contains_key(&aim) {
                known.insert(aim.clone(), anchors(&fs::read_to_string(&aim)?));
            }
            if !known[&aim].iter().any(|there| there == anchor) {
                found.push(format!("{place}:{line}: the link leads to no heading: {target}"));
            }
        }
    }
    Ok(())
}

/// Lines outside of code blocks, with their numbers from 1 on.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_code = false;
    text.lines().zip(1..).filter_map(move |(line, number)| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        (!is_code && !is_fence).then_some((number, line))
    })
}

/// The targets of relative links.
fn links(text: &str) -> Vec<(usize, &str)> {
    let mut links = Vec::new();
    for (number, line) in prose(text) {
        for (at, _) in line.match_indices("](") {
            // In a code span it is no link.
            if line[..at].matches('`').count() % 2 == 1 {
                continue;
            }
            let target = &line[at + 2..];
            let Some(end) = target.find([')', ' ']) else { continue };
            let target = &target[..end];
            if !target.is_empty() && !target.contains("://") && !target.starts_with("mailto:") {
                links.push((number, target));
            }
        }
    }
    links
}

/// The anchors of the headings, as GitHub and mdBook make them.
fn anchors(text: &str) -> Vec<String> {
    let mut anchors: Vec<String> = Vec::new();
    let mut times: HashMap<String, usize> = HashMap::new();
    for (_, line) in prose(text) {
        let heading = line.trim_start_matches('#');
        if heading.len() == line.len() || !heading.starts_with(' ') {
            anchors.extend(named(line));
            continue;
        }
        let is_kept = |letter: &char| letter.is_alphanumeric() || [' ', '-', '_'].contains(letter);
        let anchor: String = heading.trim().to_lowercase().chars().filter(is_kept).collect();
        let anchor = anchor.replace(' ', "-");
        let earlier = times.entry(anchor.clone()).or_default();
        anchors.push(if *earlier == 0 { anchor } else { format!("{anchor}-{earlier}") });
        *earlier += 1;
    }
    anchors
}

/// Anchors that HTML in the text gives.
fn named(line: &str) -> impl Iterator<Item = String> {
    ["<a id=\"", "<a name=\""].into_iter().flat_map(move |opening| {
        let parts = line.split(opening).skip(1);
        parts.filter_map(|part| part.split_once('"').map(|(name, _)| name.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_headings_are_found() {
        let text = "# A `b`: c\n[x](y.md#z) `[no](link)` [w](https://w.org) ![p](p.png)\n\
                    ```sh\n# no heading\n[no](link)\n```\n## a b c\n<a id=\"d\"></a>\n## E_f-g?\n";
        assert_eq!(links(text), [(2, "y.md#z"), (2, "p.png")]);
        assert_eq!(anchors(text), ["a-b-c", "a-b-c-1", "d", "e_f-g"]);
    }
}
