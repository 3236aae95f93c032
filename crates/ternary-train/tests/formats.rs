//! Files: what is written is read again, and what is broken is refused by name.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use tempfile::TempDir;
use ternary_train::formats::{read_folder, write_folder, write_gguf};
use ternary_train::{Config, Preset, Projection, Ternary, Tokenizer, Weights};

fn small() -> (Config, Weights) {
    let config = Config {
        num_hidden_layers: 2,
        ternary: Some(Projection::default()),
        eos_token_ids: vec![3],
        ..Preset::Nano.config(256)
    };
    let mut weights = Weights::random(&config, 1).unwrap();
    weights.project(Projection::default()).unwrap();
    (config, weights)
}

fn refused(folder: &Path) -> String {
    read_folder(folder).unwrap_err().to_string()
}

#[test]
fn a_folder_is_read_as_it_was_written() {
    for tied in [true, false] {
        let folder = TempDir::new().unwrap();
        let (config, _) = small();
        let config = Config { tie_word_embeddings: tied, ..config };
        let weights = Weights::random(&config, 2).unwrap();
        write_folder(folder.path(), &config, &weights, Some(&Tokenizer::bytes())).unwrap();
        assert_eq!(read_folder(folder.path()).unwrap(), (config, weights));
        assert_eq!(Tokenizer::read(folder.path()).unwrap().name(), "bytes");
    }
}

/// A temporary file is for its owner alone; what is moved into place is for those that the mask of the
/// process lets in, as any other new file.
#[cfg(unix)]
#[test]
fn files_have_the_permissions_of_new_files() {
    use std::os::unix::fs::PermissionsExt;
    let folder = TempDir::new().unwrap();
    let mode = |name: &str| fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
    fs::write(folder.path().join("new"), "").unwrap();
    let (config, weights) = small();
    let tokenizer = Tokenizer::bytes();
    write_folder(folder.path(), &config, &weights, Some(&tokenizer)).unwrap();
    write_gguf(&folder.path().join("model.gguf"), &config, &weights, &tokenizer).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "model.gguf"] {
        assert_eq!(mode(name) & 0o777, mode("new") & 0o777, "{name}");
    }
}

#[test]
fn shards_are_found_through_their_index() {
    let folder = TempDir::new().unwrap();
    let (config, weights) = small();
    write_folder(folder.path(), &config, &weights, None).unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::rename(at("model.safetensors"), at("model-00001-of-00001.safetensors")).unwrap();
    assert!(refused(folder.path()).contains("model.safetensors"));
    let map = r#"{"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}"#;
    fs::write(at("model.safetensors.index.json"), map).unwrap();
    assert_eq!(read_folder(folder.path()).unwrap(), (config, weights));
    let outside = map.replace("model-0", "../model-0");
    fs::write(at("model.safetensors.index.json"), outside).unwrap();
    assert!(refused(folder.path()).contains("is not the name of a file"));
}

/// As in Transformers.
#[test]
fn one_file_goes_before_an_index_of_old_shards() {
    let folder = TempDir::new().unwrap();
    let (config, old) = small();
    write_folder(folder.path(), &config, &old, None).unwrap();
    let at = |name: &str| folder.path().join(name);
    let index = at("model.safetensors.index.json");
    fs::rename(at("model.safetensors"), at("old.safetensors")).unwrap();
    let map = r#"{"weight_map": {"model.norm.weight": "old.safetensors"}}"#;
    fs::write(&index, map).unwrap();
    assert_eq!(read_folder(folder.path()).unwrap().1, old);
    let new = Weights::random(&config, 7).unwrap();
    write_folder(folder.path(), &config, &new, None).unwrap();
    assert!(!index.exists() && at("old.safetensors").exists());
    fs::write(&index, map).unwrap();
    assert_eq!(read_folder(folder.path()).unwrap().1, new);
}

#[test]
fn a_file_cut_short_is_refused_wherever_it_was_cut() {
    let folder = TempDir::new().unwrap();
    let (config, weights) = small();
    write_folder(folder.path(), &config, &weights, None).unwrap();
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let inside = (0..header).step_by(97).chain([header, header + 1, bytes.len() / 2]);
    for end in inside.chain([bytes.len() - 1]) {
        fs::write(&path, &bytes[..end]).unwrap();
        let error = refused(folder.path());
        assert!(error.contains("model.safetensors: not safetensors"), "{end}: {error}");
    }
}

