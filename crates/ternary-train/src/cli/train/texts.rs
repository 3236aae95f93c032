//! The texts of a run: read, checked for shared passages, cut into tokens.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use ternary_train::{Corpus, Leakage, Tokenizer, find_leak, windows_of};

/// Folders of the workspace that hold no prose.
const NOT_PROSE: [&str; 3] = ["target", "fixtures", "reports"];

/// Which texts, and how they are read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::cli) struct Texts {
    text: Vec<PathBuf>,
    val: Vec<PathBuf>,
    val_fraction: f64,
    guard: usize,
    /// Tokens of a BPE; 0: bytes.
    bpe: usize,
    /// Of both texts, so that a resumed training sees the same.
    crc32: Option<u32>,
    /// Of the tokenizer's file.
    #[serde(default)]
    tokenizer_crc32: Option<u32>,
}

/// Texts in tokens.
pub(in crate::cli) struct Data {
    pub(in crate::cli) tokenizer: Tokenizer,
    pub(in crate::cli) train: Vec<u32>,
    pub(in crate::cli) validation: Vec<u32>,
    pub(in crate::cli) leakage: Leakage,
}

impl Texts {
    /// Texts to train on and to measure with; without any, the documentation of this workspace.
    pub(in crate::cli) fn new(
        text: &[PathBuf],
        val: &[PathBuf],
        val_fraction: f64,
        guard: usize,
        bpe: usize,
    ) -> Result<Self> {
        let text = if text.is_empty() {
            ensure!(val.is_empty(), "--val without --text");
            own_prose()?
        } else {
            text.to_vec()
        };
        let (text, val) = (kept("--text", &text)?, kept("--val", val)?);
        let (crc32, tokenizer_crc32) = (None, None);
        let mut texts = Self { text, val, val_fraction, guard, bpe, crc32, tokenizer_crc32 };
        texts.crc32 = Some(checksum(&texts.corpus()?));
        Ok(texts)
    }

    fn corpus(&self) -> Result<Corpus> {
        Ok(if self.val.is_empty() {
            Corpus::by_position(&self.text, self.val_fraction)?
        } else {
            Corpus::by_work(&self.text, &self.val)?
        })
    }

    /// Notes the tokenizer that is in a folder.
    pub(in crate::cli) fn note_tokenizer(&mut self, folder: &Path) -> Result<()> {
        self.tokenizer_crc32 = Some(checksum_of_tokenizer(folder)?);
        Ok(())
    }

    /// [`load`](Self::load) with the tokenizer that was noted.
    pub(in crate::cli) fn load_again(&self, folder: &Path) -> Result<Data> {
        if let Some(sum) = self.tokenizer_crc32 {
            ensure!(
                checksum_of_tokenizer(folder)? == sum,
                "{} in {} has changed since the checkpoint was written",
                Tokenizer::FILE,
                folder.display()
            );
        }
        self.load(Some(folder))
    }

    /// Checks that there is something to train on and to measure with.
    pub(in crate::cli) fn check(&self, data: &Data, length: usize) -> Result<()> {
        let validation = if self.val.is_empty() { "--val-fraction" } else { "--val" };
        for (option, name, text) in
            [("--text", "training", &data.train), (validation, "validation", &data.validation)]
        {
            let tokens = text.len();
            ensure!(
                windows_of(tokens, length) > 0,
                "{option}: the {name} text has {tokens} tokens, a window takes {length} and the one after"
            );
        }
        Ok(())
    }

    /// Reads them; with the tokenizer of a folder, or one that is made now.
    pub(in crate::cli) fn load(&self, tokenizer: Option<&Path>) -> Result<Data> {
        let corpus = self.corpus()?;
        if self.crc32.is_some_and(|sum| sum != checksum(&corpus)) {
            bail!("the texts have changed since the checkpoint was written");
        }
        let leak = find_leak(&corpus.train, &corpus.validation, self.guard);
        let windows = (corpus.validation.len() + 1).saturating_sub(self.guard);
        if let Some(leak) = &leak {
            bail!(
                "the validation text shares {} of its {} windows of {} bytes with the training \
                 text, such as {:?}: measure with another text, cut it elsewhere, or set --guard",
                leak.shared,
                leak.windows,
                self.guard,
                leak.longest.chars().take(160).collect::<String>(),
            );
        }
        let tokenizer = match tokenizer {
            Some(folder) => Tokenizer::read(folder)?,
            None if self.bpe == 0 => Tokenizer::bytes(),
            None => Tokenizer::train_bpe(std::iter::once(&*corpus.train), self.bpe)?,
        };
        let train = tokenizer.encode(&corpus.train)?;
        let validation = tokenizer.encode(&corpus.validation)?;
        let leakage = Leakage { length: self.guard, shared: 0, windows };
        Ok(Data { tokenizer, train, validation, leakage })
    }
}

/// The paths of an option as a checkpoint keeps them: absolute, since a training may be resumed in another folder,
/// and of files that can be read again.
fn kept(option: &str, paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let keep = |path: &PathBuf| {
        let path = std::path::absolute(path)?;
        let name = path.display();
        ensure!(
            path.to_str().is_some(),
            "{option} {name}: a checkpoint keeps the path, which is not UTF-8: give the file another name or folder",
        );
        // That there is nothing is said where it is read.
        ensure!(
            path.is_file() || !path.exists(),
            "{option} {name} is not a regular file: a training reads its texts again when it is resumed, so write \
             the text to a file first",
        );
        Ok(path)
    };
    paths.iter().map(keep).collect()
}

fn checksum_of_tokenizer(folder: &Path) -> Result<u32> {
    let path = folder.join(Tokenizer::FILE);
    let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
    Ok(crc32fast::hash(&bytes))
}

fn checksum(corpus: &Corpus) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(corpus.train.as_bytes());
    sum.update(&[0]);
    sum.update(corpus.validation.as_bytes());
    sum.finalize()
}

/// The workspace that this was built in, unless it was built out of a package or has moved.
fn workspace() -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = own.join("../..").canonicalize().ok()?;
    own.ends_with("crates/ternary-train").then_some(root)
}

/// All pages of documentation of the workspace that this was built in, by name; not the reports, whose
/// tables repeat one another.
fn own_prose() -> Result<Vec<PathBuf>> {
    let root =
        workspace().context("the workspace that this was built in is not here: give --text")?;
    let mut pages = Vec::new();
    let mut folders = vec![root];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() && !name.starts_with('.') && !NOT_PROSE.contains(&&*name) {
                folders.push(path);
            } else if name.ends_with(".md") {
                pages.push(path);
            }
        }
    }
    pages.sort();
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The command that needs no text must pass its own guard.
    #[test]
    fn prose_of_the_workspace_does_not_leak() {
        if workspace().is_none() {
            return eprintln!("SKIPPED: not in the workspace");
        }
        let data = Texts::new(&[], &[], 0.1, 100, 0).unwrap().load(None).unwrap();
        assert!(data.train.len() > 100_000 && data.validation.len() > 10_000);
    }
}
