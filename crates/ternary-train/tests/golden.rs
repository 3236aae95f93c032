//! Answers of others: case files, and sizes that were published.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs;
use std::path::PathBuf;

use ndarray::{Array2, Array3, Ix2};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tensor_utils::testing::{Case, largest_difference, recorded, recorded_cases};
use ternary_train::formats::{read_folder, write_gguf};
use ternary_train::generate::{GenerateOptions, generate};
use ternary_train::infer::{Chunk, LogitRows, Model};
use ternary_train::{
    Activations, Config, PackedMatrix, Preset, Projection, Ternary, Tiling, Tokenizer, Weights,
};

fn cases(kernel: &str) -> impl Iterator<Item = Case> {
    recorded_cases(env!("CARGO_MANIFEST_DIR"), kernel, 1)
}

fn group(case: &Case) -> usize {
    case.params["group"].as_u64().unwrap() as usize
}

fn codes(case: &Case, name: &str) -> Array2<i8> {
    case.array::<f64, _>(name).mapv(|x| x as i8)
}

fn tokens(case: &Case, name: &str) -> Vec<Vec<u32>> {
    let rows: Array2<f64> = case.array(name);
    rows.outer_iter().map(|row| row.iter().map(|&token| token as u32).collect()).collect()
}

#[test]
fn projections_are_those_of_pytorch() {
    for case in cases("ternary-quantize") {
        let group = group(&case);
        let w: Array2<f32> = case.array("in.w");
        let got = Projection { group, ..Projection::default() }.project(&w).unwrap();
        assert_eq!(got.codes, codes(&case, "out.codes"));
        assert_eq!(got.scales, case.array::<f32, Ix2>("out.scales"));
    }
}

#[test]
fn packed_products_are_near_those_of_pytorch() {
    for case in cases("ternary-matmul") {
        let (group, codes) = (group(&case), codes(&case, "in.codes"));
        let (scales, x): (Array2<f32>, Array2<f32>) = (case.array("in.scales"), case.array("in.x"));
        let packed = PackedMatrix::new(&Ternary { codes, scales, group }).unwrap();
        let got =
            packed.product(&Activations::new(&x, group).unwrap(), &Tiling::default()).unwrap();
        for (got, wanted) in got.iter().zip(case.get("out.y").unwrap()) {
            assert!((f64::from(*got) - wanted).abs() <= case.tolerance.abs, "{got} {wanted}");
        }
    }
}

#[test]
fn models_give_the_logits_and_tokens_of_transformers() {
    for case in cases("qwen3") {
        let folder = case.path.parent().unwrap().join(case.params["model"].as_str().unwrap());
        let (config, weights) = read_folder(&folder).unwrap();
        let model = Model::float(config, weights).unwrap();
        let prompts = tokens(&case, "in.ids");
        let wanted: Array3<f64> = case.array("out.logits");
        for (prompt, wanted) in prompts.iter().zip(wanted.outer_iter()) {
            let mut cache = model.cache(prompt.len()).unwrap();
            let seq = cache.create().unwrap();
            let got = model.forward(&mut cache, &[Chunk::line(seq, prompt)], LogitRows::All);
            for (got, wanted) in got.unwrap().iter().zip(&wanted) {
                let bound = case.tolerance.abs + 1e-4 * wanted.abs();
                assert!((f64::from(*got) - wanted).abs() <= bound, "{got} {wanted}");
            }
        }
        let greedy = tokens(&case, "out.greedy");
        let options = GenerateOptions { max_new_tokens: greedy[0].len(), ..Default::default() };
        assert_eq!(generate(&model, &prompts, &options, |_, _| {}).unwrap(), greedy);
    }
}

/// The model whose file `fixtures/llama_cpp.mjs` gave to llama.cpp.
fn model_for_llama_cpp() -> (Config, Weights) {
    let config = Config {
        hidden_size: 64,
        intermediate_size: 128,
        num_hidden_layers: 2,
        head_dim: 16,
        rope_theta: 1e6,
        ternary: Some(Projection { group: 64, ..Projection::default() }),
        ..Preset::Nano.config(256)
    };
    let mut weights = Weights::random(&config, 6).unwrap();
    let rng = &mut ChaCha8Rng::seed_from_u64(6);
    // Norms of 1 would hide which is which.
    for norm in weights.norms_mut() {
        norm.weight.iter_mut().for_each(|x| *x = 0.5 + rng.random::<f32>());
    }
    weights.project(config.ternary.unwrap()).unwrap();
    (config, weights)
}

