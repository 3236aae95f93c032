//! Prints what caches cost: by model, length and storage, on a device, with pages, and with and
//! without a cache.
//!
//! ```sh
//! cargo run --release -p kvcache --example memory
//! ```

use kvcache::memory::{
    Model, fragmentation, intensity, pages_of_fork, residual_bytes, scale_overhead,
    tokens_processed,
};
use kvcache::{Config, Error, Storage};

const GIB: f64 = (1_u64 << 30) as f64;

fn main() -> Result<(), Error> {
    println!("Bytes per token, and GiB of a batch by length (f16; a window caps the length)\n");
    println!(
        "{:20} {:>10} {:>9} {:>9} {:>9} {:>11}",
        "model", "B/token", "1x4K", "1x32K", "1x128K", "16x32K"
    );
    for model in Model::KNOWN {
        let gib = |batch, len| model.bytes(batch, len, Storage::F16) as f64 / GIB;
        println!(
            "{:20} {:>10} {:>9.2} {:>9.2} {:>9.2} {:>11.2}",
            model.name,
            model.bytes_per_token(Storage::F16),
            gib(1, 4096),
            gib(1, 32768),
            gib(1, 131_072),
            gib(16, 32768),
        );
    }

    println!("\nThe same in each storage, GiB of 1 x 32K without scales\n");
    for model in Model::KNOWN {
        print!("{:20}", model.name);
        for storage in Storage::ALL {
            print!(" {:>5} {:>6.2}", storage.name(), model.bytes(1, 32768, storage) as f64 / GIB);
        }
        println!();
    }

    println!(
        "\nLongest context of one sequence, weights in 16 bits, 3 GB of 10^9 bytes set aside\n"
    );
    for (device, gigabytes) in [("24 GB", 24_u64), ("80 GB", 80), ("141 GB", 141)] {
        for model in Model::KNOWN {
            let context =
                |storage| match model.longest_context((gigabytes - 3) * 1_000_000_000, 16, storage)
                {
                    None => "no bound".to_owned(),
                    Some(0) => "-".to_owned(),
                    Some(tokens) => format!("{:.0}K", tokens as f64 / 1000.0),
                };
            println!(
                "{device:8} {:20} f16 {:>9} int8 {:>9} int4 {:>9}",
                model.name,
                context(Storage::F16),
                context(Storage::Int8),
                context(Storage::Int4)
            );
        }
    }

    println!("\nScales of quantised pages, and bytes against f16 with them (8 heads of 128)\n");
    for page_size in [16, 32, 64, 128] {
        for storage in [Storage::Int8, Storage::Int4] {
            let config = Config { page_size, ..Config::new(1, 8, 128) }.stored_as(storage);
            let overhead = scale_overhead(&config)?;
            let saved = 16.0 / (storage.bits() as f64 * (1.0 + overhead));
            println!(
                "page {page_size:>4} {:5} scales {:>5.1} % of the codes, {saved:.2}x smaller than f16, \
                 at most {:.0} KiB a layer and sequence in full precision besides",
                storage.name(),
                100.0 * overhead,
                residual_bytes(&config)? as f64 / 1024.0
            );
        }
    }

    println!(
        "\nWaste of pages, mean of all lengths from 1 on: half a page a sequence, one less a row at most\n"
    );
    for page_size in [16, 64, 256] {
        let waste = |from: usize, to: usize| {
            let sum: f64 = (from..to).map(|len| fragmentation(page_size, len)).sum();
            100.0 * sum / (to - from) as f64
        };
        println!(
            "page {page_size:>4}: {:.1} % up to 1024 rows, {:.2} % from there to 16384",
            waste(1, 1025),
            waste(1025, 16385)
        );
    }
    println!(
        "A region reserved for 4096 rows wastes {:.0} % at 512.",
        100.0 * fragmentation(4096, 512)
    );
    for (prefix, own) in [(2048, 0), (2048, 100), (100, 100)] {
        let (forked, copied) = pages_of_fork(64, prefix, own, 8);
        println!(
            "8 beams over {prefix} rows, {own} of their own: {forked} pages forked, {copied} copied"
        );
    }

    println!("\nTokens through the layers, with a cache and without\n");
    for (prompt, new) in [(128, 128), (1024, 100), (1024, 1024), (8192, 256)] {
        let (cached, uncached) = tokens_processed(prompt, new);
        let ratio = uncached as f64 / cached as f64;
        println!("{prompt:>5} + {new:>4}: {cached:>6} against {uncached:>8}, {ratio:.0}x");
    }
    // Scores of attention, full squares: every step anew, or the prompt once and then a row a step.
    let (prompt, new) = (1024_u64, 100_u64);
    let anew: u64 = (prompt..prompt + new).map(|len| len * len).sum();
    let steps: u64 = (prompt..prompt + new).sum();
    println!(
        "scores of attention, 1024 + 100: {:.0}x fewer with a cache, {:.2}x (the 109x that is often quoted) \
         counting its prefill alone",
        anew as f64 / (prompt * prompt + steps) as f64,
        anew as f64 / (prompt * prompt) as f64
    );

    println!(
        "\nOperations per byte read from the cache (an accelerator needs 150 to 300 to be busy)\n"
    );
    for model in Model::KNOWN {
        println!(
            "{:20} decode f16 {:>6.1}, int4 {:>6.1}; prefill of 512 f16 {:>8.0}",
            model.name,
            intensity(&model, 1, Storage::F16),
            intensity(&model, 1, Storage::Int4),
            intensity(&model, 512, Storage::F16)
        );
    }
    Ok(())
}
