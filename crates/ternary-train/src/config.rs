//! The shape of a model, read from and written to the `config.json` of the Hugging Face layout.

use std::fmt::{self, Formatter};
use std::fs;
use std::path::Path;
use std::str::FromStr;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use crate::{Error, Projection, TrainOptions};

/// The longest `config.json`, in bytes; they have one or two thousand. Messages of the parser repeat what
/// they are about, several times over.
const LONGEST: usize = 32 << 10;

/// The most end tokens that a `config.json` may list.
const MOST_EOS: usize = 1024;

/// The shape of a Qwen3 model.
///
/// Names are those of Transformers' `Qwen3Config`. Linear layers have no biases, q and k are
/// normalised per head, the activation is SwiGLU; none of that varies.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads, a multiple of `num_key_value_heads`.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Size of each head, even; `num_attention_heads * head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Positions that the model was made for.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Tokens that end a text; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// How the matrices were made ternary; `None`: they are float. Stored in `config.json` under
    /// `ternary`, a key that Transformers passes over.
    pub ternary: Option<Projection>,
}

/// A model shape with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Preset {
    /// 4 layers, width 128, 4 heads on 2 of size 32, feed-forward 384: 0.8M weights.
    Nano,
    /// 4 layers, width 256, 4 heads on 2 of size 64, feed-forward 768: 3.2M weights.
    Small,
    /// 6 layers, width 512, 8 heads on 4 of size 64, feed-forward 1536: 19M weights.
    PathB,
}

impl Preset {
    /// All presets, the smallest first.
    pub const ALL: [Self; 3] = [Self::Nano, Self::Small, Self::PathB];

    /// The name that [`FromStr`] takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nano => "nano",
            Self::Small => "small",
            Self::PathB => "path-b",
        }
    }

    /// The configuration, with a tied head.
    pub fn config(self, vocab_size: usize) -> Config {
        let (layers, hidden, heads, head_dim, intermediate) = match self {
            Self::Nano => (4, 128, 4, 32, 384),
            Self::Small => (4, 256, 4, 64, 768),
            Self::PathB => (6, 512, 8, 64, 1536),
        };
        // For contexts of 64 and 128 tokens: with Qwen3's 10,000 and more, half of the frequencies hardly turn.
        let rope_theta = if self == Self::Nano { 50.0 } else { 100.0 };
        Config {
            vocab_size,
            hidden_size: hidden,
            intermediate_size: intermediate,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads / 2,
            head_dim,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            rope_theta,
            tie_word_embeddings: true,
            eos_token_ids: Vec::new(),
            ternary: None,
        }
    }

    /// How it is trained: the recipe that `docs/ternary.md` measures, for ternary weights or their float twin.
    pub fn options(self, float: bool) -> TrainOptions {
        let plain = TrainOptions { beta1: 0.8, ..TrainOptions::default() };
        let of_preset = match self {
            Self::Nano => TrainOptions {
                steps: 2000,
                sequences: 12,
                length: 64,
                learning_rate: 2.5e-3,
                warmup: 40,
                decay: 0.5,
                final_rate: 0.01,
                ..plain
            },
            Self::Small => TrainOptions {
                steps: 3000,
                sequences: 32,
                length: 128,
                learning_rate: 2e-3,
                ..plain
            },
            Self::PathB => TrainOptions {
                steps: 1000,
                sequences: 16,
                length: 128,
                learning_rate: 1.5e-3,
                ..plain
            },
        };
        if float {
            TrainOptions { learning_rate: 2e-3, ..of_preset }
        } else {
            TrainOptions { embedding_rate: 0.5, residual_rate: 0.35, ..of_preset }
        }
    }
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|preset| preset.name() == name).ok_or_else(|| Error::Option {
            option: "preset",
            expected: "nano, small or path-b".to_owned(),
            got: name.to_owned(),
        })
    }
}

/// `config.json` as far as it matters here; other keys are passed over.
#[derive(Deserialize)]
struct Stored {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_parameters: Option<Rope>,
    rope_scaling: Option<Scaling>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    hidden_act: Option<String>,
    use_sliding_window: Option<bool>,
    eos_token_id: Option<Tokens>,
    ternary: Option<Projection>,
}

