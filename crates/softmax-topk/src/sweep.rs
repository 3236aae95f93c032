//! The sweeps over a segment of a row: its maxima, and its sum of exponentials.

use std::ops::Range;

use tensor_utils::simd::{Select, Simd, SimdBase, SimdFloat, SimdMask};
use tensor_utils::{Element, Float};

use crate::Logit;
use crate::mass::Mass;
use crate::score::Score;
use crate::source::{STRIPE, Source, Stripe, load, splat};

/// Columns of a stripe: its maxima are those of every sixteenth score, which needs no operation
/// across the lanes of a vector.
pub(crate) const COLUMNS: usize = 16;

/// The largest scores of a stripe, by column. Unspecified if one is NaN.
pub(crate) type Maxima<A> = [A; COLUMNS];

/// Stripes of a segment: one is summed by one thread, relative to a maximum of its own, whatever the
/// number of threads.
pub(crate) const SEGMENT: usize = 128;

/// Stripes whose exponentials are added in the compute type, before the sum goes on in f64.
const SUMMED: usize = 32;

/// Stripes of a segment whose maximum is known before their sum.
const LEAD: usize = 8;

/// Sums that the exponentials of a stripe are added to in turn, so that one addition need not wait for
/// the last.
const CHAINS: usize = 4;

/// The reciprocal of the temperature as the sum of two numbers of the compute type.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Coldness<A> {
    pub(crate) high: A,
    pub(crate) low: A,
}

impl<A: Float> Coldness<A> {
    pub(crate) fn of(temperature: f64) -> Self {
        let reciprocal = 1.0 / temperature;
        let high = A::from_f64(reciprocal);
        Self { high, low: A::from_f64(reciprocal - high.to_f64()) }
    }
}

/// One pass over a segment: maxima and sum (eqs. 2 and 3, by stripes).
pub(crate) fn maxima_and_sum<S: Simd, T: Logit>(
    simd: S,
    source: &Source<'_, T>,
    stripes: Range<usize>,
    maxima: &mut [Maxima<T::Acc>],
    temperature: f64,
) -> Mass<T::Acc> {
    simd.vectorize(
        #[inline(always)]
        || match temperature {
            1.0 => online::<S, T, false>(simd, source, stripes, maxima, temperature),
            _ => online::<S, T, true>(simd, source, stripes, maxima, temperature),
        },
    )
}

#[inline(always)]
fn online<S: Simd, T: Logit, const SCALED: bool>(
    simd: S,
    source: &Source<'_, T>,
    stripes: Range<usize>,
    maxima: &mut [Maxima<T::Acc>],
    temperature: f64,
) -> Mass<T::Acc> {
    let first = stripes.start;
    let lead = stripes.len().min(LEAD);
    let mut max = lead_max(simd, source, first, &mut maxima[..lead]);
    let mut sum = Sum::<S, T::Acc>::new(simd, max, temperature);
    source.for_each(
        simd,
        stripes,
        #[inline(always)]
        |stripe, scores| {
            if stripe - first >= lead {
                let largest = column_maxima(simd, scores, &mut maxima[stripe - first]);
                if largest.simd_gt(sum.max).any_true() {
                    let new = largest.reduce_max();
                    let d = (max.to_f64() - new.to_f64()) / temperature;
                    sum.raise(simd, new, T::Acc::from_f64(d));
                    max = new;
                }
            }
            sum.add::<SCALED>(simd, scores);
            if (stripe - first) % SUMMED == SUMMED - 1 {
                sum.flush(simd);
            }
        },
    );
    sum.flush(simd);
    let lowest = max == T::Acc::LOWEST && !sum.total.is_nan();
    // Nothing has been above the lowest number: either it is the largest itself, or all are -inf.
    if lowest && !maxima.iter().flatten().any(|&x| x == max) {
        return Mass::NONE;
    }
    Mass { max, sum: sum.total }
}

/// Stores the maxima of the first stripes, and returns the largest, to begin with: of a segment in random
/// order half of the corrections fall into them. At least the lowest number, so that -inf needs no
/// special case.
#[inline(always)]
fn lead_max<S: Simd, T: Logit>(
    simd: S,
    source: &Source<'_, T>,
    first: usize,
    maxima: &mut [Maxima<T::Acc>],
) -> T::Acc {
    let mut max = splat(simd, T::Acc::LOWEST);
    source.for_each(
        simd,
        first..first + maxima.len(),
        #[inline(always)]
        |stripe, scores| {
            max = column_maxima(simd, scores, &mut maxima[stripe - first]).max(max);
        },
    );
    max.reduce_max()
}

/// The first of two passes over a segment: maxima.
pub(crate) fn maxima<S: Simd, T: Logit>(
    simd: S,
    source: &Source<'_, T>,
    stripes: Range<usize>,
    maxima: &mut [Maxima<T::Acc>],
) -> T::Acc {
    simd.vectorize(
        #[inline(always)]
        || {
            let first = stripes.start;
            let mut max = splat(simd, T::Acc::NEG_INFINITY);
            source.for_each(
                simd,
                stripes,
                #[inline(always)]
                |stripe, scores| {
                    max = column_maxima(simd, scores, &mut maxima[stripe - first]).max(max);
                },
            );
            max.reduce_max()
        },
    )
}

