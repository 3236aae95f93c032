//! The best sequence so far after every step, and what the search can say about its result.
//!
//! `cargo run --release -p beam --example streaming`

use beam::{Bigram, Error, Options, Search};
use ndarray::Array2;

const WORDS: [&str; 8] = [".", "the", "cat", "dog", "sees", "likes", "old", "a"];

fn main() -> Result<(), Error> {
    // What may follow what; everything else is unlikely.
    let pairs = [
        ("the", "old", 1.0),
        ("the", "cat", 1.5),
        ("the", "dog", 1.4),
        ("a", "dog", 1.2),
        ("a", "cat", 1.0),
        ("old", "dog", 2.0),
        ("cat", "sees", 1.5),
        ("cat", "likes", 1.6),
        ("cat", ".", 1.0),
        ("dog", "likes", 1.0),
        ("dog", ".", 2.0),
        ("sees", "the", 1.5),
        ("sees", "a", 1.4),
        ("likes", "a", 2.5),
    ];
    let index = |word: &str| WORDS.iter().position(|other| *other == word).unwrap_or(0);
    let mut table = Array2::from_elem((WORDS.len(), WORDS.len()), -4.0_f32);
    for (first, second, logit) in pairs {
        table[[index(first), index(second)]] = logit;
    }
    let mut model = Bigram::new(table)?;

    let options = Options {
        num_beams: 4,
        num_return: Some(2),
        eos: &[0],
        max_new_tokens: 12,
        alpha: 0.8,
        no_repeat_ngram: 2,
        ..Options::default()
    };
    let text = |tokens: &[u32]| {
        let words: Vec<_> = tokens.iter().map(|&token| WORDS[token as usize]).collect();
        words.join(" ")
    };
    let mut search = Search::new(&[[index("the") as u32]], WORDS.len(), &options)?;
    while search.step(&mut model)? {
        if let Some(best) = search.best(0) {
            println!("  the {} ..", text(&best.tokens));
        }
    }
    let output = search.finish();
    for item in &output.items {
        for found in &item.hypotheses {
            let (score, logprob) = (found.score, found.logprob);
            println!("the {:40} score {score:.3}, logprob {logprob:.3}", text(&found.tokens));
        }
        println!("{:?}; proven to be the best: {}", item.report, item.is_optimal());
    }
    Ok(())
}
