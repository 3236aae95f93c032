#![doc = include_str!("../README.md")]

mod aligned;
mod alloc;
mod convert;
mod element;
mod exp;
mod float;
mod gemm;
mod instances;
mod isa;
mod parallel;
mod prefetch;
mod rows;
mod shape;
mod softmax;
mod stream;

pub mod tile;

#[cfg(feature = "testing")]
pub mod testing;

// Elements and arithmetic.
pub use convert::{narrow, widen};
pub use element::Element;
pub use exp::exp_nonpositive_fast;
pub use float::Float;
pub use half::{bf16, f16};

// Shapes, their errors, and arrays of them.
pub use aligned::Aligned;
pub use alloc::{try_array, try_vec};
pub use rows::{rows, rows_mut};
pub use shape::{ShapeError, broadcast_4d, check_not_empty, check_shape};

// Instruction sets, and kernels compiled for each.
pub use instances::{Instances, PerElement};
pub use isa::{Isa, IsaError, Kernel, dispatch};

// Building blocks.
pub use gemm::{Gemm, gemm};
pub use parallel::{for_each_chunk, lock_slot, map_chunks_ordered, take_slot};
pub use prefetch::{prefetch, prefetch_far, prefetch_far_address};
pub use softmax::OnlineSoftmax;
pub use stream::copy_past_caches;

/// The vector types and traits that kernels are written with.
pub mod simd {
    pub use fearless_simd::{
        Bytes, Select, Simd, SimdBase, SimdCvtFloat, SimdCvtTruncate, SimdFloat, SimdFrom, SimdInt,
        SimdIntWiden, SimdMask, SimdNarrow,
    };
}
