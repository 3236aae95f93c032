//! Beam search over a bigram model.

use anyhow::{Context, Result, bail, ensure};
use beam::{Bigram, EarlyStopping, Groups, Logit, Options, Rule, beam_search};
use ndarray::Array2;
use safetensors::Dtype;
use serde::Deserialize;
use tensor_utils::try_array;

use super::inputs::Inputs;
use super::tensor::{Output, Stored};

/// What stands where a sequence or a prompt has ended.
const PADDING: i64 = -1;

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Params {
    num_beams: usize,
    num_return_sequences: Option<usize>,
    alpha: f64,
    eos: Option<Eos>,
    max_new_tokens: usize,
    rule: RuleName,
    early_stopping: Option<Early>,
    patience: Option<f64>,
    min_new_tokens: usize,
    min_length: usize,
    no_repeat_ngram_size: usize,
    bad_words_ids: Vec<Vec<u32>>,
    num_beam_groups: usize,
    diversity_penalty: f64,
}

impl Default for Params {
    fn default() -> Self {
        let options = Options::default();
        Self {
            num_beams: options.num_beams,
            num_return_sequences: None,
            alpha: options.alpha,
            eos: None,
            max_new_tokens: options.max_new_tokens,
            rule: RuleName::default(),
            early_stopping: None,
            patience: None,
            min_new_tokens: 0,
            min_length: 0,
            no_repeat_ngram_size: 0,
            bad_words_ids: Vec::new(),
            num_beam_groups: options.groups.count,
            diversity_penalty: options.groups.penalty,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "`eos` must be a token or a list of tokens, from 0 on")]
enum Eos {
    One(u32),
    Several(Vec<u32>),
}

#[derive(Deserialize, Default, Clone, Copy, PartialEq)]
#[serde(rename_all = "lowercase")]
enum RuleName {
    #[default]
    Pool,
    Transformers,
    Patience,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "`early_stopping` must be true, false or \"never\"")]
enum Early {
    Flag(bool),
    Word(Never),
}

#[derive(Deserialize)]
enum Never {
    #[serde(rename = "never")]
    Never,
}

impl Params {
    fn rule(&self) -> Result<Rule> {
        ensure!(
            self.early_stopping.is_none() || self.rule == RuleName::Transformers,
            "the parameter `early_stopping` is for the rule `transformers` only",
        );
        ensure!(
            self.patience.is_none() || self.rule == RuleName::Patience,
            "the parameter `patience` is for the rule `patience` only",
        );
        Ok(match self.rule {
            RuleName::Pool => Rule::Pool,
            RuleName::Patience => Rule::Patience { patience: self.patience.unwrap_or(1.0) },
            RuleName::Transformers => Rule::Transformers {
                early_stopping: match self.early_stopping {
                    None | Some(Early::Flag(false)) => EarlyStopping::Heuristic,
                    Some(Early::Flag(true)) => EarlyStopping::Immediate,
                    Some(Early::Word(Never::Never)) => EarlyStopping::Never,
                },
            },
        })
    }
}

/// Computes `sequences`, `scores` and `logprobs`.
pub(super) fn run(inputs: &mut Inputs<'_>) -> Result<Vec<Output>> {
    match inputs.dtype("bigram")? {
        Dtype::F64 => run_as::<f64>(inputs),
        Dtype::F32 => run_as::<f32>(inputs),
        other => bail!("`in.bigram` is {other:?}, expected F64 or F32"),
    }
}

fn run_as<T: Logit + Stored>(inputs: &mut Inputs<'_>) -> Result<Vec<Output>> {
    let params: Params = inputs.params()?;
    let table: Array2<T> = inputs.array("bigram")?;
    let prompts: Array2<i64> = inputs.array("prompts")?;
    let prompts: Vec<_> =
        prompts.outer_iter().map(|row| prompt(row.iter().copied())).collect::<Result<_>>()?;
    let eos = match &params.eos {
        None => Vec::new(),
        Some(Eos::One(token)) => vec![*token],
        Some(Eos::Several(tokens)) => tokens.clone(),
    };
    let options = Options {
        num_beams: params.num_beams,
        num_return: params.num_return_sequences,
        max_new_tokens: params.max_new_tokens,
        eos: &eos,
        alpha: params.alpha,
        rule: params.rule()?,
        min_new_tokens: params.min_new_tokens,
        min_length: params.min_length,
        no_repeat_ngram: params.no_repeat_ngram_size,
        bad_words: &params.bad_words_ids,
        groups: Groups { count: params.num_beam_groups, penalty: params.diversity_penalty },
        ..Options::default()
    };
    let found = beam_search(&mut Bigram::new(table)?, &prompts, &options)?;

    let returned = params.num_return_sequences.unwrap_or(params.num_beams);
    let of_all = || found.items.iter().map(|item| &item.hypotheses);
    let longest = of_all().flatten().map(|hypothesis| hypothesis.tokens.len()).max().unwrap_or(0);
    let mut sequences = try_array("sequences", (found.items.len(), returned, longest))?;
    let mut scores = try_array("scores", (found.items.len(), returned))?;
    sequences.fill(PADDING);
    scores.fill(f64::NEG_INFINITY);
    let mut logprobs = try_array("logprobs", scores.dim())?;
    logprobs.assign(&scores);
    for (b, hypotheses) in of_all().enumerate() {
        for (k, hypothesis) in hypotheses.iter().enumerate() {
            scores[[b, k]] = hypothesis.score;
            logprobs[[b, k]] = hypothesis.logprob;
            for (t, &token) in hypothesis.tokens.iter().enumerate() {
                sequences[[b, k, t]] = token.into();
            }
        }
    }
    Ok(vec![
        Output::new("sequences", sequences),
        Output::new("scores", scores),
        Output::new("logprobs", logprobs),
    ])
}

/// The tokens before the padding.
fn prompt(row: impl Iterator<Item = i64> + Clone) -> Result<Vec<u32>> {
    let tokens = row.clone().take_while(|token| *token != PADDING);
    let tokens: Vec<u32> = tokens
        .map(|token| u32::try_from(token).with_context(|| format!("`in.prompts` has {token}")))
        .collect::<Result<_>>()?;
    let mut rest = row.skip(tokens.len());
    ensure!(rest.all(|token| token == PADDING), "`in.prompts` has tokens after the padding");
    Ok(tokens)
}
