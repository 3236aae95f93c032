//! Files that were cut, spoilt or made to do harm: an error each, and never more memory than four times
//! the size of the files. One test, so that no other allocates meanwhile.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use tempfile::TempDir;
use tensor_utils::testing::PeakAlloc;
use ternary_train::formats::{read_folder, write_folder};
use ternary_train::{
    Config, Error, Preset, TrainOptions, Trainer, Weights, load_checkpoint, save_checkpoint,
};

#[global_allocator]
static ALLOC: PeakAlloc = PeakAlloc::new();

/// Messages, buffers of the file system, small tables.
const SLACK: usize = 64 << 10;

fn tiny() -> Config {
    Config {
        hidden_size: 4,
        intermediate_size: 6,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 2,
        max_position_embeddings: 16,
        ..Preset::Nano.config(10)
    }
}

/// The message of the error that `read` ends with; fails if it took too much memory.
fn refused<T>(size: usize, read: impl FnOnce() -> Result<T, Error>) -> String {
    ALLOC.reset_peak();
    let result = read();
    let peak = ALLOC.peak_above_baseline();
    assert!(peak <= 4 * size + SLACK, "{peak} bytes for files of {size}");
    result.err().expect("an error").to_string()
}

fn size(folder: &Path) -> usize {
    let files = fs::read_dir(folder).unwrap();
    files.map(|file| file.unwrap().metadata().unwrap().len() as usize).sum()
}

#[test]
fn hostile_files_are_refused_with_little_memory() {
    folders_cut_anywhere();
    checkpoints_cut_anywhere();
    configurations_that_ask_for_too_much();
    headers_that_promise_too_much();
}

fn folders_cut_anywhere() {
    let folder = TempDir::new().unwrap();
    let config = tiny();
    write_folder(folder.path(), &config, &Weights::random(&config, 1).unwrap(), None).unwrap();
    for (name, end_may_be_blank) in [("model.safetensors", false), ("config.json", true)] {
        let path = folder.path().join(name);
        let whole = fs::read(&path).unwrap();
        for end in 0..whole.len() {
            if end_may_be_blank && whole[end..].iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            fs::write(&path, &whole[..end]).unwrap();
            let error = refused(size(folder.path()), || read_folder(folder.path()));
            assert!(error.contains(name), "{end}: {error}");
        }
        fs::write(&path, &whole).unwrap();
    }
    read_folder(folder.path()).unwrap();
}

fn checkpoints_cut_anywhere() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("last");
    let config = tiny();
    let options = TrainOptions { steps: 9, sequences: 1, length: 4, ..TrainOptions::default() };
    let trainer = Trainer::new(&config, &options, &Weights::random(&config, 1).unwrap()).unwrap();
    save_checkpoint(&path, &trainer, "a note").unwrap();
    let whole = fs::read(&path).unwrap();
    for end in 0..whole.len() {
        fs::write(&path, &whole[..end]).unwrap();
        let error = refused(end, || load_checkpoint(&path));
        assert!(error.contains("last"), "{end}: {error}");
    }
    // A changed byte too: in the numbers always, in the header wherever it means something.
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for at in header..whole.len() {
        let mut spoilt = whole.clone();
        spoilt[at] ^= 1;
        fs::write(&path, &spoilt).unwrap();
        let error = refused(whole.len(), || load_checkpoint(&path));
        assert!(error.contains("checksum"), "{at}: {error}");
    }
    // A position in the text that no machine has, with a checksum that is right.
    for step in [u64::MAX / 7, u64::MAX / 3, u64::MAX] {
        fs::write(&path, at_step(&whole, step)).unwrap();
        let error = refused(whole.len(), || load_checkpoint(&path));
        assert!(error.contains(&format!("its step is {step}")), "{error}");
    }
    fs::write(&path, at_step(&whole, 1)).unwrap();
    assert_eq!(load_checkpoint(&path).unwrap().0.steps_done(), 1);
    fs::write(&path, &whole).unwrap();
    load_checkpoint(&path).unwrap();
}

