//! Prints the generated part of `docs/book/src/reference.md`. `cargo xtask docs` runs it.

mod page;

fn main() {
    print!("{}", page::reference(blockmirror_cli::definition()));
}
