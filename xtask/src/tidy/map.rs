//! What ARCHITECTURE.md says: the crates in their order with their arrows, and the dependencies with their
//! reasons. Both are tables; a row starts with a name in backquotes.

/// A row of the crate table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CrateRow {
    /// The crate's short name: the folder under `crates/`.
    pub(super) name: String,
    /// Short names of the crates it depends on.
    pub(super) arrows: Vec<String>,
}

/// The two tables.
#[derive(Debug)]
pub(super) struct Map {
    /// Lowest first.
    pub(super) crates: Vec<CrateRow>,
    /// Names of the dependencies that have an entry.
    pub(super) dependencies: Vec<String>,
}

impl Map {
    /// Reads the tables under the headings `## The crates` and `## Dependencies`.
    pub(super) fn parse(text: &str) -> Self {
        let crates = rows(text, "## The crates")
            .filter_map(|cells| {
                let name = unquote(cells.first()?)?;
                let arrows = cells.last()?.split(',').filter_map(unquote).collect();
                Some(CrateRow { name, arrows })
            })
            .collect();
        let dependencies =
            rows(text, "## Dependencies").filter_map(|cells| unquote(cells.first()?)).collect();
        Self { crates, dependencies }
    }
}

/// The cells of each table row between `heading` and the next heading of its rank.
fn rows<'a>(text: &'a str, heading: &'a str) -> impl Iterator<Item = Vec<&'a str>> {
    text.lines()
        .skip_while(move |line| line.trim_end() != heading)
        .skip(1)
        .take_while(|line| !line.starts_with("## "))
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
}

fn unquote(cell: &str) -> Option<String> {
    let inner = cell.trim().strip_prefix('`')?;
    Some(inner[..inner.find('`')?].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_read_and_the_rest_is_not() {
        let map = Map::parse(
            "# A\n| `no` | - |\n## The crates\n\n| crate | job | on |\n|---|---|---|\n| `a` | does `x` | - |\n\
             | `b` | more | `a`, `c` |\n## Dependencies\n| `serde` | json |\n## End\n| `z` | - |\n",
        );
        let row = |name: &str, arrows: &[&str]| CrateRow {
            name: name.to_owned(),
            arrows: arrows.iter().map(|a| (*a).to_owned()).collect(),
        };
        assert_eq!(map.crates, [row("a", &[]), row("b", &["a", "c"])]);
        assert_eq!(map.dependencies, ["serde"]);
    }
}