/// A checkpoint of step 0 as one of another.
fn at_step(checkpoint: &[u8], step: u64) -> Vec<u8> {
    let (_, header) = SafeTensors::read_metadata(checkpoint).unwrap();
    let mut metadata = header.metadata().clone().unwrap();
    let tensors = SafeTensors::deserialize(checkpoint).unwrap();
    let training = metadata["training"].replacen("\"step\":0", &format!("\"step\":{step}"), 1);
    let mut sum = crc32fast::Hasher::new();
    sum.update(training.as_bytes());
    for name in ["latent", "mean", "square"] {
        sum.update(tensors.tensor(name).unwrap().data());
    }
    metadata.insert("crc32".to_owned(), format!("{:08x}", sum.finalize()));
    metadata.insert("training".to_owned(), training);
    safetensors::serialize(tensors.tensors(), Some(metadata)).unwrap()
}

fn configurations_that_ask_for_too_much() {
    let folder = TempDir::new().unwrap();
    let config = tiny();
    write_folder(folder.path(), &config, &Weights::random(&config, 1).unwrap(), None).unwrap();
    let most = i32::MAX as usize;
    let path = folder.path().join("config.json");
    let even = most - 1;
    for config in [
        Config { vocab_size: most, ..config.clone() },
        Config { hidden_size: most, ..config.clone() },
        Config { num_hidden_layers: most, ..config.clone() },
        Config {
            head_dim: even,
            num_attention_heads: most,
            num_key_value_heads: most,
            ..config.clone()
        },
        Config {
            hidden_size: most,
            intermediate_size: most,
            num_hidden_layers: most,
            num_attention_heads: most,
            num_key_value_heads: most,
            head_dim: even,
            ..config.clone()
        },
    ] {
        fs::write(&path, config.to_json()).unwrap();
        let error = refused(size(folder.path()), || read_folder(folder.path()));
        assert!(error.contains("weights"), "{error}");
        assert!(config.parameters() > 1 << 31);
    }
    // Lists that take more room than their text.
    let text = config.to_json();
    for (from, to) in [
        (
            "\"tie_word_embeddings\": true",
            format!("\"tie_word_embeddings\": \"{}\"", "x".repeat(20_000)),
        ),
        ("\"use_cache\": true", format!("\"use_cache\": \"{}\"", "x".repeat(200_000))),
        ("\"eos_token_id\": null", format!("\"eos_token_id\": [{}1]", "1,".repeat(15_000))),
        ("\"use_cache\": true", format!("\"rope_scaling\": [{}1]", "1,".repeat(15_000))),
        (
            "\"use_cache\": true",
            format!("\"rope_scaling\": {}1{}", "[".repeat(9999), "]".repeat(9999)),
        ),
        ("\"hidden_act\": \"silu\"", format!("\"hidden_act\": \"{}\"", "x".repeat(20_000))),
    ] {
        assert!(text.contains(from));
        fs::write(&path, text.replace(from, &to)).unwrap();
        refused(size(folder.path()), || read_folder(folder.path()));
    }
}

fn headers_that_promise_too_much() {
    let folder = TempDir::new().unwrap();
    let config = tiny();
    fs::write(folder.path().join("config.json"), config.to_json()).unwrap();
    let path = folder.path().join("model.safetensors");
    let entry = |name: &str, shape: &str, from: u64, to: u64| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let file = |header: &str| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes
    };
    let embedding = "model.embed_tokens.weight";
    for bytes in [
        u64::MAX.to_le_bytes().to_vec(),
        (1_u64 << 40).to_le_bytes().to_vec(),
        file(&format!("{{{}}}", entry(embedding, "[4294967296,4294967296,16]", 0, 0))),
        file(&format!("{{{}}}", entry(embedding, "[1000000000,4]", 0, 16_000_000_000))),
        file(&format!("{{{}}}", entry(embedding, "[10,4]", 0, u64::MAX))),
        file(&format!("{{{}}}", entry(embedding, "[10,4]", 160, 0))),
        file("{"),
        file(&"[".repeat(100_000)),
    ] {
        fs::write(&path, &bytes).unwrap();
        let error = refused(size(folder.path()), || read_folder(folder.path()));
        assert!(error.contains("model.safetensors"), "{error}");
        let error = refused(bytes.len(), || load_checkpoint(&path));
        assert!(error.contains("model.safetensors"), "{error}");
    }
}
