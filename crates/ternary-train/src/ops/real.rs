//! The types that the model computes in.

use tensor_utils::simd::Simd;
use tensor_utils::{Float, Isa, Kernel, dispatch};

use super::OpError;
use super::products::{Task, compute};

/// `f32`, or `f64` to check gradients. The products are compiled here, once for each.
pub trait Real: Float {
    /// Computes a part of a product.
    #[doc(hidden)]
    fn compute(isa: Isa, task: Task<'_, '_, Self>) -> Result<(), OpError>;
}

struct Run<'a, 't, A>(Task<'a, 't, A>);

impl<A: Float> Kernel for Run<'_, '_, A> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        compute(simd, self.0);
    }
}

impl Real for f32 {
    fn compute(isa: Isa, task: Task<'_, '_, Self>) -> Result<(), OpError> {
        Ok(dispatch(isa, Run(task))?)
    }
}

impl Real for f64 {
    fn compute(isa: Isa, task: Task<'_, '_, Self>) -> Result<(), OpError> {
        Ok(dispatch(isa, Run(task))?)
    }
}