#[test]
fn weights_of_another_model_are_refused() {
    let folder = TempDir::new().unwrap();
    let (config, weights) = small();
    write_folder(folder.path(), &config, &weights, None).unwrap();
    let path = folder.path().join("config.json");
    for (other, what) in [
        (Config { intermediate_size: 256, ..config.clone() }, "has shape [384, 128]"),
        (Config { num_hidden_layers: 3, ..config.clone() }, "`model.layers.2.self_attn.q_proj"),
        (Config { num_hidden_layers: 1, ..config.clone() }, "is not Qwen3's"),
        (Config { tie_word_embeddings: false, ..config.clone() }, "`lm_head.weight` is missing"),
    ] {
        fs::write(&path, other.to_json()).unwrap();
        let error = refused(folder.path());
        assert!(error.contains(what), "{error}");
    }
    fs::write(&path, "{").unwrap();
    assert!(refused(folder.path()).contains("config.json: config: "));
    fs::remove_file(&path).unwrap();
    let error = refused(folder.path());
    assert!(error.starts_with("cannot read or write") && error.ends_with("config.json"), "{error}");
}

/// NaN and infinity are refused where they are written and where they are read, and named.
#[test]
fn weights_that_are_not_finite_are_refused() {
    let folder = TempDir::new().unwrap();
    let (config, weights) = small();
    let gguf = folder.path().join("model.gguf");
    for (value, name) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        let mut broken = weights.clone();
        broken.layers[1].q_norm[3] = value;
        let error = write_folder(folder.path(), &config, &broken, None).unwrap_err().to_string();
        let what = format!("`model.layers.1.self_attn.q_norm.weight` has {name} at element 3");
        assert!(error.contains(&what), "{error}");
        let error = write_gguf(&gguf, &config, &broken, &Tokenizer::bytes()).unwrap_err();
        let what = format!("`blk.1.attn_q_norm.weight` has {name} at element 3");
        assert!(error.to_string().contains(&what), "{error}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    // Elsewhere written, with the last weight of the file.
    write_folder(folder.path(), &config, &weights, None).unwrap();
    let path = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let error = refused(folder.path());
    assert!(error.contains("has inf at element") && error.contains("expected finite"), "{error}");
}

#[test]
fn what_cannot_be_written_is_named_and_what_was_there_stays() {
    let folder = TempDir::new().unwrap();
    let (config, weights) = small();
    let blocked = folder.path().join("file");
    fs::write(&blocked, "old").unwrap();
    let error = write_folder(&blocked, &config, &weights, None).unwrap_err().to_string();
    assert!(error.contains("file"), "{error}");
    let error =
        write_gguf(&blocked.join("a.gguf"), &config, &weights, &Tokenizer::bytes()).unwrap_err();
    assert!(error.to_string().contains("a.gguf"), "{error}");
    assert_eq!(fs::read_to_string(&blocked).unwrap(), "old");
    // Weights that are not ternary leave the file of before.
    let path = folder.path().join("model.gguf");
    write_gguf(&path, &config, &weights, &Tokenizer::bytes()).unwrap();
    let before = fs::read(&path).unwrap();
    let float = Weights::random(&config, 3).unwrap();
    let error = write_gguf(&path, &config, &float, &Tokenizer::bytes()).unwrap_err().to_string();
    assert!(error.contains("magnitude"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), before);
    let narrow = Config { intermediate_size: 96, ..config.clone() };
    let mut odd = Weights::random(&narrow, 3).unwrap();
    odd.project(Projection::default()).unwrap();
    let error = write_gguf(&path, &narrow, &odd, &Tokenizer::bytes()).unwrap_err().to_string();
    assert!(error.contains("multiples of 64"), "{error}");
    let tiny = Config { vocab_size: 200, ..config };
    let mut odd = Weights::random(&tiny, 3).unwrap();
    odd.project(Projection::default()).unwrap();
    let error = write_gguf(&path, &tiny, &odd, &Tokenizer::bytes()).unwrap_err().to_string();
    assert!(error.contains("option `tokenizer` is 256"), "{error}");
}

/// Turned weights would have another order in the files.
#[test]
fn weights_in_another_order_are_refused() {
    let folder = TempDir::new().unwrap();
    let (config, mut weights) = small();
    let turned = weights.layers[0].q.t().as_standard_layout().into_owned().reversed_axes();
    assert_eq!(turned, weights.layers[0].q);
    weights.layers[0].q = turned;
    let path = folder.path().join("model.gguf");
    for result in [
        write_folder(&folder.path().join("model"), &config, &weights, None),
        write_gguf(&path, &config, &weights, &Tokenizer::bytes()),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("`weights` has strides"), "{error}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// A little-endian reader, written from the description of the format.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take(&mut self, count: usize) -> Vec<u8> {
        let (head, rest) = self.0.split_at(count);
        self.0 = rest;
        head.to_vec()
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().unwrap())
    }

    fn string(&mut self) -> String {
        let length = self.u64() as usize;
        String::from_utf8(self.take(length)).unwrap()
    }

    /// The number of tensors and the values before them.
    fn metadata(&mut self) -> (u64, HashMap<String, String>) {
        assert_eq!(self.take(4), b"GGUF");
        assert_eq!(self.u32(), 3);
        let (tensors, values) = (self.u64(), self.u64());
        let values = (0..values).map(|_| {
            let (key, kind) = (self.string(), self.u32());
            (key, self.value(kind))
        });
        (tensors, values.collect())
    }

    fn value(&mut self, kind: u32) -> String {
        match kind {
            4 => self.u32().to_string(),
            5 => (self.u32() as i32).to_string(),
            6 => f32::from_bits(self.u32()).to_string(),
            7 => (self.take(1)[0] != 0).to_string(),
            8 => self.string(),
            9 => {
                let (kind, length) = (self.u32(), self.u64());
                (0..length).map(|_| self.value(kind) + "\n").collect()
            }
            other => panic!("unknown type {other}"),
        }
    }
}

