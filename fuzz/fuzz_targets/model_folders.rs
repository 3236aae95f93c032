//! Model folders: a `config.json`, a byte 0, a `model.safetensors`. What can be read is also run.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tensor_utils::testing::PeakAlloc;
use ternary_train::formats::read_folder;
use ternary_train::infer::{Chunk, LogitRows, Model};

#[global_allocator]
static ALLOC: PeakAlloc = PeakAlloc::new();

fuzz_target!(|bytes: &[u8]| {
    let cut = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let (config, tensors) = bytes.split_at(cut);
    fuzz::file("config.json", config);
    fuzz::file("model.safetensors", tensors.get(1..).unwrap_or_default());
    let (read, peak) = fuzz::peak_of(&ALLOC, || read_folder(fuzz::folder()));
    fuzz::check_four_times(peak, bytes.len());
    let Ok((config, weights)) = read else { return };
    let model = Model::float(config, weights).expect("a folder that was read makes a model");
    let mut cache = model.cache(64).expect("a small cache");
    let seq = cache.create().expect("the first sequence");
    let tokens = [0, model.config().vocab_size as u32 - 1];
    model
        .forward(&mut cache, &[Chunk::line(seq, &tokens)], LogitRows::All)
        .expect("tokens of the vocabulary");
});