/// The second of two passes over a segment: the sum, relative to a finite `max`.
pub(crate) fn sum<S: Simd, T: Logit>(
    simd: S,
    source: &Source<'_, T>,
    stripes: Range<usize>,
    max: T::Acc,
    temperature: f64,
) -> f64 {
    simd.vectorize(
        #[inline(always)]
        || match temperature {
            1.0 => plain_sum::<S, T, false>(simd, source, stripes, max, temperature),
            _ => plain_sum::<S, T, true>(simd, source, stripes, max, temperature),
        },
    )
}

#[inline(always)]
fn plain_sum<S: Simd, T: Logit, const SCALED: bool>(
    simd: S,
    source: &Source<'_, T>,
    stripes: Range<usize>,
    max: T::Acc,
    temperature: f64,
) -> f64 {
    let first = stripes.start;
    let mut sum = Sum::<S, T::Acc>::new(simd, max, temperature);
    source.for_each(
        simd,
        stripes,
        #[inline(always)]
        |stripe, scores| {
            sum.add::<SCALED>(simd, scores);
            if (stripe - first) % SUMMED == SUMMED - 1 {
                sum.flush(simd);
            }
        },
    );
    sum.flush(simd);
    sum.total
}

/// Stores the largest score of each column; returns the larger of the columns that share a lane.
#[inline(always)]
fn column_maxima<S: Simd, A: Float>(
    simd: S,
    scores: &Stripe<A>,
    to: &mut Maxima<A>,
) -> A::Vector<S> {
    let lanes = A::Vector::<S>::LEN;
    let mut all = load(simd, scores, 0);
    let mut column = 0;
    while column < COLUMNS {
        let mut rows = [load(simd, scores, column); STRIPE / COLUMNS];
        for row in 1..STRIPE / COLUMNS {
            rows[row] = load(simd, scores, row * COLUMNS + column);
        }
        // As a tree, so that one comparison need not wait for the last.
        let pairs: [_; 4] = std::array::from_fn(|i| rows[i].max(rows[i + 4]));
        let max = pairs[0].max(pairs[2]).max(pairs[1].max(pairs[3]));
        max.store_slice(&mut to[column..][..lanes]);
        all = if column == 0 { max } else { max.max(all) };
        column += lanes;
    }
    all
}

/// A sum of exponentials.
struct Sum<S: Simd, A: Float> {
    max: A::Vector<S>,
    high: A::Vector<S>,
    low: A::Vector<S>,
    /// The exponential of less is nothing.
    underflow: A::Vector<S>,
    chains: [A::Vector<S>; CHAINS],
    total: f64,
}

impl<S: Simd, A: Float> Sum<S, A> {
    #[inline(always)]
    fn new(simd: S, max: A, temperature: f64) -> Self {
        let coldness = Coldness::<A>::of(temperature);
        Self {
            max: splat(simd, max),
            high: splat(simd, coldness.high),
            low: splat(simd, coldness.low),
            underflow: splat(simd, A::from_f64(A::MIN_POSITIVE.ln())),
            chains: [splat(simd, A::ZERO); CHAINS],
            total: 0.0,
        }
    }

    /// Adds the exponentials of a stripe, of which none is above the maximum.
    #[inline(always)]
    fn add<const SCALED: bool>(&mut self, simd: S, scores: &Stripe<A>) {
        let lanes = A::Vector::<S>::LEN;
        for first in (0..STRIPE).step_by(CHAINS * lanes) {
            let mut d = self.chains;
            for i in 0..CHAINS {
                d[i] = load(simd, scores, first + i * lanes) - self.max;
            }
            if SCALED {
                for d in &mut d {
                    let scaled = *d * self.high;
                    // Of -inf there is no product with 0.
                    let tiny = scaled.simd_lt(self.underflow);
                    *d = tiny.select(self.underflow, d.mul_add(self.low, scaled));
                }
            }
            let (e, scale) = A::exp_nonpositive_factors(simd, d);
            for i in 0..CHAINS {
                self.chains[i] = e[i].mul_add(scale[i], self.chains[i]);
            }
        }
    }

    /// Makes everything relative to a larger maximum; `d = (old - new) / temperature`.
    #[inline(always)]
    fn raise(&mut self, simd: S, max: A, d: A) {
        let factor = A::exp_nonpositive_vector(simd, splat(simd, d));
        for chain in &mut self.chains {
            *chain *= factor;
        }
        self.total *= factor.as_slice()[0].to_f64();
        self.max = splat(simd, max);
    }

    /// Moves what is in the vectors to the total.
    #[inline(always)]
    fn flush(&mut self, simd: S) {
        let [a, b, c, d] = self.chains;
        self.total += ((a + b) + (c + d)).reduce_sum().to_f64();
        self.chains = [splat(simd, A::ZERO); CHAINS];
    }
}
