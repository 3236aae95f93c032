//! Commands that people repeat.

/// Words as a shell takes them apart again: quoted where they have something that it would not take literally.
///
/// # Examples
/// ```
/// use ternary_train::shell_line;
///
/// assert_eq!(shell_line(&["cat", "it's 1.txt", ""]), r"cat 'it'\''s 1.txt' ''");
/// ```
pub fn shell_line<S: AsRef<str>>(words: &[S]) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_+=:,./@%".contains(c);
    let quoted = |word: &str| {
        if !word.is_empty() && word.chars().all(is_plain) {
            word.to_owned()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    words.iter().map(|word| quoted(word.as_ref())).collect::<Vec<_>>().join(" ")
}
