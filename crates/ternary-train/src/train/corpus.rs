//! Texts, and how they are split.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Error;

/// A text to train on, and one to measure with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corpus {
    /// To train on.
    pub train: String,
    /// To measure with.
    pub validation: String,
}

impl Corpus {
    /// Works to train on and others to measure with, each in the order given. A file that does not end with a
    /// newline gets one, so that the next one begins a line.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read, [`Error::File`] if it is empty or not UTF-8.
    pub fn by_work(train: &[PathBuf], validation: &[PathBuf]) -> Result<Self, Error> {
        Ok(Self { train: read_all(train)?, validation: read_all(validation)? })
    }

    /// The last `fraction` of the texts, one contiguous piece cut at a line, to measure with; cut at a
    /// character if no line begins in it.
    ///
    /// # Errors
    /// As [`by_work`](Self::by_work), and [`Error::Option`] if the fraction is not between 0 and 1.
    pub fn by_position(texts: &[PathBuf], fraction: f64) -> Result<Self, Error> {
        Self::split(read_all(texts)?, fraction)
    }

    /// The same for a text at hand.
    ///
    /// # Errors
    /// [`Error::Option`] if the fraction is not between 0 and 1.
    pub fn split(mut text: String, fraction: f64) -> Result<Self, Error> {
        if !(fraction > 0.0 && fraction < 1.0) {
            return Err(Error::option("val-fraction", "a number between 0 and 1", fraction));
        }
        let at = (text.len() as f64 * (1.0 - fraction)) as usize;
        // The newline that ends the text would leave nothing.
        let last = text.len().saturating_sub(1).max(at);
        let line = text.as_bytes()[at..last].iter().position(|&byte| byte == b'\n');
        let at = match line {
            Some(line) => at + line + 1,
            None => text.floor_char_boundary(at),
        };
        let validation = text.split_off(at);
        Ok(Self { train: text, validation })
    }
}

/// Files one after the other, each ending a line.
fn read_all(paths: &[PathBuf]) -> Result<String, Error> {
    let mut all = String::new();
    for path in paths {
        all.push_str(&read(path)?);
        if !all.ends_with('\n') {
            all.push('\n');
        }
    }
    Ok(all)
}

fn read(path: &Path) -> Result<String, Error> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    if bytes.is_empty() {
        return Err(Error::file(path, "the file is empty"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::file(path, format!("not UTF-8: byte {at} begins no character"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_cut_at_a_line_and_nothing_is_lost() {
        let text: String = (0..100).map(|i| format!("line {i}\n")).collect();
        let corpus = Corpus::split(text.clone(), 0.1).unwrap();
        assert_eq!(corpus.train.clone() + &corpus.validation, text);
        assert!(corpus.train.ends_with('\n') && corpus.validation.starts_with("line "));
        assert!((70..=90).contains(&corpus.validation.len()));
        let corpus = Corpus::split("\u{e4}\u{f6}\u{fc}".repeat(5), 0.5).unwrap();
        assert_eq!(corpus.train.len() + corpus.validation.len(), 30);
        assert!(Corpus::split(text, 1.0).is_err());
        // The one newline at the end is no place to cut.
        let corpus = Corpus::split("x".repeat(99) + "\n", 0.1).unwrap();
        assert_eq!((corpus.train.len(), corpus.validation.len()), (90, 10));
    }
}
