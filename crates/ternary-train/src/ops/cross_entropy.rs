//! The head and the cross entropy, fused: the logits of a block of tokens at a time.

use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;
use tensor_utils::simd::{Simd, SimdBase, SimdFrom};
use tensor_utils::{Float, Isa, Kernel, check_shape, dispatch};

use super::{OpError, Product, Real, Term, elements, for_vectors, products, scan_vectors};

/// A target that does not count: its loss and its gradients are 0.
pub const IGNORE: u32 = u32::MAX;

/// Logits held at once, about; the tokens of a block depend on the vocabulary alone.
const LOGITS: usize = 1 << 20;
/// Rows of one task of the softmax.
const ROWS: usize = 16;

/// What [`cross_entropy`] writes besides the losses.
#[derive(Debug)]
pub struct CrossEntropy<'a, A> {
    /// `[tokens, width]`, overwritten: the gradient with respect to the input of the head.
    pub dx: &'a mut [A],
    /// `[vocabulary, width]`, added to: the gradient with respect to the head.
    pub d_head: &'a mut [A],
    /// Factor of the gradients: 1 / tokens for the mean.
    pub scale: A,
}

/// `losses[t] = -log softmax(x[t] head^T)[targets[t]]` in nats, and the gradients of their sum.
///
/// `x: [tokens, width]`, `head: [vocabulary, width]`; targets that are [`IGNORE`] do not count. Log-softmax by the largest logit, never
/// `log(softmax + eps)`. No more than about a million logits are held at once. Returns how many
/// tokens have their target as the largest logit (ties: the lower token). Without a vocabulary (`head` or `width` of 0) only
/// [`IGNORE`] can be a target.
///
/// # Errors
/// [`OpError::Token`] if a target is not in the vocabulary, [`OpError::Shape`] if a length does not fit or is too large.
pub fn cross_entropy<A: Real>(
    losses: &mut [A],
    x: &[A],
    head: &[A],
    targets: &[u32],
    width: usize,
    mut gradients: Option<CrossEntropy<'_, A>>,
) -> Result<usize, OpError> {
    let vocabulary = head.len().checked_div(width).unwrap_or(0);
    check_shape("losses", &[losses.len()], &[targets.len()])?;
    check_shape("x", &[x.len()], &[elements("x", [targets.len(), width])?])?;
    check_shape("head", &[head.len()], &[vocabulary * width])?;
    if let Some(CrossEntropy { dx, d_head, .. }) = &gradients {
        check_shape("dx", &[dx.len()], &[x.len()])?;
        check_shape("d_head", &[d_head.len()], &[head.len()])?;
    }
    let unknown = |&target: &u32| target != IGNORE && target as usize >= vocabulary;
    if let Some(position) = targets.iter().position(unknown) {
        return Err(OpError::Token { token: targets[position], position, vocabulary });
    }
    if vocabulary == 0 {
        // No target counts.
        losses.fill(A::ZERO);
        if let Some(CrossEntropy { dx, .. }) = &mut gradients {
            dx.fill(A::ZERO);
        }
        return Ok(0);
    }
    let isa = Isa::active()?;
    let block = (LOGITS / vocabulary).max(ROWS).min(targets.len().max(1));
    let mut logits = vec![A::ZERO; block * vocabulary];
    let mut correct = 0;
    let head = matrix(head, vocabulary, width);
    for (index, targets) in targets.chunks(block).enumerate() {
        let rows = targets.len();
        let range = index * block * width..(index * block + rows) * width;
        let losses = &mut losses[index * block..][..rows];
        let logits = &mut logits[..rows * vocabulary];
        let x = matrix(&x[range.clone()], rows, width);
        let terms = vec![Term::Nt(x, head)];
        products(vec![Product { c: matrix_mut(logits, rows, vocabulary), terms, add: false }])?;
        let scale = gradients.as_ref().map(|gradients| gradients.scale);
        let counts: Vec<usize> = logits
            .par_chunks_mut(ROWS * vocabulary)
            .zip(losses.par_chunks_mut(ROWS).zip(targets.par_chunks(ROWS)))
            .map(|(logits, (losses, targets))| {
                dispatch(isa, Rows { logits, losses, targets, scale })
            })
            .collect::<Result<_, _>>()?;
        correct += counts.iter().sum::<usize>();
        if let Some(CrossEntropy { dx, d_head, .. }) = &mut gradients {
            let d_logits = matrix(logits, rows, vocabulary);
            let dx = matrix_mut(&mut dx[range], rows, width);
            let d_head = matrix_mut(d_head, vocabulary, width);
            products(vec![
                Product { c: dx, terms: vec![Term::Nn(d_logits, head)], add: false },
                Product { c: d_head, terms: vec![Term::Tn(d_logits, x)], add: true },
            ])?;
        }
    }
    Ok(correct)
}

