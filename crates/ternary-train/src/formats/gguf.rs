//! Export to GGUF (version 3), the format of llama.cpp, for its architecture `qwen3`.
//!
//! Ternary matrices become type `Q2_0`, id 42: blocks of 64 weights, an f16 scale, then 16 bytes with
//! weight `j` in bits `2 (j % 4)` of byte `j / 4`, as code plus 1. A group of 128 becomes two blocks of
//! the same scale, so nothing is lost.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use ndarray::Array2;
use tensor_utils::f16;

use super::check_finite;
use super::new_file::write_file;
use crate::ops::slice;
use crate::tokenizer::name_of;
use crate::{Config, Error, Ternary, Tokenizer, Weights};

const ALIGNMENT: usize = 32;
/// Weights of a `Q2_0` block.
const BLOCK: usize = 64;
/// Its bytes.
const BLOCK_BYTES: usize = 18;

/// Types of tensors.
const F32: u32 = 0;
const Q2_0: u32 = 42;
/// Types of the file as a whole.
const ALL_F32: u32 = 0;
const MOSTLY_Q2_0: u32 = 41;

/// Types of metadata values.
const UINT32: u32 = 4;
const INT32: u32 = 5;
const FLOAT32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// A tensor of the file: `columns` is its fastest axis.
struct Tensor<'a> {
    name: String,
    rows: usize,
    columns: usize,
    data: Data<'a>,
}

enum Data<'a> {
    Float(&'a [f32]),
    /// A matrix, its elements and the group size.
    Ternary(&'a Array2<f32>, &'a [f32], usize),
}

/// Writes a model with its tokenizer to the file `path`, which appears at once or not at all: `Q2_0` if
/// `config.ternary` is set, else f32. If the configuration names no end token, it is the token of byte
/// 0xFF, which no text contains; if it names several, the file has the first alone.
///
/// # Errors
/// [`Error::Config`] and [`Error::Shape`] if the weights are not those of the configuration, or have a
/// shape or group size that blocks of 64 do not divide; [`Error::Op`] if they are not row-major;
/// [`Error::Group`] if they are not ternary; [`Error::Option`] if the tokenizer has more tokens than the
/// vocabulary, or is not a byte-level BPE; [`Error::File`] if a float weight is not finite,
/// or if `path` is something else than a regular file or a symbolic link to one;
/// [`Error::Io`] if the file cannot be written.
pub fn write_gguf(
    path: &Path,
    config: &Config,
    weights: &Weights,
    tokenizer: &Tokenizer,
) -> Result<(), Error> {
    weights.check(config)?;
    let tensors = tensors(config, weights)?;
    let header = header(config, tokenizer, &tensors)?;
    // Everything that can be wrong with the weights shows before anything is written.
    for tensor in &tensors {
        match tensor.data {
            Data::Float(values) => check_finite(path, &tensor.name, values)?,
            Data::Ternary(w, _, group) => {
                Ternary::of_ternary(w, group).map_err(|error| error.in_matrix(&tensor.name))?;
            }
        }
    }
    write_file(path, |file| write(file, &header, &tensors))
}

fn tensors<'a>(config: &Config, weights: &'a Weights) -> Result<Vec<Tensor<'a>>, Error> {
    let group = config.ternary.map(|projection| projection.group);
    let mut tensors = Vec::new();
    for named in weights.matrices() {
        let (rows, columns) = named.weight.dim();
        let data = match group {
            None => Data::Float(slice("weights", named.weight.view())?),
            Some(group) => {
                check_blocks(&named.name, columns, group)?;
                Data::Ternary(named.weight, slice("weights", named.weight.view())?, group)
            }
        };
        tensors.push(Tensor { name: gguf_name(&named.name), rows, columns, data });
    }
    for named in weights.norms() {
        let values = slice("weights", named.weight.view())?;
        let (name, columns) = (gguf_name(&named.name), values.len());
        tensors.push(Tensor { name, rows: 1, columns, data: Data::Float(values) });
    }
    Ok(tensors)
}