#[test]
fn gguf_holds_every_weight_as_it_is() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.gguf");
    let (config, weights) = small();
    write_gguf(&path, &config, &weights, &Tokenizer::bytes()).unwrap();
    let bytes = fs::read(&path).unwrap();
    let mut reader = Reader(&bytes);
    let (tensors, metadata) = reader.metadata();
    for (key, value) in [
        ("general.architecture", "qwen3"),
        ("general.file_type", "41"),
        ("qwen3.block_count", "2"),
        ("qwen3.attention.key_length", "32"),
        ("qwen3.rope.freq_base", "50"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.eos_token_id", "3"),
    ] {
        assert_eq!(metadata[key], value, "{key}");
    }
    assert_eq!(metadata["tokenizer.ggml.tokens"].lines().nth(usize::from(b'A')), Some("A"));
    let infos: Vec<_> = (0..tensors)
        .map(|_| {
            let (name, axes) = (reader.string(), reader.u32());
            let shape: Vec<_> = (0..axes).map(|_| reader.u64() as usize).collect();
            (name, shape, reader.u32(), reader.u64() as usize)
        })
        .collect();
    let data = (bytes.len() - reader.0.len()).next_multiple_of(32);
    let find = |name: &str| infos.iter().find(|info| info.0 == name).unwrap();
    for (name, matrix) in [
        ("token_embd.weight", &weights.embedding),
        ("blk.1.ffn_down.weight", &weights.layers[1].down),
    ] {
        let (_, shape, kind, offset) = find(name);
        let (rows, columns) = matrix.dim();
        assert_eq!((shape.as_slice(), *kind), (&[columns, rows][..], 42));
        for (i, &w) in matrix.iter().enumerate() {
            let block = &bytes[data + offset + i / 64 * 18..][..18];
            let scale = tensor_utils::f16::from_le_bytes([block[0], block[1]]).to_f32();
            let code = block[2 + i % 64 / 4] >> (2 * (i % 4)) & 3;
            assert_eq!((f32::from(code) - 1.0) * scale, w, "{name} {i}");
        }
    }
    let (_, shape, kind, offset) = find("blk.0.attn_q_norm.weight");
    assert_eq!((shape.as_slice(), *kind), (&[32][..], 0));
    assert_eq!(bytes[data + offset..][..4], weights.layers[0].q_norm[0].to_le_bytes());
    assert!(infos.iter().all(|info| info.0 != "output.weight"));
    // The blocks are the groups again.
    let ternary = Ternary::of_ternary(&weights.layers[0].gate, 128).unwrap();
    assert_eq!(ternary.scales.dim(), (384, 1));
}

