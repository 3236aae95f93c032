//! Beam searches: any options over any bigram model, beside the oracle.

#![no_main]

use arbitrary::{Result, Unstructured};
use beam::{
    Bigram, EarlyStopping, Groups, ModelOutput, Options, Rule, Trie, beam_search,
    beam_search_reference,
};
use libfuzzer_sys::fuzz_target;
use ndarray::Array2;

fuzz_target!(|bytes: &[u8]| {
    let _ = run(&mut Unstructured::new(bytes));
});

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let vocabulary = u.int_in_range(0..=7_usize)?;
    let eos = tokens(u, 3)?;
    let bad_words =
        (0..u.int_in_range(0..=2)?).map(|_| tokens(u, 3)).collect::<Result<Vec<_>>>()?;
    let trie =
        Trie::new((0..u.int_in_range(0..=4)?).map(|_| tokens(u, 3)).collect::<Result<Vec<_>>>()?);
    let rule = match u.int_in_range(0..=4)? {
        0 => Rule::Pool,
        1 => Rule::Patience { patience: number(u, 1.0)? },
        2 => Rule::Transformers { early_stopping: EarlyStopping::Heuristic },
        3 => Rule::Transformers { early_stopping: EarlyStopping::Immediate },
        _ => Rule::Transformers { early_stopping: EarlyStopping::Never },
    };
    let options = Options {
        num_beams: u.int_in_range(0..=6)?,
        num_return: if u.arbitrary()? { Some(u.int_in_range(0..=7)?) } else { None },
        max_new_tokens: u.int_in_range(0..=6)?,
        eos: &eos,
        alpha: number(u, 1.0)?,
        rule,
        exact_stop: u.arbitrary()?,
        model_output: if u.ratio(1, 4)? {
            ModelOutput::Logits
        } else {
            ModelOutput::LogProbabilities
        },
        min_new_tokens: count(u)?,
        min_length: count(u)?,
        no_repeat_ngram: count(u)?,
        bad_words: &bad_words,
        constraint: if u.ratio(1, 4)? { Some(&trie) } else { None },
        groups: Groups {
            count: if u.ratio(3, 4)? { 1 } else { u.int_in_range(0..=4)? },
            penalty: number(u, 0.5)?,
        },
    };
    let prompts = (0..u.int_in_range(0..=3)?).map(|_| tokens(u, 4)).collect::<Result<Vec<_>>>()?;
    let table = (0..vocabulary * vocabulary).map(|_| logit(u)).collect::<Result<Vec<_>>>()?;
    let table =
        Array2::from_shape_vec((vocabulary, vocabulary), table).expect("as many as it says");

    let mut model = Bigram::new(table.clone()).expect("a square table");
    let Ok(found) = beam_search(&mut model, &prompts, &options) else { return Ok(()) };
    assert_eq!(found.items.len(), prompts.len());
    // The softmax rounds otherwise than the oracle's, and where sequences tie, the last bit decides.
    if options.model_output == ModelOutput::Logits {
        return Ok(());
    }
    for (prompt, item) in prompts.iter().zip(&found.items) {
        let next = |sequence: &[u32]| match sequence.last() {
            Some(&last) => Ok(table.row(last as usize).to_vec()),
            None => Ok(table.row(0).to_vec()),
        };
        let wanted = beam_search_reference(next, vocabulary, prompt, &options)
            .expect("options that a search took");
        assert_eq!(item.hypotheses.len(), wanted.len());
        for (got, wanted) in item.hypotheses.iter().zip(&wanted) {
            assert_eq!(got.tokens, wanted.tokens);
            assert_eq!(got.score, wanted.score);
        }
    }
    Ok(())
}

fn tokens(u: &mut Unstructured<'_>, most: usize) -> Result<Vec<u32>> {
    let token = |u: &mut Unstructured<'_>| {
        if u.ratio(63, 64)? { u.int_in_range(0..=6) } else { u.arbitrary() }
    };
    (0..u.int_in_range(0..=most)?).map(|_| token(u)).collect()
}

/// Mostly of an ordinary size.
fn number(u: &mut Unstructured<'_>, usual: f64) -> Result<f64> {
    Ok(match u.int_in_range(0..=15)? {
        0 => u.arbitrary()?,
        1 => 0.0,
        2 => -usual,
        n => usual * f64::from(n) / 4.0,
    })
}

fn count(u: &mut Unstructured<'_>) -> Result<usize> {
    match u.int_in_range(0..=15)? {
        0 => u.arbitrary(),
        1..=4 => u.int_in_range(0..=5),
        _ => Ok(0),
    }
}

fn logit(u: &mut Unstructured<'_>) -> Result<f64> {
    Ok(match u.int_in_range(0..=31)? {
        0 => u.arbitrary()?,
        1 => f64::NEG_INFINITY,
        n => f64::from(n) / -4.0,
    })
}
