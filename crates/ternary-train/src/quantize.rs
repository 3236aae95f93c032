//! Ternary projection: each group of a row becomes codes in {-1, 0, 1} times one f16 scale.

use ndarray::{Array2, ArrayRef, Axis, Ix2};
use rayon::prelude::*;
use tensor_utils::{check_shape, f16, try_array};

use crate::{Error, Projection, Rule};

/// Weights that are worth another thread.
const GRAIN: usize = 1 << 14;

/// A ternary matrix: weight `[i, j]` is `codes[i, j] * scales[i, j / group]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Ternary {
    /// `[rows, columns]`, each -1, 0 or 1.
    pub codes: Array2<i8>,
    /// `[rows, ceil(columns / group)]`: at least 0, exact in f16.
    pub scales: Array2<f32>,
    /// Columns that share a scale.
    pub group: usize,
}

/// What a projection did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Weights in all.
    pub weights: usize,
    /// Weights whose code is 0.
    pub zeros: usize,
    /// Weights whose code differs from the sign of what the output held before.
    pub flipped: usize,
}

impl Counts {
    /// The counts of both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            weights: self.weights + other.weights,
            zeros: self.zeros + other.zeros,
            flipped: self.flipped + other.flipped,
        }
    }
}

impl Projection {
    /// Checks the group size.
    ///
    /// # Errors
    /// [`Error::Option`] if it is not a multiple of 32 from 32 to 256.
    pub fn check(self) -> Result<(), Error> {
        if self.group.is_multiple_of(32) && (32..=256).contains(&self.group) {
            return Ok(());
        }
        Err(Error::option("group", "a multiple of 32 from 32 to 256", self.group))
    }

    /// The ternary form of `w` `[rows, columns]`.
    ///
    /// A group of zeros, or one whose scale is below the smallest f16, has scale 0 and codes 0.
    ///
    /// # Errors
    /// [`Error::Option`] for the group size, [`Error::Group`] for a group with NaN, infinity or a
    /// scale above the largest f16, [`Error::Shape`] if there is no memory.
    ///
    /// # Examples
    /// ```
    /// use ndarray::array;
    /// use ternary_train::Projection;
    ///
    /// let ternary = Projection::default().project(&array![[0.5_f32, -1.5, 2.0, 0.0]])?;
    /// assert_eq!(ternary.scales, array![[1.0]]); // the mean of 0.5, 1.5, 2 and 0
    /// assert_eq!(ternary.codes, array![[0, -1, 1, 0]]); // 0.5 is at the edge
    /// # Ok::<(), ternary_train::Error>(())
    /// ```
    pub fn project(self, w: &ArrayRef<f32, Ix2>) -> Result<Ternary, Error> {
        self.check()?;
        let (rows, columns) = w.dim();
        let mut codes = try_array("codes", (rows, columns))?;
        let mut scales = try_array("scales", (rows, columns.div_ceil(self.group)))?;
        let mut buffer = [0.0; 256];
        for (i, row) in w.outer_iter().enumerate() {
            for (g, group) in row.axis_chunks_iter(Axis(0), self.group).enumerate() {
                let group_weights = &mut buffer[..group.len()];
                group_weights.iter_mut().zip(&group).for_each(|(to, &x)| *to = x);
                let at = self.band(group_weights, i, g)?;
                scales[[i, g]] = at.scale;
                for (j, &x) in group_weights.iter().enumerate() {
                    codes[[i, g * self.group + j]] = at.code(x);
                }
            }
        }
        Ok(Ternary { codes, scales, group: self.group })
    }

