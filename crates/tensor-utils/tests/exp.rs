//! The vector exponentials and tangents against higher precision, on every instruction set.

mod double_double;

use std::fmt;

use rayon::prelude::*;
use tensor_utils::simd::{Simd, SimdBase};
use tensor_utils::testing::{Seeded, ulp, ulp_error};
use tensor_utils::{Float, Isa, Kernel, dispatch, exp_nonpositive_fast};

/// Bounds that the docs promise, in ULP of the exact result.
const EXP_ULP: f64 = 1.0;
const TANH_F32_ULP: f64 = 1.5;
const TANH_F64_ULP: f64 = 2.0;
/// The relative error of `exp_nonpositive_fast` that the docs promise.
fn fast_bound(isa: Isa) -> f64 {
    if isa == Isa::Portable { 8e-6 } else { 4e-6 }
}

/// The smallest f32 and f64 whose exponential is not below the smallest normal number.
const UNDERFLOW_F32: f32 = -87.336_54;
const UNDERFLOW_F64: f64 = -708.396_418_532_264_1;

/// A prime: steps of it fall in step with no boundary of the format.
const STRIDE: u64 = 1021;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Function {
    Exp,
    ExpNonpositive,
    /// The product of the two.
    Factors,
    Weights,
    Tanh,
}

impl Function {
    /// Those with a bound in ULP.
    const ALL: [Self; 3] = [Self::Exp, Self::ExpNonpositive, Self::Tanh];
}

/// Applies a function to every element, four vectors at a time.
fn apply<T: Float>(isa: Isa, function: Function, x: &[T]) -> Vec<T> {
    struct Apply<'a, T>(Function, &'a mut [T]);

    impl<T: Float> Kernel for Apply<'_, T> {
        type Output = ();

        fn run<S: Simd>(self, simd: S) {
            let lanes = T::Vector::<S>::LEN;
            simd.vectorize(
                #[inline(always)]
                || {
                    for x in self.1.chunks_exact_mut(4 * lanes) {
                        let mut v = [T::Vector::<S>::from_slice(simd, &x[..lanes]); 4];
                        for (v, x) in v.iter_mut().zip(x.chunks_exact(lanes)) {
                            *v = T::Vector::<S>::from_slice(simd, x);
                        }
                        let y = match self.0 {
                            Function::Exp => v.map(|v| T::exp_vector(simd, v)),
                            Function::ExpNonpositive => {
                                v.map(|v| T::exp_nonpositive_vector(simd, v))
                            }
                            Function::Factors => {
                                let (mut e, scale) = T::exp_nonpositive_factors(simd, v);
                                for i in 0..4 {
                                    e[i] *= scale[i];
                                }
                                e
                            }
                            Function::Weights => T::exp_weights(simd, v),
                            Function::Tanh => v.map(|v| T::tanh_vector(simd, v)),
                        };
                        for (y, x) in y.iter().zip(x.chunks_exact_mut(lanes)) {
                            y.store_slice(x);
                        }
                    }
                },
            );
        }
    }

    let mut y = x.to_vec();
    y.resize(x.len().next_multiple_of(64), T::ZERO);
    dispatch(isa, Apply(function, &mut y)).expect("only available ones are asked for");
    y.truncate(x.len());
    y
}

/// Applies `exp_nonpositive_fast` to every element.
fn apply_fast(isa: Isa, x: &[f32]) -> Vec<f32> {
    struct Apply<'a>(&'a mut [f32]);

    impl Kernel for Apply<'_> {
        type Output = ();

        fn run<S: Simd>(self, simd: S) {
            simd.vectorize(
                #[inline(always)]
                || {
                    for x in self.0.chunks_exact_mut(S::f32s::LEN) {
                        let v = S::f32s::from_slice(simd, x);
                        exp_nonpositive_fast(simd, v).store_slice(x);
                    }
                },
            );
        }
    }

    let mut y = x.to_vec();
    y.resize(x.len().next_multiple_of(16), 0.0);
    dispatch(isa, Apply(&mut y)).expect("only available ones are asked for");
    y.truncate(x.len());
    y
}

/// The largest error found so far, and the argument it was found at.
#[derive(Debug, Clone, Copy, Default)]
struct Worst {
    error: f64,
    x: f64,
}

impl Worst {
    fn add(&mut self, error: f64, x: impl Into<f64>) {
        // `>=` would lose a NaN; there is none, an error that cannot be measured is infinite.
        assert!(!error.is_nan());
        if error > self.error {
            *self = Self { error, x: x.into() };
        }
    }

    fn merge(self, other: Self) -> Self {
        if other.error > self.error { other } else { self }
    }
}

impl fmt::Display for Worst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3e} at {:e}", self.error, self.x)
    }
}

