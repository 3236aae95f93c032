//! Answers of others: case files, and sizes that were published.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs;
use std::path::PathBuf;

use ndarray::{Array2, Array3};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use safetensors::SafeTensors;
use tensor_utils::testing::{recorded, recorded_cases};
use ternary_train::formats::{read_folder, write_gguf};
use ternary_train::generate::{GenerateOptions, generate};
use ternary_train::infer::{Chunk, LogitRows, Model};
use ternary_train::{
    Activations, Config, PackedMatrix, Preset, Projection, Ternary, Tiling, Tokenizer, Weights,
};

fn cases(kernel: &str) -> impl Iterator<Item = Case> {
    let paths = recorded_cases(env!("CARGO_MANIFEST_DIR"), kernel);
    paths.into_iter().flatten().map(Case::open)
}

struct Case {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Case {
    fn open(path: PathBuf) -> Self {
        Self { bytes: fs::read(&path).unwrap(), path }
    }

    fn metadata(&self, key: &str) -> String {
        let (_, header) = SafeTensors::read_metadata(&self.bytes).unwrap();
        header.metadata().as_ref().unwrap()[key].clone()
    }

    fn param(&self, key: &str) -> serde_json::Value {
        let params: serde_json::Value = serde_json::from_str(&self.metadata("params")).unwrap();
        params[key].clone()
    }

    fn atol(&self) -> f64 {
        self.metadata("atol").parse().unwrap()
    }

    /// Shape and values, by size and reader of an element.
    fn tensor<T, const N: usize>(&self, name: &str, of: fn([u8; N]) -> T) -> (Vec<usize>, Vec<T>) {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        let values = tensor.data().as_chunks::<N>().0.iter().map(|&bytes| of(bytes)).collect();
        (tensor.shape().to_vec(), values)
    }

    fn matrix<T, const N: usize>(&self, name: &str, of: fn([u8; N]) -> T) -> Array2<T> {
        let (shape, values) = self.tensor(name, of);
        Array2::from_shape_vec((shape[0], shape[1]), values).unwrap()
    }
}

#[test]
fn projections_are_those_of_pytorch() {
    for case in cases("ternary-quantize") {
        let group = case.param("group").as_u64().unwrap() as usize;
        let w = case.matrix("in.w", f32::from_le_bytes);
        let got = Projection { group, ..Projection::default() }.project(&w).unwrap();
        assert_eq!(got.codes, case.matrix("out.codes", i8::from_le_bytes), "{:?}", case.path);
        assert_eq!(got.scales, case.matrix("out.scales", f32::from_le_bytes), "{:?}", case.path);
    }
}

#[test]
fn packed_products_are_near_those_of_pytorch() {
    for case in cases("ternary-matmul") {
        let group = case.param("group").as_u64().unwrap() as usize;
        let codes = case.matrix("in.codes", i8::from_le_bytes);
        let scales = case.matrix("in.scales", f32::from_le_bytes);
        let x = case.matrix("in.x", f32::from_le_bytes);
        let packed = PackedMatrix::new(&Ternary { codes, scales, group }).unwrap();
        let got =
            packed.product(&Activations::new(&x, group).unwrap(), &Tiling::default()).unwrap();
        for (got, wanted) in got.iter().zip(&case.matrix("out.y", f64::from_le_bytes)) {
            assert!((f64::from(*got) - wanted).abs() <= case.atol(), "{:?}", case.path);
        }
    }
}

#[test]
fn models_give_the_logits_and_tokens_of_transformers() {
    for case in cases("qwen3") {
        let folder = case.path.parent().unwrap().join(case.param("model").as_str().unwrap());
        let (config, weights) = read_folder(&folder).unwrap();
        let model = Model::float(config, weights).unwrap();
        let ids = case.matrix("in.ids", |bytes| i64::from_le_bytes(bytes) as u32);
        let (shape, wanted) = case.tensor("out.logits", f64::from_le_bytes);
        let wanted = Array3::from_shape_vec((shape[0], shape[1], shape[2]), wanted).unwrap();
        for (prompt, wanted) in ids.outer_iter().zip(wanted.outer_iter()) {
            let mut cache = model.cache(prompt.len()).unwrap();
            let seq = cache.create().unwrap();
            let prompt = prompt.to_vec();
            let got = model.forward(&mut cache, &[Chunk::line(seq, &prompt)], LogitRows::All);
            for (got, wanted) in got.unwrap().iter().zip(&wanted) {
                let bound = case.atol() + 1e-4 * wanted.abs();
                assert!((f64::from(*got) - wanted).abs() <= bound, "{got} {wanted}");
            }
        }
        let greedy = case.matrix("out.greedy", |bytes| i64::from_le_bytes(bytes) as u32);
        let prompts: Vec<_> = ids.outer_iter().map(|prompt| prompt.to_vec()).collect();
        let options = GenerateOptions { max_new_tokens: greedy.ncols(), ..Default::default() };
        let got = generate(&model, &prompts, &options, |_, _| {}).unwrap();
        for (got, wanted) in got.iter().zip(greedy.outer_iter()) {
            assert_eq!(got, &wanted.to_vec(), "{:?}", case.path);
        }
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

/// The file is the very one that llama.cpp read, and what it computed is what we compute, so names, axes,
/// norms, turns, the tied head and the order of codes mean the same to both.
#[test]
fn llama_cpp_reads_what_is_written() {
    let Some(recorded) = llama_cpp() else { return };
    let (config, weights) = model_for_llama_cpp();
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("model.gguf");
    write_gguf(&path, &config, &weights, &Tokenizer::bytes()).unwrap();
    assert!(fs::read(path).unwrap() == fs::read(recorded.join("model.gguf")).unwrap());
    let model = Model::like_llama_cpp(config, weights).unwrap();
    let text = fs::read_to_string(recorded.join("logits.json")).unwrap();
    let texts: Vec<(Vec<u32>, Vec<Vec<f32>>)> = serde_json::from_str(&text).unwrap();
    let (mut rows, mut equal) = (0, 0);
    for (tokens, wanted) in &texts {
        let mut cache = model.cache(tokens.len()).unwrap();
        let seq = cache.create().unwrap();
        let got = model.forward(&mut cache, &[Chunk::line(seq, tokens)], LogitRows::All).unwrap();
        for (got, wanted) in got.outer_iter().zip(wanted) {
            let differences = got.iter().zip(wanted).map(|(got, wanted)| (got - wanted).abs());
            let most = differences.fold(0.0, f32::max);
            // A number within 1e-7 of the edge between two integers may be rounded to either.
            assert!(most < 0.2, "{most}");
            equal += usize::from(most < 1e-5);
            rows += 1;
        }
    }
    assert!(rows >= 24 && equal * 4 >= rows * 3, "{equal} of {rows} rows are equal");
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
}
