//! One step of decoding a batch: grammar mask, temperature, top-k, top-p, a seeded draw, and the rank of
//! a token that was expected.
//!
//! `cargo run --release -p softmax-topk --example decode`

use ndarray::{Array1, Array2, array};
use softmax_topk::{Draw, Error, Mask, Options, PerRow, sample};

fn main() -> Result<(), Error> {
    let (rows, vocabulary) = (3, 50_257);
    let logits = Array2::from_shape_fn((rows, vocabulary), |(row, token)| {
        (((row + 1) * token) as f32 * 0.7).sin() * 8.0
    });
    // The grammar of the second row allows even tokens only.
    let mut mask = Array2::from_elem((rows, vocabulary.div_ceil(32)), u32::MAX);
    mask.row_mut(1).fill(0x5555_5555);
    let temperature = array![0.7, 1.0, 1.3];
    let expected = array![[11_u32], [12], [13]];
    let options = Options {
        temperature: PerRow::Each(temperature.view()),
        mask: Some(Mask::U32(mask.view())),
        top_p: PerRow::All(0.95),
        tokens: Some(expected.view()),
        ..Options::default()
    };
    for step in 0..3 {
        let draws = Array1::from_shape_fn(rows, |row| Draw { seed: row as u64, step });
        let drawn = sample(logits.view(), 50, &options, draws.view())?;
        for row in 0..rows {
            let column = drawn.columns[row] as usize;
            println!(
                "step {step}, row {row}: token {:5} (column {column:2}, probability {:.4}) of {} kept",
                drawn.tokens[row],
                drawn.top.probs[[row, column]],
                drawn.top.kept[row],
            );
        }
        if let Some(scores) = &drawn.top.tokens {
            println!("ranks of the expected tokens: {}", scores.ranks.column(0));
        }
    }
    Ok(())
}