    /// Writes `code * scale` of every weight to `out`, whose shape and row-major layout are those of
    /// `w`; the bits of [`Ternary::dequantize`] after [`project`](Self::project). In parallel,
    /// without allocating.
    ///
    /// # Errors
    /// As [`project`](Self::project), and [`Error::Option`] if either is not contiguous. After an
    /// [`Error::Group`] part of `out` is overwritten.
    pub fn project_into(
        self,
        out: &mut ArrayRef<f32, Ix2>,
        w: &ArrayRef<f32, Ix2>,
    ) -> Result<Counts, Error> {
        self.check()?;
        check_shape("out", out.shape(), w.shape())?;
        let columns = w.ncols();
        if w.is_empty() {
            return Ok(Counts::default());
        }
        let contiguous = || Error::option("layout", "row-major", "another");
        let w = w.as_slice().ok_or_else(contiguous)?;
        let out = out.as_slice_mut().ok_or_else(contiguous)?;
        let rows_at_once = GRAIN.div_ceil(columns);
        let chunk = rows_at_once * columns;
        let project = |(index, (out, w)): (usize, (&mut [f32], &[f32]))| {
            let mut counts = Counts::default();
            for (i, (out, w)) in out.chunks_mut(columns).zip(w.chunks(columns)).enumerate() {
                let groups = out.chunks_mut(self.group).zip(w.chunks(self.group));
                for (g, (out, w)) in groups.enumerate() {
                    let band = self.band(w, index * rows_at_once + i, g)?;
                    counts = counts.and(band.write(w, out));
                }
            }
            Ok(counts)
        };
        let parts = out.par_chunks_mut(chunk).zip(w.par_chunks(chunk)).enumerate();
        parts.map(project).try_reduce(Counts::default, |left, right| Ok(left.and(right)))
    }

    /// Scale and zero band of one group.
    fn band(self, w: &[f32], row: usize, group: usize) -> Result<Band, Error> {
        let first = group * self.group;
        let last = first + w.len() - 1;
        let refuse = |what| Error::Group { arg: "w".to_owned(), row, first, last, what };
        let mean = sum_abs(w) / w.len() as f64;
        if !mean.is_finite() {
            return Err(refuse("NaN or infinity among the weights"));
        }
        let (scale, threshold) = match self.rule {
            Rule::AbsMean => (mean, None),
            Rule::Twn => {
                let threshold = 0.7 * mean;
                let beyond = w.iter().map(|&x| f64::from(x.abs())).filter(|&x| x > threshold);
                let (sum, count) = beyond.fold((0.0, 0_u32), |(sum, n), x| (sum + x, n + 1));
                (if count == 0 { 0.0 } else { sum / f64::from(count) }, Some(threshold as f32))
            }
            Rule::Optimal => (optimal_scale(w), None),
        };
        let scale = f16::from_f32(scale as f32).to_f32();
        if scale.is_infinite() {
            return Err(refuse("the scale is above the largest f16, 65504"));
        }
        // |w| / s rounds to 0 exactly where |w| <= s / 2: both sides are exact.
        let threshold = if scale == 0.0 { f32::INFINITY } else { threshold.unwrap_or(scale / 2.0) };
        Ok(Band { scale, threshold })
    }
}

/// The scale of a group, and how large weights may be that become 0.
#[derive(Clone, Copy)]
struct Band {
    scale: f32,
    threshold: f32,
}

impl Band {
    fn code(self, x: f32) -> i8 {
        i8::from(x > self.threshold) - i8::from(x < -self.threshold)
    }

    fn write(self, w: &[f32], out: &mut [f32]) -> Counts {
        let (mut zeros, mut flipped) = (0_u32, 0_u32);
        for (out, &x) in out.iter_mut().zip(w) {
            let positive = if x > self.threshold { self.scale } else { 0.0 };
            let negative = if x < -self.threshold { self.scale } else { 0.0 };
            let new = positive - negative;
            zeros += u32::from(new == 0.0);
            flipped += u32::from((new > 0.0) != (*out > 0.0) || (new < 0.0) != (*out < 0.0));
            *out = new;
        }
        Counts { weights: w.len(), zeros: zeros as usize, flipped: flipped as usize }
    }
}