/// Checks that every block of a ternary matrix has one scale.
///
/// # Errors
/// [`Error::Config`] if blocks of 64 do not divide its columns and its groups.
pub(crate) fn check_blocks(name: &str, columns: usize, group: usize) -> Result<(), Error> {
    if columns.is_multiple_of(BLOCK) && group.is_multiple_of(BLOCK) {
        return Ok(());
    }
    let what = "GGUF's Q2_0 needs multiples of 64";
    Err(Error::Config(format!("`{name}` has {columns} columns in groups of {group}; {what}")))
}

/// The name of a tensor in llama.cpp.
fn gguf_name(name: &str) -> String {
    const PARTS: &[(&str, &str)] = &[
        ("model.embed_tokens", "token_embd"),
        ("model.layers", "blk"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    PARTS.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// Metadata in the making.
#[derive(Default)]
struct Metadata {
    bytes: Vec<u8>,
    count: u64,
}

impl Metadata {
    fn key(&mut self, key: &str, kind: u32) {
        self.count += 1;
        string(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
    }

    fn u32(&mut self, key: &str, value: usize) -> Result<(), Error> {
        let value = u32::try_from(value)
            .map_err(|_| Error::Config(format!("`{key}` is {value}, above 2^32")))?;
        self.key(key, UINT32);
        self.bytes.extend(value.to_le_bytes());
        Ok(())
    }

    fn f32(&mut self, key: &str, value: f64) {
        self.key(key, FLOAT32);
        self.bytes.extend((value as f32).to_le_bytes());
    }

    fn bool(&mut self, key: &str, value: bool) {
        self.key(key, BOOL);
        self.bytes.push(value.into());
    }

    fn string(&mut self, key: &str, value: &str) {
        self.key(key, STRING);
        string(&mut self.bytes, value);
    }

    fn array(&mut self, key: &str, kind: u32, len: usize) {
        self.key(key, ARRAY);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((len as u64).to_le_bytes());
    }

    fn strings(&mut self, key: &str, values: &[String]) {
        self.array(key, STRING, values.len());
        values.iter().for_each(|value| string(&mut self.bytes, value));
    }
}

fn string(bytes: &mut Vec<u8>, value: &str) {
    bytes.extend((value.len() as u64).to_le_bytes());
    bytes.extend(value.as_bytes());
}

/// All that comes before the tensors' data.
fn header(
    config: &Config,
    tokenizer: &Tokenizer,
    tensors: &[Tensor<'_>],
) -> Result<Vec<u8>, Error> {
    let mut metadata = Metadata::default();
    metadata.string("general.architecture", "qwen3");
    metadata.string("general.name", "ternary-train");
    let file_type = if config.ternary.is_some() { MOSTLY_Q2_0 } else { ALL_F32 };
    metadata.u32("general.alignment", ALIGNMENT)?;
    metadata.u32("general.file_type", file_type as usize)?;
    metadata.u32("general.quantization_version", 2)?;
    metadata.u32("qwen3.block_count", config.num_hidden_layers)?;
    metadata.u32("qwen3.context_length", config.max_position_embeddings)?;
    metadata.u32("qwen3.embedding_length", config.hidden_size)?;
    metadata.u32("qwen3.feed_forward_length", config.intermediate_size)?;
    metadata.u32("qwen3.attention.head_count", config.num_attention_heads)?;
    metadata.u32("qwen3.attention.head_count_kv", config.num_key_value_heads)?;
    metadata.u32("qwen3.attention.key_length", config.head_dim)?;
    metadata.u32("qwen3.attention.value_length", config.head_dim)?;
    metadata.f32("qwen3.attention.layer_norm_rms_epsilon", config.rms_norm_eps);
    metadata.f32("qwen3.rope.freq_base", config.rope_theta);
    metadata.u32("qwen3.vocab_size", config.vocab_size)?;
    tokenizer_metadata(&mut metadata, config, tokenizer)?;

    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3_u32.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend(metadata.count.to_le_bytes());
    bytes.extend(metadata.bytes);
    let mut offset = 0_u64;
    for tensor in tensors {
        string(&mut bytes, &tensor.name);
        let is_vector = tensor.name.ends_with("norm.weight");
        let axes = if is_vector { &[tensor.columns][..] } else { &[tensor.columns, tensor.rows] };
        bytes.extend((axes.len() as u32).to_le_bytes());
        axes.iter().for_each(|&axis| bytes.extend((axis as u64).to_le_bytes()));
        let kind = if matches!(tensor.data, Data::Float(_)) { F32 } else { Q2_0 };
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        offset += tensor.bytes().next_multiple_of(ALIGNMENT) as u64;
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    Ok(bytes)
}

fn tokenizer_metadata(
    metadata: &mut Metadata,
    config: &Config,
    tokenizer: &Tokenizer,
) -> Result<(), Error> {
    /// A token of text, one that was added to do something or to stay whole, and one that is only
    /// there to fill the vocabulary.
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const USER_DEFINED: i32 = 4;
    const UNUSED: i32 = 5;
    let (mut tokens, merges) = tokenizer.vocabulary()?;
    if tokens.len() > config.vocab_size {
        let expected = format!("at most {} tokens, the vocabulary's size", config.vocab_size);
        return Err(Error::option("tokenizer", expected, tokens.len()));
    }
    let known = tokens.len();
    tokens.extend((known..config.vocab_size).map(|id| format!("[UNUSED{id}]")));
    metadata.string("tokenizer.ggml.model", "gpt2");
    metadata.string("tokenizer.ggml.pre", "qwen2");
    metadata.strings("tokenizer.ggml.tokens", &tokens);
    metadata.array("tokenizer.ggml.token_type", INT32, tokens.len());
    for id in 0..tokens.len() {
        let kind = match tokenizer.added(id as u32) {
            Some(true) => CONTROL,
            Some(false) => USER_DEFINED,
            None if id < known => NORMAL,
            None => UNUSED,
        };
        metadata.bytes.extend(kind.to_le_bytes());
    }
    metadata.strings("tokenizer.ggml.merges", &merges);
    metadata.bool("tokenizer.ggml.add_bos_token", false);
    // Without an end token llama.cpp takes number 11, which in a vocabulary of ours is a token of text, such
    // as a comma, and stops there. Byte 0xFF never occurs in UTF-8.
    let end = match config.eos_token_ids.first() {
        Some(&id) => Some(id as usize),
        None => tokens.iter().position(|name| *name == name_of(0xFF).to_string()),
    };
    if let Some(id) = end {
        metadata.u32("tokenizer.ggml.eos_token_id", id)?;
    }
    Ok(())
}

impl Tensor<'_> {
    fn bytes(&self) -> usize {
        match self.data {
            Data::Float(values) => 4 * values.len(),
            Data::Ternary(..) => self.rows * self.columns / BLOCK * BLOCK_BYTES,
        }
    }
}

fn write(file: &mut fs::File, header: &[u8], tensors: &[Tensor<'_>]) -> std::io::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, file);
    file.write_all(header)?;
    for tensor in tensors {
        match tensor.data {
            Data::Float(values) => {
                for value in values {
                    file.write_all(&value.to_le_bytes())?;
                }
            }
            Data::Ternary(_, values, _) => {
                for block in values.as_chunks::<BLOCK>().0 {
                    file.write_all(&q2_0(block))?;
                }
            }
        }
        let bytes = tensor.bytes();
        file.write_all(&vec![0; bytes.next_multiple_of(ALIGNMENT) - bytes])?;
    }
    file.flush()
}

/// A block of weights that are `{-s, 0, s}`.
fn q2_0(w: &[f32; BLOCK]) -> [u8; BLOCK_BYTES] {
    let scale = w.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let mut block = [0; BLOCK_BYTES];
    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    for (byte, four) in block[2..].iter_mut().zip(w.as_chunks::<4>().0) {
        for (x, shift) in four.iter().zip([0, 2, 4, 6]) {
            let code = 1 + u8::from(*x > 0.0) - u8::from(*x < 0.0);
            *byte |= code << shift;
        }
    }
    block
}
