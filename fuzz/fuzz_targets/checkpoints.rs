//! Checkpoints: any bytes, as they are and with their checksum put right.

#![no_main]

use std::collections::HashMap;

use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;
use tensor_utils::testing::PeakAlloc;
use ternary_train::load_checkpoint;

#[global_allocator]
static ALLOC: PeakAlloc = PeakAlloc::new();

fuzz_target!(|bytes: &[u8]| {
    load(bytes);
    if let Some(valid) = with_its_checksum(bytes) {
        load(&valid);
    }
});

fn load(bytes: &[u8]) {
    let path = fuzz::file("checkpoint", bytes);
    // A checkpoint that is whole becomes a trainer, whose memory is that of the training.
    let (loaded, peak) = fuzz::peak_of(&ALLOC, || load_checkpoint(&path));
    match loaded {
        Ok((mut trainer, _)) => {
            if trainer.options().tokens_per_step() <= 256 {
                let _ = trainer.step(&[0; 300]);
            }
        }
        Err(_) => fuzz::check_four_times(peak, bytes.len()),
    }
}

/// The same tensors and metadata with the checksum that belongs to them.
fn with_its_checksum(bytes: &[u8]) -> Option<Vec<u8>> {
    let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
    let mut metadata: HashMap<String, String> = header.metadata().clone()?;
    let tensors = SafeTensors::deserialize(bytes).ok()?;
    let mut sum = crc32fast::Hasher::new();
    sum.update(metadata.get("training")?.as_bytes());
    for name in ["latent", "mean", "square"] {
        sum.update(tensors.tensor(name).ok()?.data());
    }
    metadata.insert("crc32".to_owned(), format!("{:08x}", sum.finalize()));
    safetensors::serialize(tensors.tensors(), Some(metadata)).ok()
}