/// The sum of `|w|` in f64, in eight interleaved parts: one order on every machine.
fn sum_abs(w: &[f32]) -> f64 {
    let mut parts = [0.0_f64; 8];
    let mut chunks = w.chunks_exact(8);
    for chunk in &mut chunks {
        for (part, &x) in parts.iter_mut().zip(chunk) {
            *part += f64::from(x.abs());
        }
    }
    for (part, &x) in parts.iter_mut().zip(chunks.remainder()) {
        *part += f64::from(x.abs());
    }
    parts.iter().sum()
}

/// The scale of least squares: the largest `(sum of the k largest)^2 / k` loses least.
fn optimal_scale(w: &[f32]) -> f64 {
    let mut buffer = [0.0_f32; 256];
    let sorted = &mut buffer[..w.len()];
    sorted.iter_mut().zip(w).for_each(|(to, x)| *to = x.abs());
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let (mut sum, mut best, mut scale) = (0.0, 0.0, 0.0);
    for (k, &x) in (1_u16..).zip(&*sorted) {
        sum += f64::from(x);
        let explained = sum * sum / f64::from(k);
        if explained > best {
            (best, scale) = (explained, sum / f64::from(k));
        }
    }
    scale
}

impl Ternary {
    /// The ternary form of a matrix whose groups are already `{-s, 0, s}`: the scale is the one
    /// magnitude, so nothing is lost. (Projecting such a matrix again would shrink it: the mean
    /// includes the zeros.) A group of zeros has scale 0.
    ///
    /// # Errors
    /// [`Error::Group`] if a group has a second magnitude, or one that f16 does not hold exactly;
    /// [`Error::Option`] for the group size.
    pub fn of_ternary(w: &ArrayRef<f32, Ix2>, group: usize) -> Result<Self, Error> {
        Projection { group, ..Projection::default() }.check()?;
        let (rows, columns) = w.dim();
        let mut codes = try_array("codes", (rows, columns))?;
        let mut scales = try_array("scales", (rows, columns.div_ceil(group)))?;
        for (i, row) in w.outer_iter().enumerate() {
            for (g, part) in row.axis_chunks_iter(Axis(0), group).enumerate() {
                let first = g * group;
                let last = first + part.len() - 1;
                let refuse = |what| Error::Group { arg: "w".to_owned(), row: i, first, last, what };
                let scale = part.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                if f16::from_f32(scale).to_f32() != scale || !scale.is_finite() {
                    return Err(refuse("the magnitude is not an f16"));
                }
                scales[[i, g]] = scale;
                for (j, &x) in part.iter().enumerate() {
                    if x != 0.0 && x.abs() != scale {
                        return Err(refuse("more than one magnitude besides 0"));
                    }
                    codes[[i, first + j]] = i8::from(x > 0.0) - i8::from(x < 0.0);
                }
            }
        }
        Ok(Self { codes, scales, group })
    }

    /// Checks that the parts fit each other.
    ///
    /// # Errors
    /// [`Error::Shape`] for the scales, [`Error::Option`] for the group size, a code outside -1, 0
    /// and 1, or a scale that is negative or that f16 does not hold exactly.
    pub fn check(&self) -> Result<(), Error> {
        Projection { group: self.group, ..Projection::default() }.check()?;
        let (rows, columns) = self.codes.dim();
        check_shape("scales", self.scales.shape(), &[rows, columns.div_ceil(self.group)])?;
        if let Some(code) = self.codes.iter().find(|code| !(-1..=1).contains(*code)) {
            return Err(Error::option("codes", "-1, 0 or 1", code));
        }
        let holds = |s: f32| s >= 0.0 && s.is_finite() && f16::from_f32(s).to_f32() == s;
        match self.scales.iter().find(|&&scale| !holds(scale)) {
            Some(scale) => Err(Error::option("scales", "at least 0 and exact in f16", scale)),
            None => Ok(()),
        }
    }

    /// The weights, `code * scale`.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no memory.
    pub fn dequantize(&self) -> Result<Array2<f32>, Error> {
        let mut w = try_array("w", self.codes.dim())?;
        for ((i, j), x) in w.indexed_iter_mut() {
            *x = f32::from(self.codes[[i, j]]) * self.scales[[i, j / self.group]];
        }
        Ok(w)
    }
}
