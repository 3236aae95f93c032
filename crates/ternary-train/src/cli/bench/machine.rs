//! What the machine can do: reading memory, and int8 products in registers.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

/// Bytes of memory that is read, far more than a cache holds.
const BYTES: usize = 1 << 28;

/// The limits of the machine, measured whenever they are asked for: they change with what its other
/// users do, so a ratio to them wants both sides measured at the same time.
pub(super) struct Machine {
    data: Vec<u64>,
}

impl Machine {
    pub(super) fn new() -> Self {
        Self { data: vec![1; BYTES / 8] }
    }

    /// Bytes a second that all threads together read from memory.
    pub(super) fn read_bandwidth(&self) -> f64 {
        let start = Instant::now();
        let sums: Vec<u64> = self.data.par_chunks(1 << 17).map(sum).collect();
        black_box(sums);
        BYTES as f64 / start.elapsed().as_secs_f64()
    }

    /// Operations a second (two a product) of `vpdpbusd` on registers, all threads together; `None`
    /// where there is no AVX-512.
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    pub(super) fn int8_peak(&self) -> Option<f64> {
        const STEPS: usize = 1 << 21;
        let simd = fearless_simd::Level::new().as_avx512()?;
        let start = Instant::now();
        rayon::broadcast(|_| black_box(dot_products(simd, black_box(STEPS))));
        let operations = rayon::current_num_threads() * STEPS * CHAINS * 64 * 2;
        Some(operations as f64 / start.elapsed().as_secs_f64())
    }

    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
    pub(super) fn int8_peak(&self) -> Option<f64> {
        None
    }
}

fn sum(part: &[u64]) -> u64 {
    let mut sums = [0_u64; 32];
    for chunk in part.as_chunks::<32>().0 {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*x);
        }
    }
    sums.iter().sum()
}

/// Sums that do not wait for each other.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
const CHAINS: usize = 16;

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
fearless_simd::kernel!(
    fn dot_products(simd: Avx512, steps: usize) -> i32 {
        #[cfg(target_arch = "x86")]
        use std::arch::x86::*;
        #[cfg(target_arch = "x86_64")]
        use std::arch::x86_64::*;
        let _ = simd;
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        let (a, b) = (_mm512_set1_epi8(black_box(1)), _mm512_set1_epi8(black_box(1)));
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        sums.into_iter().fold(0, |total, sum| total.wrapping_add(_mm512_reduce_add_epi32(sum)))
    }
);
