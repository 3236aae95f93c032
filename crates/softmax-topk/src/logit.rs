//! The types of logits. The kernels are instantiated here, once for each: `tensor_utils::Instances` is for any
//! `Element`, and they need a compute type whose scores have keys ([`Score`]).

use ndarray::ArrayViewMut2;
use tensor_utils::{Element, bf16, f16};

use crate::call::Call;
use crate::score::Score;
use crate::{Error, TopKGradients, TopKMut, TopKView, Workspace, backward, schedule};

/// A type that logits are stored in: `f32`, `f64`, [`bf16`] or [`struct@f16`].
pub trait Logit: Element<Acc: Score> + sealed::Kernels {}

pub(crate) mod sealed {
    use ndarray::ArrayViewMut2;

    use super::{Call, Element, Error, Logit, TopKGradients, TopKMut, TopKView, Workspace};

    /// The entries to the kernels.
    pub trait Kernels: Element {
        fn topk(
            call: Call<'_, '_, Self>,
            top: TopKMut<'_, Self::Acc>,
            workspace: &mut Workspace<Self::Acc>,
        ) -> Result<(), Error>
        where
            Self: Logit;

        fn backward(
            call: Call<'_, '_, Self>,
            top: TopKView<'_, Self::Acc>,
            gradients: &TopKGradients<'_, Self::Acc>,
            d_logits: ArrayViewMut2<'_, Self>,
        ) -> Result<(), Error>
        where
            Self: Logit;
    }
}

macro_rules! impl_logit {
    ($($t:ty),+) => {$(
        impl Logit for $t {}

        impl sealed::Kernels for $t {
            fn topk(
                call: Call<'_, '_, Self>,
                top: TopKMut<'_, Self::Acc>,
                workspace: &mut Workspace<Self::Acc>,
            ) -> Result<(), Error> {
                schedule::topk(call, top, workspace)
            }

            fn backward(
                call: Call<'_, '_, Self>,
                top: TopKView<'_, Self::Acc>,
                gradients: &TopKGradients<'_, Self::Acc>,
                d_logits: ArrayViewMut2<'_, Self>,
            ) -> Result<(), Error> {
                backward::backward(call, top, gradients, d_logits)
            }
        }
    )+};
}

impl_logit!(f32, f64, bf16, f16);
