//! Exponential and hyperbolic tangent to about 30 digits: pairs of `f64` whose sum is the value
//! (Dekker, 1971), Taylor series, no shortcut. The oracle for functions of `f64`.

/// The value `hi + lo`, with `hi` the `f64` nearest to it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pair {
    pub(crate) hi: f64,
    pub(crate) lo: f64,
}

/// `ln 2` in three parts; a whole number below 2^11 times the first is exact.
const LN_2: [f64; 3] =
    [0.693_147_180_369_123_8, 1.908_214_929_270_587_7e-10, 1.161_222_722_936_253_2e-26];

/// `(n, y)` with `e^x = 2^n y` and `y` near 1: scaled, because the low part of a small result would
/// be subnormal.
pub(crate) fn exp(x: f64) -> (i32, Pair) {
    let (n, r) = reduce(x);
    (n, add(expm1_reduced(r), from(1.0)))
}

/// `tanh(x)`.
pub(crate) fn tanh(x: f64) -> Pair {
    if x.abs() > 40.0 {
        // 1 - 2 e^-80 rounds to 1, by far.
        return from(1.0_f64.copysign(x));
    }
    // (e^2x - 1) / (e^2x + 1), from e^2x - 1 because x may be small.
    let (n, r) = reduce(2.0 * x);
    let scale = from(2.0_f64.powi(n));
    let expm1 = add(mul(expm1_reduced(r), scale), add(scale, from(-1.0)));
    div(expm1, add(expm1, from(2.0)))
}

/// `(n, r)` with `x = n ln 2 + r` and `|r| <= ln 2 / 2`.
fn reduce(x: f64) -> (i32, Pair) {
    let n = (x / std::f64::consts::LN_2).round();
    let parts = LN_2.map(|part| mul(from(-n), from(part)));
    (n as i32, parts.into_iter().fold(from(x), add))
}

/// `e^r - 1 = r (1 + r/2 (1 + r/3 (...)))`.
fn expm1_reduced(r: Pair) -> Pair {
    let series =
        (2..30).rev().fold(from(1.0), |sum, k| add(from(1.0), div(mul(sum, r), from(k.into()))));
    mul(r, series)
}

fn from(hi: f64) -> Pair {
    Pair { hi, lo: 0.0 }
}

fn add(a: Pair, b: Pair) -> Pair {
    let hi = a.hi + b.hi;
    let part = hi - a.hi;
    let error = (a.hi - (hi - part)) + (b.hi - part);
    normalise(hi, error + (a.lo + b.lo))
}

fn mul(a: Pair, b: Pair) -> Pair {
    let hi = a.hi * b.hi;
    normalise(hi, a.hi.mul_add(b.hi, -hi) + (a.hi * b.lo + a.lo * b.hi))
}

fn div(a: Pair, b: Pair) -> Pair {
    let quotient = a.hi / b.hi;
    let rest = add(a, mul(from(-quotient), b));
    normalise(quotient, rest.hi / b.hi)
}

fn normalise(hi: f64, lo: f64) -> Pair {
    let sum = hi + lo;
    Pair { hi: sum, lo: lo - (sum - hi) }
}
