//! Words as a shell reads them, for commands that are printed to be pasted.

use std::ffi::OsString;

/// `text` as one word of a shell command.
pub(crate) fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The command of an NBD server in its brackets, as an image is named by it.
pub(crate) fn in_brackets(command: &[OsString]) -> String {
    let words = command.iter().map(|word| shell_word(&word.to_string_lossy()));
    let words: Vec<_> = std::iter::once("[".to_owned()).chain(words).chain(["]".to_owned()]).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_can_be_pasted() {
        assert_eq!(shell_word("/srv/images"), "/srv/images");
        assert_eq!(shell_word("/srv/my images"), "'/srv/my images'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
        let command = ["nbdkit", "file", "a b"].map(OsString::from);
        assert_eq!(in_brackets(&command), "[ nbdkit file 'a b' ]");
    }
}
