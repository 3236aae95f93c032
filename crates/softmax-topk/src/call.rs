//! A checked call: options resolved against the shapes they came with.

use ndarray::{ArrayView1, ArrayView2, Axis};
use tensor_utils::check_shape;

use crate::score::Score;
use crate::{Error, Logit, Mask, NanPolicy, Options, PerRow};

/// What a call computes.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a, 'o, T: Logit> {
    pub(crate) logits: ArrayView2<'a, T>,
    pub(crate) k: usize,
    pub(crate) options: &'a Options<'o, T::Acc>,
}

/// What is the same for all tokens of a row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowOptions {
    pub(crate) temperature: f64,
    pub(crate) log: bool,
    pub(crate) renormalise: bool,
    pub(crate) top_p: f64,
    pub(crate) min_p: f64,
    pub(crate) nan: NanPolicy,
}

impl<'a, 'o, T: Logit> Call<'a, 'o, T> {
    /// Checks everything but the outputs and the workspace.
    pub(crate) fn new(
        logits: ArrayView2<'a, T>,
        k: usize,
        options: &'a Options<'o, T::Acc>,
    ) -> Result<Self, Error> {
        let (rows, vocabulary) = logits.dim();
        if vocabulary == 0 || u32::try_from(vocabulary).is_err() {
            return Err(Error::Vocabulary { vocabulary });
        }
        if k == 0 || k > vocabulary {
            return Err(Error::K { k, vocabulary });
        }
        check_options(rows, vocabulary, options)?;
        Ok(Self { logits, k, options })
    }

    pub(crate) fn rows(&self) -> usize {
        self.logits.dim().0
    }

    pub(crate) fn vocabulary(&self) -> usize {
        self.logits.dim().1
    }

    pub(crate) fn row_options(&self, row: usize) -> RowOptions {
        let Options { temperature, log, renormalise, top_p, min_p, nan, .. } = *self.options;
        RowOptions {
            temperature: temperature.at(row),
            log,
            renormalise,
            top_p: top_p.at(row),
            min_p: min_p.at(row),
            nan,
        }
    }

    /// The tokens of the row whose log-probability is wanted.
    pub(crate) fn tokens(&self, row: usize) -> Option<ArrayView1<'_, u32>> {
        self.options.tokens.map(|tokens| tokens.reborrow().index_axis_move(Axis(0), row))
    }

    /// The bias of a row.
    pub(crate) fn bias(&self, row: usize) -> Option<ArrayView1<'_, T::Acc>> {
        self.options.bias.map(|bias| of_row(bias.reborrow(), row))
    }

    /// The mask of a row.
    pub(crate) fn mask(&self, row: usize) -> Option<MaskRow<'_>> {
        self.options.mask.map(|mask| match mask {
            Mask::U32(words) => MaskRow::U32(of_row(words.reborrow(), row)),
            Mask::U64(words) => MaskRow::U64(of_row(words.reborrow(), row)),
        })
    }
}

/// The mask of a row.
#[derive(Debug, Clone, Copy)]
pub(crate) enum MaskRow<'a> {
    U32(ArrayView1<'a, u32>),
    U64(ArrayView1<'a, u64>),
}

impl MaskRow<'_> {
    /// The bits of 32 tokens from `32 * word` on.
    #[inline(always)]
    pub(crate) fn word(&self, word: usize) -> u32 {
        match self {
            Self::U32(words) => words[word],
            Self::U64(words) => (words[word / 2] >> (word % 2 * 32)) as u32,
        }
    }

    /// Whether a token is allowed.
    #[inline(always)]
    pub(crate) fn allows(&self, token: usize) -> bool {
        self.word(token / 32) >> (token % 32) & 1 == 1
    }
}

impl PerRow<'_> {
    pub(crate) fn at(&self, row: usize) -> f64 {
        match self {
            Self::All(value) => *value,
            Self::Each(values) => values[row],
        }
    }
}

/// A row of a matrix that has one for each, or one for all.
fn of_row<T>(matrix: ArrayView2<'_, T>, row: usize) -> ArrayView1<'_, T> {
    let row = if matrix.dim().0 == 1 { 0 } else { row };
    matrix.index_axis_move(Axis(0), row)
}

fn check_options<A: Score>(
    rows: usize,
    vocabulary: usize,
    options: &Options<'_, A>,
) -> Result<(), Error> {
    let Options { temperature, mask, bias, top_p, min_p, tokens, .. } = options;
    let or_one = |given: usize| if given == 1 { 1 } else { rows };
    if let Some(bias) = bias {
        check_shape("bias", bias.shape(), &[or_one(bias.dim().0), vocabulary])?;
    }
    match mask {
        Some(Mask::U32(words)) => {
            let expected = [or_one(words.dim().0), vocabulary.div_ceil(32)];
            check_shape("mask", words.shape(), &expected)?;
        }
        Some(Mask::U64(words)) => {
            let expected = [or_one(words.dim().0), vocabulary.div_ceil(64)];
            check_shape("mask", words.shape(), &expected)?;
        }
        None => {}
    }
    let positive = "a positive finite number, at most a thousandth of the largest of the compute type and with \
                    a finite reciprocal in it";
    check_per_row("temperature", temperature, rows, positive, |t| {
        // Above, a score that is further below the maximum than any number has a share that counts.
        let largest = -A::LOWEST.to_f64() / 1000.0;
        t > 0.0 && t <= largest && A::from_f64(1.0 / t).is_finite()
    })?;
    check_per_row("top_p", top_p, rows, "above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?;
    check_per_row("min_p", min_p, rows, "at least 0 and at most 1", |p| (0.0..=1.0).contains(&p))?;
    if let Some(tokens) = tokens {
        check_shape("tokens", tokens.shape(), &[rows, tokens.dim().1])?;
        check_tokens("tokens", *tokens, vocabulary)?;
    }
    Ok(())
}

fn check_per_row(
    option: &'static str,
    values: &PerRow<'_>,
    rows: usize,
    expected: &'static str,
    fits: impl Fn(f64) -> bool,
) -> Result<(), Error> {
    let first_wrong = match values {
        PerRow::All(value) => (!fits(*value)).then_some((0, *value)),
        PerRow::Each(values) => {
            check_shape(option, values.shape(), &[rows])?;
            values.iter().copied().enumerate().find(|&(_, value)| !fits(value))
        }
    };
    match first_wrong {
        None => Ok(()),
        Some((row, got)) => Err(Error::Option { option, row, expected, got }),
    }
}

/// Checks that all tokens are in the vocabulary.
pub(crate) fn check_tokens(
    arg: &'static str,
    tokens: ArrayView2<'_, u32>,
    vocabulary: usize,
) -> Result<(), Error> {
    for (row, tokens) in tokens.axis_iter(Axis(0)).enumerate() {
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(Error::Token { arg, row, token, vocabulary });
        }
    }
    Ok(())
}
