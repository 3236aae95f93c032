//! Comparing what was computed with what was wanted.

use super::tensor::Values;

/// An element passes when `abs(got - want) <= atol + rtol * abs(want)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tolerance {
    pub(crate) atol: f64,
    pub(crate) rtol: f64,
}

/// How close the outputs of a case came.
#[derive(Debug, Default)]
pub(crate) struct Agreement {
    /// Largest absolute error; infinite if a NaN or infinity is not where it should be.
    pub(crate) max_abs: f64,
    /// Largest error relative to the wanted value, over values that are not 0.
    pub(crate) max_rel: f64,
    /// The element furthest outside the tolerance; `None`: all passed.
    pub(crate) worst: Option<Worst>,
}

/// An element that did not pass.
#[derive(Debug)]
pub(crate) struct Worst {
    /// The output without `out.`.
    output: String,
    index: Vec<usize>,
    want: String,
    got: String,
    /// Error as a multiple of the tolerance, infinite if that is 0; and absolute, which decides then.
    excess: (f64, f64),
}

impl std::fmt::Display for Worst {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { output, index, want, got, .. } = self;
        write!(f, "worst: out.{output}{index:?} wanted {want} got {got}")
    }
}

impl Agreement {
    /// Adds the elements of one output; `got` and `want` have the shape `shape`.
    pub(crate) fn add(
        &mut self,
        output: &str,
        shape: &[usize],
        got: &Values,
        want: &Values,
        tolerance: Tolerance,
    ) {
        match (got, want) {
            (Values::Floats(got), Values::Floats(want)) => {
                for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
                    let element = Element::floats(got, want, tolerance);
                    self.add_element(element, || Worst::new(output, shape, at, &want, &got));
                }
            }
            (Values::Integers(got), Values::Integers(want)) => {
                for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
                    let element = Element::integers(got, want);
                    self.add_element(element, || Worst::new(output, shape, at, &want, &got));
                }
            }
            _ => unreachable!("both have the same type, which the caller has checked"),
        }
    }

    fn add_element(&mut self, element: Element, worst: impl FnOnce() -> Worst) {
        self.max_abs = self.max_abs.max(element.abs);
        self.max_rel = self.max_rel.max(element.rel);
        let excess = (element.excess, element.abs);
        let worst_so_far = self.worst.as_ref().map(|worst| worst.excess);
        if !element.passes && worst_so_far.is_none_or(|worst| excess > worst) {
            self.worst = Some(Worst { excess, ..worst() });
        }
    }
}

impl Worst {
    fn new(
        output: &str,
        shape: &[usize],
        at: usize,
        want: &dyn std::fmt::Debug,
        got: &dyn std::fmt::Debug,
    ) -> Self {
        let (want, got) = (format!("{want:?}"), format!("{got:?}"));
        Self { output: output.to_owned(), index: index(shape, at), want, got, excess: (0.0, 0.0) }
    }
}

/// The verdict on one element; none of the figures is NaN.
struct Element {
    passes: bool,
    abs: f64,
    rel: f64,
    excess: f64,
}

impl Element {
    const EQUAL: Self = Self { passes: true, abs: 0.0, rel: 0.0, excess: 0.0 };

    fn floats(got: f64, want: f64, Tolerance { atol, rtol }: Tolerance) -> Self {
        if got == want || (got.is_nan() && want.is_nan()) {
            return Self::EQUAL;
        }
        if !(got.is_finite() && want.is_finite()) {
            let infinite = f64::INFINITY;
            return Self { passes: false, abs: infinite, rel: infinite, excess: infinite };
        }
        let abs = (got - want).abs();
        let allowed = atol + rtol * want.abs();
        Self {
            passes: abs <= allowed,
            abs,
            rel: if want == 0.0 { 0.0 } else { abs / want.abs() },
            excess: abs / allowed,
        }
    }

