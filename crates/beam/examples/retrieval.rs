//! Generative retrieval: only titles of a catalogue may come out, and many of them are wanted.
//!
//! `cargo run --release -p beam --example retrieval`

use beam::{Beams, Error, Model, ModelError, Options, Trie, beam_search};
use ndarray::{Array2, ArrayView2};

/// Letters, and token 0 as the end.
const VOCABULARY: usize = 27;

/// Likes what the query has: a letter is likely if it follows in the query what was just written.
struct Echo {
    logits: Array2<f32>,
}

impl Model for Echo {
    type Element = f32;

    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn score(&mut self, beams: &Beams<'_>) -> Result<ArrayView2<'_, f32>, ModelError> {
        self.logits = Array2::from_elem((beams.len(), VOCABULARY), 0.0);
        for row in 0..beams.len() {
            let (query, generated) = (beams.prompt(row), beams.generated(row));
            for (at, &letter) in query.iter().enumerate() {
                let follows = query[..at].last() == generated.last();
                self.logits[[row, letter as usize]] += if follows { 3.0 } else { 0.2 };
            }
        }
        Ok(self.logits.view())
    }
}

fn main() -> Result<(), Error> {
    let titles =
        ["tern", "turn", "tensor", "sensor", "attention", "retention", "tension", "mention"];
    let encode =
        |text: &str| text.bytes().map(|byte| u32::from(byte - b'a') + 1).collect::<Vec<_>>();
    let decode = |tokens: &[u32]| -> String {
        let letters = tokens.iter().filter(|&&token| token > 0);
        letters.map(|&token| char::from(token as u8 - 1 + b'a')).collect()
    };
    let trie = Trie::new(titles.map(encode));
    let options = Options {
        num_beams: 8,
        num_return: Some(4),
        eos: &[0],
        max_new_tokens: 12,
        constraint: Some(&trie),
        ..Options::default()
    };
    let queries = ["tension", "sensors"];
    let mut model = Echo { logits: Array2::default((0, 0)) };
    let output = beam_search(&mut model, &queries.map(encode), &options)?;
    for (query, item) in queries.iter().zip(&output.items) {
        println!("{query}:");
        for found in &item.hypotheses {
            println!("  {:10} {:.3}", decode(&found.tokens), found.score);
        }
    }
    assert_eq!(decode(&output.items[0].hypotheses[0].tokens), "tension");
    Ok(())
}