/// Some rows of logits, which become those of their gradient if there is a scale.
struct Rows<'a, A> {
    logits: &'a mut [A],
    losses: &'a mut [A],
    targets: &'a [u32],
    scale: Option<A>,
}

impl<A: Float> Kernel for Rows<'_, A> {
    type Output = usize;

    fn run<S: Simd>(self, simd: S) -> usize {
        let vocabulary = self.logits.len() / self.targets.len();
        simd.vectorize(
            #[inline(always)]
            || {
                let rows = self.logits.chunks_exact_mut(vocabulary);
                let mut correct = 0;
                for ((logits, loss), &target) in rows.zip(self.losses).zip(self.targets) {
                    if target == IGNORE {
                        *loss = A::ZERO;
                        logits.fill(A::ZERO);
                        continue;
                    }
                    let target = target as usize;
                    correct += usize::from(row(simd, logits, loss, target, self.scale));
                }
                correct
            },
        )
    }
}

/// One row; returns whether the target has the largest logit.
#[inline(always)]
fn row<S: Simd, A: Float>(
    simd: S,
    logits: &mut [A],
    loss: &mut A,
    target: usize,
    scale: Option<A>,
) -> bool {
    let lanes = <A::Vector<S> as SimdBase<S>>::LEN;
    let largest = scan_vectors::<S, A>(
        simd,
        logits,
        A::NEG_INFINITY,
        A::NEG_INFINITY,
        #[inline(always)]
        |state, x| state.max_precise(x),
    );
    let largest = largest[..lanes].iter().fold(A::NEG_INFINITY, |m, &x| m.max_nan(x));
    let of_target = logits[target];
    let correct = of_target == largest && logits[..target].iter().all(|&x| x < largest);
    let minus = A::Vector::<S>::simd_from(simd, largest);
    // The exponentials take the place of the logits.
    for_vectors(
        simd,
        [],
        [logits],
        #[inline(always)]
        |[], [x]| [A::exp_nonpositive_vector(simd, x - minus)],
    );
    let sums = scan_vectors::<S, A>(
        simd,
        logits,
        A::ZERO,
        A::ZERO,
        #[inline(always)]
        |state, x| state + x,
    );
    let sum: A = sums[..lanes].iter().copied().sum();
    *loss = sum.ln() + largest - of_target;
    if let Some(scale) = scale {
        let factor = scale / sum;
        for_vectors(
            simd,
            [],
            [logits],
            #[inline(always)]
            |[], [x]| [x * factor],
        );
        logits[target] += -scale;
    }
    correct
}

fn matrix<A>(x: &[A], rows: usize, width: usize) -> ArrayView2<'_, A> {
    ArrayView2::from_shape((rows, width), x).expect("the length was checked")
}

fn matrix_mut<A>(x: &mut [A], rows: usize, width: usize) -> ArrayViewMut2<'_, A> {
    ArrayViewMut2::from_shape((rows, width), x).expect("the length was checked")
}