/// `e^x` of an f32, flushed as promised.
fn exact_exp(x: f32) -> f64 {
    if x < UNDERFLOW_F32 { 0.0 } else { f64::from(x).exp() }
}

/// The largest errors over every `stride`-th of the 2^32 f32, one row an instruction set: those of
/// `Function::ALL` in ULP, and the relative one of `exp_nonpositive_fast`.
fn survey_f32(stride: u64) -> Vec<(Isa, [Worst; 4])> {
    const BLOCK: u64 = 1 << 16;
    let isas: Vec<Isa> = Isa::available().collect();
    let count = (1_u64 << 32).div_ceil(stride);
    let errors = (0..count.div_ceil(BLOCK))
        .into_par_iter()
        .map(|block| {
            let x: Vec<f32> = (block * BLOCK..count.min((block + 1) * BLOCK))
                .map(|i| f32::from_bits((i * stride) as u32))
                .collect();
            let exp: Vec<f64> = x.iter().map(|&x| exact_exp(x)).collect();
            let tanh: Vec<f64> = x.iter().map(|&x| f64::from(x).tanh()).collect();
            let mut errors = vec![[Worst::default(); 4]; isas.len()];
            for (&isa, errors) in isas.iter().zip(&mut errors) {
                for (function, worst) in Function::ALL.into_iter().zip(errors.iter_mut()) {
                    let want = if function == Function::Tanh { &tanh } else { &exp };
                    for ((&x, got), &want) in x.iter().zip(apply(isa, function, &x)).zip(want) {
                        if function != Function::ExpNonpositive || x <= 0.0 || x.is_nan() {
                            worst.add(ulp_error(got, want), x);
                        }
                    }
                }
                for ((&x, got), &want) in x.iter().zip(apply_fast(isa, &x)).zip(&exp) {
                    if x <= 0.0 || x.is_nan() {
                        errors[3].add(relative_error(got, want), x);
                    }
                }
            }
            errors
        })
        .reduce(
            || vec![[Worst::default(); 4]; isas.len()],
            |mut a, b| {
                for (a, b) in a.iter_mut().flatten().zip(b.iter().flatten()) {
                    *a = a.merge(*b);
                }
                a
            },
        );
    isas.into_iter().zip(errors).collect()
}

fn relative_error(got: f32, want: f64) -> f64 {
    let got = f64::from(got);
    if got == want || (got.is_nan() && want.is_nan()) {
        0.0
    } else if got.is_finite() && want.is_finite() {
        (got - want).abs() / want.abs()
    } else {
        f64::INFINITY
    }
}

fn check_f32(stride: u64) {
    for (isa, [exp, nonpositive, tanh, fast]) in survey_f32(stride) {
        println!("{isa}: exp {exp}, exp_nonpositive {nonpositive}, tanh {tanh}, fast {fast}");
        assert!(exp.error <= EXP_ULP, "{isa} exp: {exp}");
        assert!(nonpositive.error <= EXP_ULP, "{isa} exp_nonpositive: {nonpositive}");
        assert!(tanh.error <= TANH_F32_ULP, "{isa} tanh: {tanh}");
        assert!(fast.error <= fast_bound(isa), "{isa} exp_nonpositive_fast: {fast}");
    }
}

#[test]
fn f32_is_within_its_bounds_at_a_stride_of_all_inputs() {
    check_f32(STRIDE);
}

/// Takes minutes: `cargo test --release -p tensor-utils --test exp -- --ignored --nocapture`.
#[test]
#[ignore = "all 2^32 inputs"]
fn f32_is_within_its_bounds_at_all_inputs() {
    check_f32(1);
}

#[test]
fn f32_edges() {
    let inf = f32::INFINITY;
    let largest = 88.722_83;
    let cases = [
        (0.0, 1.0),
        (-0.0, 1.0),
        (f32::MIN_POSITIVE, 1.0),
        (-1e-40, 1.0),
        (-inf, 0.0),
        (f32::MIN, 0.0),
        (-104.0, 0.0),
        (UNDERFLOW_F32.next_down(), 0.0),
    ];
    let positive = [(inf, inf), (f32::MAX, inf), (89.5, inf), (f32::next_up(largest), inf)];
    for isa in Isa::available() {
        for function in [Function::Exp, Function::ExpNonpositive] {
            let one = |x| apply(isa, function, &[x])[0];
            for (x, want) in cases {
                assert_eq!(one(x).to_bits(), f32::to_bits(want), "{isa} {function:?} {x:e}");
            }
            assert!(one(f32::NAN).is_nan() && one(-f32::NAN).is_nan());
            assert!(one(UNDERFLOW_F32).is_normal());
        }
        for (x, want) in positive {
            assert_eq!(apply(isa, Function::Exp, &[x]), [want], "{isa} {x:e}");
        }
        assert!(apply(isa, Function::Exp, &[largest])[0].is_finite());

        let tanh = [(0.0, 0.0), (-0.0, -0.0), (inf, 1.0), (-inf, -1.0), (1e-42, 1e-42)];
        for (x, want) in tanh {
            let got = apply(isa, Function::Tanh, &[x])[0];
            assert_eq!(got.to_bits(), f32::to_bits(want), "{isa} tanh {x:e}");
        }
        assert!(apply(isa, Function::Tanh, &[f32::NAN])[0].is_nan());

        for (x, want) in cases {
            assert_eq!(apply_fast(isa, &[x]), [want], "{isa} fast {x:e}");
        }
        assert!(apply_fast(isa, &[f32::NAN])[0].is_nan());
    }
}

