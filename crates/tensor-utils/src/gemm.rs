//! Matrix multiplication: the only door to `matrixmultiply`.

#![allow(unsafe_code, reason = "`matrixmultiply` takes raw pointers and strides")]

use ndarray::{ArrayRef, Ix2};

use crate::{Float, ShapeError, check_shape};

/// A type that [`gemm`] multiplies: `f32` or `f64`.
pub trait Gemm: Float {
    /// See the function [`gemm`].
    ///
    /// # Errors
    /// [`ShapeError::Mismatch`] if the shapes do not fit.
    fn gemm(
        c: &mut ArrayRef<Self, Ix2>,
        a: &ArrayRef<Self, Ix2>,
        b: &ArrayRef<Self, Ix2>,
        alpha: Self,
        beta: Self,
    ) -> Result<(), ShapeError>;
}

/// `C = alpha A B + beta C` for `a: [M, K]`, `b: [K, N]`, `c: [M, N]`, of any strides: transposed,
/// reversed, stepped and broadcast views are read in place.
///
/// With `beta` 0 the contents of `c` are overwritten, NaN as well; with `K` 0 the product is 0. NaN
/// in `a` or `b` shows in `c` whatever `alpha` is. Runs on the calling thread, on the widest
/// instruction set of the machine (`KERNELS_ISA` has no say), and allocates a buffer for packed
/// operands of at most 64 x 256 + 256 x 1024 elements.
///
/// The error of each element is bounded by that of a sum of `K` products in any order:
/// `|C - AB| <= gamma_K |A| |B|` with `gamma_K = K u / (1 - K u)` and `u` half an epsilon (N. Higham,
/// "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, section 3.5). A row of `c`
/// has the same bits whatever other rows are in the call.
///
/// # Errors
/// [`ShapeError::Mismatch`] if the shapes do not fit.
pub fn gemm<T: Gemm>(
    c: &mut ArrayRef<T, Ix2>,
    a: &ArrayRef<T, Ix2>,
    b: &ArrayRef<T, Ix2>,
    alpha: T,
    beta: T,
) -> Result<(), ShapeError> {
    T::gemm(c, a, b, alpha, beta)
}

macro_rules! impl_gemm {
    ($t:ident, $gemm:path) => {
        impl Gemm for $t {
            fn gemm(
                c: &mut ArrayRef<Self, Ix2>,
                a: &ArrayRef<Self, Ix2>,
                b: &ArrayRef<Self, Ix2>,
                alpha: Self,
                beta: Self,
            ) -> Result<(), ShapeError> {
                let (m, k) = a.dim();
                let n = b.ncols();
                check_shape("b", b.shape(), &[k, n])?;
                check_shape("c", c.shape(), &[m, n])?;
                let ([rsa, csa], [rsb, csb], [rsc, csc]) = (strides(a), strides(b), strides(c));
                // SAFETY: `matrixmultiply` reads `a[i * rsa + p * csa]` for `i < m, p < k` and
                // `b[p * rsb + j * csb]` for `p < k, j < n`, and writes `c[i * rsc + j * csc]` for
                // `i < m, j < n`. The shapes were checked above, and an array reference guarantees
                // that the elements of its shape at its strides are valid. `c` is borrowed
                // exclusively, so it overlaps neither operand, and ndarray has no mutable view in
                // which two indices are the same element, so no two writes overlap.
                unsafe {
                    $gemm(
                        m,
                        k,
                        n,
                        alpha,
                        a.as_ptr(),
                        rsa,
                        csa,
                        b.as_ptr(),
                        rsb,
                        csb,
                        beta,
                        c.as_mut_ptr(),
                        rsc,
                        csc,
                    );
                }
                Ok(())
            }
        }
    };
}

impl_gemm!(f32, matrixmultiply::sgemm);
impl_gemm!(f64, matrixmultiply::dgemm);

fn strides<T>(array: &ArrayRef<T, Ix2>) -> [isize; 2] {
    [array.strides()[0], array.strides()[1]]
}