#[derive(Deserialize)]
struct Rope {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Scaling {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    #[serde(rename = "type")]
    old_type: Option<String>,
}

/// One token or a list of them.
struct Tokens(Vec<u32>);

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TokensVisitor)
    }
}

struct TokensVisitor;

impl<'de> Visitor<'de> for TokensVisitor {
    type Value = Tokens;

    fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "a token or a list of at most {MOST_EOS}")
    }

    fn visit_u64<E: de::Error>(self, token: u64) -> Result<Tokens, E> {
        let token = u32::try_from(token);
        Ok(Tokens(vec![token.map_err(|_| E::custom("a token is below 2^32"))?]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Tokens, A::Error> {
        let mut tokens = Vec::new();
        while let Some(token) = list.next_element()? {
            if tokens.len() == MOST_EOS {
                return Err(de::Error::invalid_length(MOST_EOS + 1, &self));
            }
            tokens.push(token);
        }
        Ok(Tokens(tokens))
    }
}

/// The beginning of a value that may be any text of the file.
fn brief(value: &str) -> &str {
    value.get(..value.floor_char_boundary(60)).unwrap_or_default()
}

impl Config {
    /// Reads a `config.json`. `rope_theta` may stand at the top level (Transformers 4) or inside
    /// `rope_parameters` or a `rope_scaling` of type `default` (Transformers 5), which then counts.
    ///
    /// Sizes must be there, but for `num_key_value_heads` (as many as `num_attention_heads`, not 32 as
    /// in `Qwen3Config`) and those with a default of `Qwen3Config`: `head_dim` (128) and
    /// `max_position_embeddings` (32768). So have `rms_norm_eps` (1e-6), `rope_theta` (10,000) and
    /// `tie_word_embeddings` (false). Without `eos_token_id` no token ends a text.
    ///
    /// # Errors
    /// [`Error::Config`] if it is not JSON, lacks a key, is no Qwen3 model, or asks for what this
    /// crate does not compute: biases, rope scaling, sliding windows.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let refuse = |what: String| Err(Error::Config(what));
        if text.len() > LONGEST {
            return refuse(format!("it has {} bytes, expected at most {LONGEST}", text.len()));
        }
        let stored: Stored =
            serde_json::from_str(text).map_err(|error| Error::Config(error.to_string()))?;
        if stored.model_type != "qwen3" {
            return refuse(format!(
                "`model_type` is `{}`, expected `qwen3`",
                brief(&stored.model_type)
            ));
        }
        if stored.attention_bias == Some(true) {
            return refuse("`attention_bias` is true; Qwen3 layers have no biases here".to_owned());
        }
        if stored.use_sliding_window == Some(true) {
            return refuse("`use_sliding_window` is true, expected false".to_owned());
        }
        if let Some(activation) = stored.hidden_act.filter(|activation| activation != "silu") {
            let activation = brief(&activation);
            return refuse(format!("`hidden_act` is `{activation}`, expected `silu`"));
        }
        let rope_type = stored.rope_parameters.as_ref().and_then(|rope| rope.rope_type.as_deref());
        if let Some(kind) = rope_type.filter(|&kind| kind != "default") {
            return refuse(format!("`rope_type` is `{}`, expected `default`", brief(kind)));
        }
        if let Some(scaling) = &stored.rope_scaling {
            let is_default = |kind: &Option<String>| kind.as_deref() == Some("default");
            if !is_default(&scaling.rope_type) && !is_default(&scaling.old_type) {
                let kind = scaling.rope_type.as_deref().or(scaling.old_type.as_deref());
                let kind = brief(kind.unwrap_or_default());
                return refuse(format!("`rope_scaling` is `{kind}`, expected null"));
            }
        }
        // As in Transformers 5: inside before outside, and the old name of the object before the new one.
        let old = stored.rope_scaling.and_then(|rope| rope.rope_theta);
        let inside = old.or(stored.rope_parameters.and_then(|rope| rope.rope_theta));
        let config = Self {
            vocab_size: stored.vocab_size,
            hidden_size: stored.hidden_size,
            intermediate_size: stored.intermediate_size,
            num_hidden_layers: stored.num_hidden_layers,
            num_attention_heads: stored.num_attention_heads,
            num_key_value_heads: stored.num_key_value_heads.unwrap_or(stored.num_attention_heads),
            head_dim: stored.head_dim.unwrap_or(128),
            max_position_embeddings: stored.max_position_embeddings.unwrap_or(32768),
            rms_norm_eps: stored.rms_norm_eps.unwrap_or(1e-6),
            rope_theta: inside.or(stored.rope_theta).unwrap_or(1e4),
            tie_word_embeddings: stored.tie_word_embeddings.unwrap_or(false),
            eos_token_ids: stored.eos_token_id.map_or_else(Vec::new, |tokens| tokens.0),
            ternary: stored.ternary,
        };
        config.check()?;
        Ok(config)
    }

    /// Reads the file `path`.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::File`] for what [`from_json`](Self::from_json)
    /// refuses.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = fs::read_to_string(path).map_err(Error::io(path))?;
        Self::from_json(&text).map_err(|error| Error::file(path, error.to_string()))
    }

    /// The `config.json` that Transformers 4 and 5 read.
    pub fn to_json(&self) -> String {
        let mut value = json!({
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": null,
            "eos_token_id": match self.eos_token_ids.as_slice() {
                [] => Value::Null,
                [id] => json!(id),
                ids => json!(ids),
            },
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "qwen3",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": "float32",
            "use_cache": true,
            "use_sliding_window": false,
            "vocab_size": self.vocab_size,
        });
        if let (Some(ternary), Some(object)) = (self.ternary, value.as_object_mut()) {
            object.insert("ternary".to_owned(), json!(ternary));
        }
        format!("{value:#}\n")
    }

    /// Checks that the sizes make a model.
    ///
    /// # Errors
    /// [`Error::Config`] names the first that does not fit.
    pub fn check(&self) -> Result<(), Error> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (name, size) in sizes {
            if size == 0 || size > i32::MAX as usize {
                return Err(Error::Config(format!("`{name}` is {size}, expected 1 to 2^31 - 1")));
            }
        }
        let (heads, key_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(key_heads) {
            let what = "expected a multiple of `num_key_value_heads`";
            return Err(Error::Config(format!(
                "`num_attention_heads` is {heads}, {what} = {key_heads}"
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            let what = format!("`head_dim` is {}, expected an even number", self.head_dim);
            return Err(Error::Config(what));
        }
        for (name, value) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)]
        {
            if !(value.is_finite() && value > 0.0) {
                let what = format!("`{name}` is {value}, expected a positive number");
                return Err(Error::Config(what));
            }
        }
        if let Some(id) = self.eos_token_ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            let what = format!("`eos_token_id` is {id}, expected below `vocab_size`");
            return Err(Error::Config(format!("{what} = {}", self.vocab_size)));
        }
        if self.checked_parameters().is_none() {
            return Err(Error::Config(
                "the sizes make more weights than can be addressed".to_owned(),
            ));
        }
        self.ternary.map_or(Ok(()), |ternary| ternary.check())
    }

    /// Rows of the q matrix: heads times head size.
    pub fn query_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Rows of the k and v matrices: key heads times head size.
    pub fn key_value_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Number of weights in all matrices and norms; a tied head counts once. `usize::MAX` if
    /// [`check`](Self::check) refuses the configuration because there are too many.
    pub fn parameters(&self) -> usize {
        self.checked_parameters().unwrap_or(usize::MAX)
    }

    /// The number of weights, if their bytes in f64 can be counted: then no size of a part overflows.
    fn checked_parameters(&self) -> Option<usize> {
        let wide = |size: usize| size as u128;
        let (width, inside) = (wide(self.hidden_size), wide(self.intermediate_size));
        let heads = wide(self.num_attention_heads) + wide(self.num_key_value_heads);
        let attention = width.checked_mul(2 * heads * wide(self.head_dim))?;
        let norms = 2 * width + 2 * wide(self.head_dim);
        let layer = attention.checked_add(3 * width * inside + norms)?;
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        let tables = tables * wide(self.vocab_size) * width + width;
        let all = wide(self.num_hidden_layers).checked_mul(layer)?.checked_add(tables)?;
        usize::try_from(all).ok().filter(|&all| all <= isize::MAX as usize / size_of::<f64>())
    }
}