/// Arguments of all sizes: spread evenly, spread over the exponents, and around the reduction's
/// boundaries, the odd multiples of `ln 2 / 2`.
fn arguments_f64() -> Vec<f64> {
    let mut seeded = Seeded::new(1);
    let evenly = seeded.uniform::<f64, _>(200_000, -709.0..710.0);
    let near = seeded.uniform::<f64, _>(100_000, -1.0..1.0);
    let exponents = seeded.uniform::<f64, _>(50_000, -60.0..6.5).mapv(f64::exp2);
    let boundaries = (-1022..1024).flat_map(|n| {
        let middle = (f64::from(n) + 0.5) * std::f64::consts::LN_2;
        [middle.next_down(), middle, middle.next_up()]
    });
    let x = evenly.iter().chain(&near).chain(&exponents).copied();
    x.chain(exponents.iter().map(|x| -x)).chain(boundaries).collect()
}

/// Divides by 2^n in two steps, each with an exponent that exists.
fn unscale(x: f64, n: i32) -> f64 {
    x * 2.0_f64.powi(-n / 2) * 2.0_f64.powi(-n - -n / 2)
}

#[test]
fn f64_is_within_its_bounds() {
    let x = arguments_f64();
    let exp: Vec<_> = x.par_iter().map(|&x| double_double::exp(x)).collect();
    let tanh: Vec<_> = x.par_iter().map(|&x| double_double::tanh(x)).collect();
    for isa in Isa::available() {
        let mut worst = [Worst::default(); 3];
        for (function, worst) in Function::ALL.into_iter().zip(&mut worst) {
            for (i, got) in apply(isa, function, &x).into_iter().enumerate() {
                let (n, want) = if function == Function::Tanh { (0, tanh[i]) } else { exp[i] };
                if function == Function::ExpNonpositive && x[i] > 0.0 {
                    continue;
                }
                if function != Function::Tanh && x[i] < UNDERFLOW_F64 {
                    assert_eq!(got.to_bits(), 0, "{isa} {function:?} {}", x[i]);
                    continue;
                }
                let error = (unscale(got, n) - want.hi) - want.lo;
                let overflow = got == f64::INFINITY && x[i] > 709.782_712_893_384;
                worst.add(if overflow { 0.0 } else { error.abs() / ulp::<f64>(want.hi) }, x[i]);
            }
        }
        let [exp, nonpositive, tanh] = worst;
        println!("{isa}: exp {exp}, exp_nonpositive {nonpositive}, tanh {tanh}");
        assert!(exp.error <= EXP_ULP, "{isa} exp: {exp}");
        assert!(nonpositive.error <= EXP_ULP, "{isa} exp_nonpositive: {nonpositive}");
        assert!(tanh.error <= TANH_F64_ULP, "{isa} tanh: {tanh}");
    }
}

#[test]
fn f64_edges() {
    let inf = f64::INFINITY;
    let cases = [
        (0.0, 1.0),
        (-0.0, 1.0),
        (-1e-310, 1.0),
        (-inf, 0.0),
        (f64::MIN, 0.0),
        (-745.0, 0.0),
        (UNDERFLOW_F64.next_down(), 0.0),
    ];
    for isa in Isa::available() {
        for function in [Function::Exp, Function::ExpNonpositive] {
            let one = |x| apply(isa, function, &[x])[0];
            for (x, want) in cases {
                assert_eq!(one(x).to_bits(), f64::to_bits(want), "{isa} {function:?} {x:e}");
            }
            assert!(one(f64::NAN).is_nan());
            assert!(one(UNDERFLOW_F64).is_normal());
        }
        assert_eq!(apply(isa, Function::Exp, &[inf, f64::MAX, 709.8]), [inf; 3]);
        assert!(apply(isa, Function::Exp, &[709.782_712_893_384])[0].is_finite());
        assert_eq!(apply(isa, Function::Tanh, &[inf, -inf, 1e-310]), [1.0, -1.0, 1e-310]);
        assert!(apply(isa, Function::Tanh, &[f64::NAN])[0].is_nan());
    }
}

