//! Generation with a small random transformer: plain, with prompt lookup, and with a drafter that is
//! a smaller model; the budget of each cycle from the measured cost of a pass. The text is the same
//! every time: `cargo run --release -p dflash --example generate`.

#[path = "../tests/common/transformer.rs"]
mod transformer;

use std::error::Error;
use std::time::Instant;

use dflash::{
    CostCurve, DecodeOptions, Drafter, ModelDrafter, ModelDrafts, NoDraft, Pass, PromptLookup,
    Target, TokenTree, generate,
};
use kvcache::{Cache, Config, Layout, Rows};
use ndarray::Array2;
use transformer::{Sizes, Transformer};

const SIZES: Sizes = Sizes { vocabulary: 2000, layers: 4, heads: 8, key_heads: 2, head_size: 32 };

fn cache(layers: usize) -> Result<Cache, kvcache::Error> {
    let config: Config = Sizes { layers, ..SIZES }.cache();
    Cache::new(&config.with_layout(Layout::Paged { pages: 40 }))
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut target = Transformer::new(SIZES, 1);
    let curve = measure(&mut target)?;
    println!("seconds a pass: 1 row {:.1e}, 16 rows {:.1e}", curve.seconds(1), curve.seconds(16));

    // Random models are not predictable: this drafter is the target itself without its last layers.
    let drafts = ModelDrafts::Best { width: 4, depth: 4 };
    let mut smaller =
        ModelDrafter::new(Transformer::new(SIZES, 1).first_layers(2), cache(2)?, drafts);
    let prompt: Vec<u32> = (0..60).map(|i| (i * i) % 50).collect();
    let drafters: [(&str, &mut dyn Drafter); 3] = [
        ("plain", &mut NoDraft),
        ("prompt lookup", &mut PromptLookup::default()),
        ("smaller model", &mut smaller),
    ];
    let mut plain = Vec::new();
    for (name, mut drafter) in drafters {
        let options = DecodeOptions {
            max_new_tokens: 200,
            budget: 16,
            cost: Some(&curve),
            ..DecodeOptions::default()
        };
        let start = Instant::now();
        let generations = generate(&mut target, &mut cache(4)?, &mut drafter, &[&prompt], options)?;
        let seconds = start.elapsed().as_secs_f64();
        let generation = &generations[0];
        println!(
            "{name:14} {:3} cycles, {:.2} tokens a cycle, {:.0} a second",
            generation.cycles,
            generation.tokens.len() as f64 / generation.cycles as f64,
            generation.tokens.len() as f64 / seconds,
        );
        if plain.is_empty() {
            plain.clone_from(&generation.tokens);
        }
        assert_eq!(generation.tokens, plain, "the drafter changed the text");
    }
    Ok(())
}

/// Passes over chains of some lengths, after 100 tokens.
fn measure(model: &mut Transformer) -> Result<CostCurve, Box<dyn Error>> {
    let mut cache = cache(SIZES.layers)?;
    let seq = cache.create()?;
    let mut run = |first: usize, rows: usize| -> Result<(), dflash::Error> {
        let pass = Pass {
            seq,
            tokens: vec![1; rows],
            positions: (first..first + rows).collect(),
            rows: Rows::Last(rows),
        };
        let mut logits = Array2::zeros((rows, SIZES.vocabulary));
        let done = model.forward(&mut cache, &[pass], Some(logits.view_mut()));
        done.map_err(|source| dflash::Error::Callback { who: "target model", source })?;
        if first > 0 { Ok(cache.truncate(seq, first)?) } else { Ok(()) }
    };
    run(0, 100)?;
    // The rows of an empty tree, and of trees of 3, 7 and 15 nodes.
    let rows = [0, 3, 7, 15].map(|nodes| nodes + TokenTree::empty().rows());
    Ok(CostCurve::measure(&rows, 5, |rows| run(100, rows))?)
}