#[test]
fn gguf_has_an_end_token_and_kinds_of_tokens() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.gguf");
    let metadata = |eos: &[u32], tokenizer: &Tokenizer| {
        let config = Config {
            eos_token_ids: eos.to_vec(),
            ternary: None,
            ..Preset::Nano.config(tokenizer.vocab_size() + 1)
        };
        let weights = Weights::random(&config, 1).unwrap();
        write_gguf(&path, &config, &weights, tokenizer).unwrap();
        Reader(&fs::read(&path).unwrap()).metadata().1
    };
    let (end, kinds) = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.token_type");
    assert_eq!(metadata(&[], &Tokenizer::bytes())[end], "255");
    assert_eq!(metadata(&[7, 9], &Tokenizer::bytes())[end], "7");

    let text = "to be or not to be ".repeat(9);
    Tokenizer::train_bpe([text.as_str()].into_iter(), 260).unwrap().write(folder.path()).unwrap();
    let file = folder.path().join("tokenizer.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let added = [("<|end|>", true), ("<think>", false)].into_iter().zip(260..);
    let added = added.map(|((content, special), id)| {
        let no = ["single_word", "lstrip", "rstrip", "normalized"]
            .map(|key| (key.to_owned(), false.into()));
        let mut token: serde_json::Map<_, _> = no.into_iter().collect();
        token.extend([
            ("id".to_owned(), id.into()),
            ("content".to_owned(), content.into()),
            ("special".to_owned(), special.into()),
        ]);
        token.into()
    });
    json["added_tokens"] = added.collect::<Vec<serde_json::Value>>().into();
    fs::write(&file, json.to_string()).unwrap();
    let metadata = metadata(&[], &Tokenizer::read(folder.path()).unwrap());
    let tokens: Vec<_> = metadata["tokenizer.ggml.tokens"].lines().collect();
    let at = tokens.iter().position(|&name| name == "\u{FF}");
    assert_eq!(at.unwrap().to_string(), metadata[end]);
    assert_eq!(tokens[260..], ["<|end|>", "<think>", "[UNUSED262]"]);
    let kinds: Vec<_> = metadata[kinds].lines().collect();
    assert!(kinds[..260].iter().all(|&kind| kind == "1"));
    assert_eq!(kinds[260..], ["3", "4", "5"]);
}

#[test]
fn tokenizers_give_back_every_text() {
    let text = "To be, or not to be: that is the question.\r\n\n  \u{1F980} na\u{EF}ve 12345\t\0";
    let corpus = text.repeat(20);
    let folder = TempDir::new().unwrap();
    let bpe = Tokenizer::train_bpe([corpus.as_str()].into_iter(), 300).unwrap();
    assert!((257..=300).contains(&bpe.vocab_size()), "{}", bpe.vocab_size());
    assert!(bpe.encode(text).unwrap().len() < text.len() / 2);
    bpe.write(folder.path()).unwrap();
    let again = Tokenizer::read(folder.path()).unwrap();
    let bytes = Tokenizer::bytes();
    for text in [text, "", "unseen \u{4E2D}\u{6587} \u{7F}\u{AD}", "\u{FEFF}x"] {
        assert_eq!(bpe.decode(&bpe.encode(text).unwrap()), text);
        assert_eq!(again.encode(text).unwrap(), bpe.encode(text).unwrap());
        assert_eq!(bytes.decode(&bytes.encode(text).unwrap()), text);
    }
    assert_eq!(bytes.encode("A\u{E9}").unwrap(), [65, 0xC3, 0xA9]);
    let twice = Tokenizer::train_bpe([corpus.as_str()].into_iter(), 300).unwrap();
    assert_eq!(twice.encode(text).unwrap(), bpe.encode(text).unwrap());
    assert!(Tokenizer::train_bpe(["a"].into_iter(), 255).is_err());
    fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    let error = Tokenizer::read(folder.path()).unwrap_err().to_string();
    assert!(error.contains("not a tokenizer"), "{error}");
}