fn llama_cpp() -> Option<PathBuf> {
    recorded(env!("CARGO_MANIFEST_DIR"), "llama-cpp")
}

#[test]
#[ignore = "writes the fixture; run by hand as fixtures/README.md says"]
fn write_the_file_for_llama_cpp() {
    let (config, weights) = model_for_llama_cpp();
    let path = llama_cpp().unwrap().join("model.gguf");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_gguf(&path, &config, &weights, &Tokenizer::bytes()).unwrap();
}

/// A file without its key for the end token, which is the last one of the metadata.
fn without_end_token(file: &[u8]) -> Vec<u8> {
    let find =
        |text: &str| file.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
    let (key, last) = ("tokenizer.ggml.eos_token_id", "output_norm.weight");
    // Before a name is its length; after the key's a type and a value of 4 bytes; after that of the last
    // tensor the number of its axes, the one axis, a type and an offset.
    let (from, to) = (find(key) - 8, find(key) + key.len() + 8);
    let header = find(last) + last.len() + 4 + 8 + 4 + 8;
    let mut without = [&file[..from], &file[to..header]].concat();
    without[16] -= 1;
    without.resize(without.len().next_multiple_of(32), 0);
    without.extend(&file[header.next_multiple_of(32)..]);
    without
}

/// But for the end token, whose key is newer, the file is the very one that llama.cpp read, and what it
/// computed is what we compute, so names, axes, norms, turns, the tied head and the order of codes mean the
/// same to both.
#[test]
fn llama_cpp_reads_what_is_written() {
    let Some(recorded) = llama_cpp() else { return };
    let (config, weights) = model_for_llama_cpp();
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("model.gguf");
    write_gguf(&path, &config, &weights, &Tokenizer::bytes()).unwrap();
    let written = without_end_token(&fs::read(path).unwrap());
    assert!(written == fs::read(recorded.join("model.gguf")).unwrap());
    let model = Model::like_llama_cpp(config, weights).unwrap();
    let text = fs::read_to_string(recorded.join("logits.json")).unwrap();
    let texts: Vec<(Vec<u32>, Vec<Vec<f32>>)> = serde_json::from_str(&text).unwrap();
    let (mut rows, mut equal) = (0, 0);
    for (tokens, wanted) in &texts {
        let mut cache = model.cache(tokens.len()).unwrap();
        let seq = cache.create().unwrap();
        let got = model.forward(&mut cache, &[Chunk::line(seq, tokens)], LogitRows::All).unwrap();
        for (got, wanted) in got.outer_iter().zip(wanted) {
            let pairs = got.iter().zip(wanted);
            let most = largest_difference(pairs.map(|(&a, &b)| (f64::from(a), f64::from(b))));
            assert!(most < 0.2, "{most}");
            equal += usize::from(most == 0.0);
            rows += 1;
        }
    }
    // The sines, cosines and powers of both are those of the C library.
    assert!(rows >= 24 && (equal == rows || cfg!(not(target_env = "gnu"))), "{equal} of {rows}");
}

#[test]
fn presets_have_their_sizes() {
    let sizes = Preset::ALL.map(|preset| preset.config(256).parameters());
    assert_eq!(sizes, [820_608, 3_214_080, 19_012_864]);
}

#[test]
fn the_small_qwen3_has_its_number_of_weights() {
    // As published: 0.6B parameters, 0.44B of them not in the embedding.
    let text = r#"{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "rope_theta": 1000000,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "head_dim": 128,
        "num_key_value_heads": 8, "max_position_embeddings": 40960, "tie_word_embeddings": true,
        "rope_scaling": null, "eos_token_id": 151645}"#;
    let config = Config::from_json(text).unwrap();
    assert_eq!(config.parameters(), 596_049_920);
    assert_eq!((config.rope_theta, config.rms_norm_eps), (1e6, 1e-6));
    let inside =
        text.replace("\"rope_theta\": 1000000", "\"rope_parameters\": {\"rope_theta\": 5e5}");
    assert_eq!(Config::from_json(&inside).unwrap().rope_theta, 5e5);
    // As Transformers 5 decides: what stands inside an object, the older name first, then outside.
    let theta = |more: &str| {
        let text = text.replace("\"rope_scaling\": null", more);
        Config::from_json(&text).unwrap().rope_theta
    };
    assert_eq!(theta(r#""rope_parameters": {"rope_theta": 5e5}"#), 5e5);
    assert_eq!(theta(r#""rope_scaling": {"type": "default", "rope_theta": 4e5}"#), 4e5);
    assert_eq!(theta(r#""rope_scaling": {"rope_type": "default"}"#), 1e6);
}
