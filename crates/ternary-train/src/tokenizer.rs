//! From text to tokens and back: single bytes, or byte-level BPE by the `tokenizers` crate.

use std::io::Write;
use std::path::Path;

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, ModelWrapper, SplitDelimiterBehavior};

use crate::Error;
use crate::formats::write_file;

/// Where words end for Qwen's tokenizers, in the notation of their `tokenizer.json`.
const QWEN_WORDS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// A tokenizer.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Bytes,
    Bpe(Box<tokenizers::Tokenizer>),
}

impl Tokenizer {
    /// The file of a tokenizer in a model's folder, as Hugging Face lays it out.
    pub const FILE: &str = "tokenizer.json";

    /// Every byte is a token, whose number is its value: a vocabulary of 256.
    pub fn bytes() -> Self {
        Self { kind: Kind::Bytes }
    }

    /// A byte-level BPE with `vocab_size` tokens, learnt from `texts`: Sennrich, Haddow and Birch,
    /// Neural machine translation of rare words with subword units (2016), with merges inside the
    /// words of Qwen's tokenizers only. Any text can be encoded. Pairs that occur once are not merged,
    /// so a short text may give fewer tokens.
    ///
    /// # Errors
    /// [`Error::Option`] if `vocab_size` is below 256, [`Error::Tokenizer`] if the texts teach nothing.
    pub fn train_bpe<'a>(
        texts: impl Iterator<Item = &'a str> + Send,
        vocab_size: usize,
    ) -> Result<Self, Error> {
        if vocab_size < 256 {
            return Err(Error::option("vocab_size", "at least 256, the bytes", vocab_size));
        }
        let mut tokenizer = Self::byte_level(BPE::default())?;
        let trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut trainer = TrainerWrapper::from(trainer);
        // Line by line, so that no word is longer than a line.
        let lines = texts.flat_map(|text| text.split_inclusive('\n').map(str::to_owned));
        tokenizer.train(&mut trainer, lines).map_err(refused)?;
        Ok(Self { kind: Kind::Bpe(Box::new(tokenizer)) })
    }

    fn byte_level(model: BPE) -> Result<tokenizers::Tokenizer, Error> {
        let pattern = SplitPattern::Regex(QWEN_WORDS.to_owned());
        let split =
            Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(refused)?;
        let bytes = ByteLevel::new(false, false, false);
        let mut tokenizer = tokenizers::Tokenizer::new(ModelWrapper::BPE(model));
        tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
        tokenizer.with_decoder(Some(bytes));
        Ok(tokenizer)
    }

    /// Reads the `tokenizer.json` of a model's folder.
    ///
    /// # Errors
    /// [`Error::File`] if it is missing or no tokenizer.
    pub fn read(folder: &Path) -> Result<Self, Error> {
        let path = folder.join(Self::FILE);
        if !path.exists() {
            return Err(Error::file(&path, "is missing"));
        }
        let tokenizer = tokenizers::Tokenizer::from_file(&path)
            .map_err(|error| Error::file(&path, format!("not a tokenizer: {error}")))?;
        let tokenizer = Self { kind: Kind::Bpe(Box::new(tokenizer)) };
        Ok(if tokenizer.is_bytes() { Self::bytes() } else { tokenizer })
    }

    /// Whether each token is the byte of the same number, and there are no merges.
    fn is_bytes(&self) -> bool {
        self.vocabulary().is_ok_and(|(tokens, merges)| {
            merges.is_empty() && tokens.iter().map(String::as_str).eq(byte_names().iter())
        })
    }

    /// Writes `tokenizer.json` to a folder; Transformers opens it.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        let json = match &self.kind {
            Kind::Bpe(tokenizer) => tokenizer.to_string(true),
            Kind::Bytes => {
                let vocabulary = byte_names().into_iter().zip(0_u32..).collect();
                let model = BPE::new(vocabulary, Vec::new());
                Self::byte_level(model)?.to_string(true)
            }
        };
        let json = json.map_err(refused)?;
        write_file(&folder.join(Self::FILE), |file| file.write_all(json.as_bytes()))
    }

    /// `bytes`, or `bpe-` and the number of tokens.
    pub fn name(&self) -> String {
        match &self.kind {
            Kind::Bytes => "bytes".to_owned(),
            Kind::Bpe(_) => format!("bpe-{}", self.vocab_size()),
        }
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        match &self.kind {
            Kind::Bytes => 256,
            Kind::Bpe(tokenizer) => tokenizer.get_vocab_size(true),
        }
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer has no token for part of it; ours always have.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        match &self.kind {
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Kind::Bpe(tokenizer) => {
                Ok(tokenizer.encode_fast(text, false).map_err(refused)?.get_ids().to_vec())
            }
        }
    }

    /// The bytes that a token stands for; none for a token that does not exist.
    pub fn token_bytes(&self, token: u32) -> Vec<u8> {
        match &self.kind {
            Kind::Bytes => u8::try_from(token).into_iter().collect(),
            Kind::Bpe(tokenizer) => {
                let Some(name) = tokenizer.id_to_token(token) else { return Vec::new() };
                let added: &std::collections::HashMap<u32, AddedToken, _> =
                    &tokenizer.get_added_tokens_decoder();
                if added.contains_key(&token) {
                    return name.into_bytes();
                }
                // A name outside the alphabet stands for itself.
                let bytes: Option<Vec<u8>> = name.chars().map(byte_of).collect();
                bytes.unwrap_or_else(|| name.into_bytes())
            }
        }
    }

    /// The text of some tokens; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|&token| self.token_bytes(token)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether a token that was added to the vocabulary is special; `None` if it was not added.
    pub(crate) fn added(&self, token: u32) -> Option<bool> {
        match &self.kind {
            Kind::Bytes => None,
            Kind::Bpe(tokenizer) => {
                tokenizer.get_added_tokens_decoder().get(&token).map(|added| added.special)
            }
        }
    }

    /// Names of all tokens in the alphabet of GPT-2, by number, and the merges in order.
    pub(crate) fn vocabulary(&self) -> Result<(Vec<String>, Vec<String>), Error> {
        let Kind::Bpe(tokenizer) = &self.kind else {
            return Ok((byte_names(), Vec::new()));
        };
        if !matches!(tokenizer.get_model(), ModelWrapper::BPE(_)) {
            return Err(Error::option("tokenizer", "a byte-level BPE", "another kind"));
        }
        let tokens = (0..self.vocab_size() as u32).map(|id| {
            let name = tokenizer.id_to_token(id);
            name.ok_or_else(|| Error::option("tokenizer", "tokens without gaps", id))
        });
        // The library has the merges as pairs of numbers, and shows them in its JSON only.
        let json = tokenizer.to_string(false).map_err(refused)?;
        let json: serde_json::Value = serde_json::from_str(&json).map_err(|e| refused(e.into()))?;
        let merges = json["model"]["merges"].as_array().into_iter().flatten();
        let merges = merges.map(|merge| match merge {
            serde_json::Value::Array(pair) => {
                let parts = pair.iter().filter_map(serde_json::Value::as_str);
                parts.collect::<Vec<_>>().join(" ")
            }
            merge => merge.as_str().unwrap_or_default().to_owned(),
        });
        Ok((tokens.collect::<Result<_, _>>()?, merges.collect()))
    }
}

/// The character that stands for a byte in GPT-2's alphabet: itself if it can be printed, else one from
/// U+0100 on.
pub(crate) fn name_of(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&byte| !printable(byte)).count() as u32;
    char::from_u32(0x100 + before).unwrap_or_default()
}

fn byte_of(name: char) -> Option<u8> {
    match u32::from(name) {
        code @ 0x00..=0xFF => Some(code as u8).filter(|&byte| name_of(byte) == name),
        _ => (0..=255).find(|&byte| name_of(byte) == name),
    }
}

fn byte_names() -> Vec<String> {
    (0..=255).map(|byte| name_of(byte).to_string()).collect()
}

fn refused(error: tokenizers::Error) -> Error {
    Error::Tokenizer(error.to_string())
}