#[test]
fn oracle_knows_constants_to_thirty_digits() {
    // Computed with mpmath 1.3.
    let known = [
        (double_double::exp(1.0), std::f64::consts::E, 1.445_646_891_729_250_2e-16),
        (double_double::exp(-20.5), 1.250_152_866_386_742_6e-9, 6.448_235_878_237_776e-26),
        ((0, double_double::tanh(0.1)), 0.099_667_994_624_955_82, 3.542_433_877_641_546e-18),
        ((0, double_double::tanh(3.0)), 0.995_054_753_686_730_5, -1.299_189_286_356_262_4e-17),
    ];
    for ((n, got), hi, lo) in known {
        let (hi, lo) = (unscale(hi, n), unscale(lo, n));
        let error = (got.hi - hi) + (got.lo - lo);
        assert!(error.abs() < 1e-30 * hi, "{got:?}, want {hi:e} + {lo:e}");
    }
}

#[test]
fn factors_multiply_to_the_exponential() {
    fn check<T: Float>(underflow: f64, exact: impl Fn(T) -> f64) {
        let everywhere = Seeded::new(3).uniform::<T, _>(100_000, underflow..0.0);
        let near = Seeded::new(4).uniform::<T, _>(100_000, -1.0..0.0);
        let x: Vec<T> = everywhere.into_iter().chain(near).collect();
        let edges = [f64::NAN, -f64::NAN, f64::NEG_INFINITY, 2.0 * underflow, 0.0, -0.0];
        let edges: Vec<T> = edges.into_iter().map(T::from_f64).collect();
        for isa in Isa::available() {
            let mut worst = Worst::default();
            for (&x, got) in x.iter().zip(apply(isa, Function::Factors, &x)) {
                let (got, want) = (got.to_f64(), exact(x));
                let epsilons = (got - want).abs() / want / T::EPSILON;
                worst.add(epsilons / (1.5 - x.to_f64() / 40.0), x.to_f64());
            }
            println!("{isa}: factors {worst}, of the bound");
            assert!(worst.error <= 1.0, "{isa} {worst}");

            let got = apply(isa, Function::Factors, &edges);
            assert!(got[0].is_nan() && got[1].is_nan(), "{isa} {got:?}");
            // Of what is flushed to 0 the smallest normal number is left.
            let is_smallest = |y: &T| (y.to_f64() / T::MIN_POSITIVE - 1.0).abs() < 1e-5;
            assert!(got[2..4].iter().all(is_smallest), "{isa} {got:?}");
            assert!(got[4..].iter().all(|&y| y == T::ONE), "{isa} {got:?}");
        }
    }
    check::<f32>(f64::from(UNDERFLOW_F32), |x| f64::from(x).exp());
    check::<f64>(UNDERFLOW_F64, exact_f64);
}

/// `e^x` rounded to f64.
fn exact_f64(x: f64) -> f64 {
    let (n, exp) = double_double::exp(x);
    unscale(exp.hi, -n)
}

#[test]
fn weights_are_exact_beside_one() {
    fn check<T: Float>(underflow: f64, exact: impl Fn(T) -> f64) {
        let mut seeded = Seeded::new(2);
        let everywhere = seeded.uniform::<T, _>(100_000, underflow..0.0);
        let near = seeded.uniform::<T, _>(100_000, -4.0..0.0);
        let x: Vec<T> = everywhere.into_iter().chain(near).collect();
        for isa in Isa::available() {
            let (mut absolute, mut relative) = (Worst::default(), Worst::default());
            for (&x, got) in x.iter().zip(apply(isa, Function::Weights, &x)) {
                let (got, want) = (got.to_f64(), exact(x));
                let error = (got - want).abs();
                absolute.add(error / T::EPSILON, x.to_f64());
                relative.add(error / want / T::EPSILON, x.to_f64());
            }
            println!("{isa}: absolute {absolute}, relative {relative}, in epsilons");
            assert!(absolute.error <= 0.6, "{isa} {absolute}");
            assert!(relative.error <= -underflow * 0.6, "{isa} {relative}");

            let one = |x: f64| apply(isa, Function::Weights, &[T::from_f64(x)])[0].to_f64();
            assert_eq!((one(0.0), one(-0.0)), (1.0, 1.0), "{isa}");
            let zeros = [1.006 * underflow, 2.0 * underflow, f64::MIN, f64::NEG_INFINITY];
            for x in zeros {
                assert_eq!(one(x).to_bits(), 0, "{isa} {x:e}");
            }
            let below = one(underflow * 1.0001);
            assert!((0.0..=T::MIN_POSITIVE).contains(&below), "{isa} {below:e}");
            assert!(one(f64::NAN).is_nan() && one(-f64::NAN).is_nan(), "{isa}");
        }
    }
    check::<f32>(f64::from(UNDERFLOW_F32), |x| f64::from(x).exp());
    check::<f64>(UNDERFLOW_F64, exact_f64);
}