    fn integers(got: i64, want: i64) -> Self {
        if got == want {
            return Self::EQUAL;
        }
        let abs = got.abs_diff(want) as f64;
        let rel = if want == 0 { 0.0 } else { abs / want.unsigned_abs() as f64 };
        Self { passes: false, abs, rel, excess: abs }
    }
}

/// The index along each axis of the element at position `at` in row-major order.
fn index(shape: &[usize], mut at: usize) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (axis, &length) in shape.iter().enumerate().rev() {
        index[axis] = at % length;
        at /= length;
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f64 = f64::NAN;
    const INF: f64 = f64::INFINITY;
    const LOOSE: Tolerance = Tolerance { atol: 1e9, rtol: 1.0 };

    fn compare(got: &[f64], want: &[f64], tolerance: Tolerance) -> Agreement {
        let mut agreement = Agreement::default();
        let shape = [1, want.len()];
        let (got, want) = (Values::Floats(got.to_vec()), Values::Floats(want.to_vec()));
        agreement.add("y", &shape, &got, &want, tolerance);
        agreement
    }

    #[test]
    fn nan_equals_only_nan_and_infinity_only_itself() {
        for value in [NAN, INF, -INF] {
            let agreement = compare(&[value], &[value], Tolerance { atol: 0.0, rtol: 0.0 });
            assert!(agreement.worst.is_none());
            assert_eq!(agreement.max_abs, 0.0);
        }
        for (got, want) in
            [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (1.0, -INF), (INF, -INF), (NAN, INF)]
        {
            let agreement = compare(&[got], &[want], LOOSE);
            assert!(agreement.worst.is_some(), "{got} passed for {want}");
            assert_eq!(agreement.max_abs, INF);
        }
    }

    #[test]
    fn the_tolerance_is_absolute_plus_relative() {
        let tolerance = Tolerance { atol: 0.5, rtol: 0.25 };
        assert!(compare(&[5.5], &[4.0], tolerance).worst.is_none());
        assert!(compare(&[5.5001], &[4.0], tolerance).worst.is_some());
        assert!(compare(&[-0.5], &[0.0], tolerance).worst.is_none());
        let exact = Tolerance { atol: 0.0, rtol: 0.0 };
        assert!(compare(&[-0.0], &[0.0], exact).worst.is_none());
        assert!(compare(&[1.0 + f64::EPSILON], &[1.0], exact).worst.is_some());
    }

    #[test]
    fn the_worst_is_the_one_furthest_outside() {
        let tolerance = Tolerance { atol: 1e-3, rtol: 0.0 };
        let agreement = compare(&[1.0, 2.5, 3.1], &[1.0, 2.0, 3.0], tolerance);
        let worst = agreement.worst.unwrap().to_string();
        assert_eq!(worst, "worst: out.y[0, 1] wanted 2.0 got 2.5");
        assert_eq!((agreement.max_abs, agreement.max_rel), (0.5, 0.25));
        let agreement = compare(&[1.0, 2.5, NAN], &[1.0, 2.0, 3.0], tolerance);
        let worst = agreement.worst.unwrap().to_string();
        assert_eq!(worst, "worst: out.y[0, 2] wanted 3.0 got NaN");
        // Without a tolerance all are infinitely far outside.
        let exact = Tolerance { atol: 0.0, rtol: 0.0 };
        let agreement = compare(&[1.1, 2.5, 3.1], &[1.0, 2.0, 3.0], exact);
        let worst = agreement.worst.unwrap().to_string();
        assert_eq!(worst, "worst: out.y[0, 1] wanted 2.0 got 2.5");
    }

    #[test]
    fn integers_are_compared_exactly() {
        let mut agreement = Agreement::default();
        let (got, want) =
            (Values::Integers(vec![1, i64::MIN]), Values::Integers(vec![1, i64::MAX]));
        agreement.add("i", &[2], &got, &want, LOOSE);
        assert!(agreement.worst.unwrap().to_string().starts_with("worst: out.i[1]"));
    }
}
