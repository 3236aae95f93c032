//! What this machine can do at most, measured in the same run as the kernels.

use std::fmt;
use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;
use rayon::ThreadPool;
use rayon::prelude::*;
use serde::Serialize;
use tensor_utils::simd::{Simd, SimdBase, SimdFloat, SimdFrom};
use tensor_utils::{Isa, IsaError, Kernel, copy_past_caches, dispatch};

/// Bytes of the buffer that is read: far more than the caches hold.
const BUFFER: usize = 512 << 20;
/// Bytes of each of the three arrays that are streamed.
const STREAMED: usize = 128 << 20;
/// Elements that are streamed by way of a buffer at a time.
const BUFFERED: usize = 2048;
/// Multiply-adds of each accumulator in one measurement.
const STEPS: usize = 4_000_000;
/// Samples of [`Machine`], of which the best counts: what disturbs one only makes it slower.
const TRIES: usize = 15;

/// The machine, and the best it did in the run.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    /// The processor's name.
    pub(crate) cpu: String,
    /// The instruction set that the kernels run on.
    pub(crate) isa: &'static str,
    /// Threads of either side.
    pub(crate) threads: usize,
    #[serde(flatten)]
    pub(crate) roof: Roof,
}

/// Upper bounds on what a kernel can reach.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Roof {
    /// f32 multiply-adds on all threads, two operations each.
    pub(crate) peak_gflops: f64,
    /// Reading memory on all threads.
    pub(crate) read_gb_s: f64,
    /// Reading two arrays and writing a third on all threads, every byte counted once: the better of ordinary
    /// stores and of stores past the caches.
    pub(crate) stream_gb_s: f64,
}

impl Machine {
    /// Measures on the threads of `pool`.
    pub(super) fn measure(pool: &ThreadPool) -> Result<Self> {
        let mut sampler = Sampler::new()?;
        let mut roof = sampler.sample(pool)?;
        for _ in 1..TRIES {
            roof = roof.best_of(sampler.sample(pool)?);
        }
        Ok(Self { cpu: cpu(), isa: sampler.isa.name(), threads: pool.current_num_threads(), roof })
    }

    /// The better of two measurements of the same machine.
    pub(super) fn best_of(self, other: &Self) -> Self {
        Self { roof: self.roof.best_of(other.roof), ..self }
    }
}

impl Roof {
    fn best_of(self, other: Self) -> Self {
        Self {
            peak_gflops: self.peak_gflops.max(other.peak_gflops),
            read_gb_s: self.read_gb_s.max(other.read_gb_s),
            stream_gb_s: self.stream_gb_s.max(other.stream_gb_s),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, isa, threads, roof: Roof { peak_gflops, read_gb_s, stream_gb_s } } = self;
        write!(
            f,
            "{cpu}, {isa}, {threads} threads: peak {peak_gflops:.0} GFLOP/s (f32), \
             read {read_gb_s:.1} GB/s, stream {stream_gb_s:.1} GB/s"
        )
    }
}

/// The processor's name.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
pub(crate) fn cpu() -> String {
    let brand = raw_cpuid::CpuId::new().get_processor_brand_string();
    brand.map_or_else(|| "unknown x86".to_owned(), |brand| brand.as_str().trim().to_owned())
}

/// The processor's name.
#[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
pub(crate) fn cpu() -> String {
    std::env::consts::ARCH.to_owned()
}

/// Takes samples of what the machine does at the moment; holds the memory for them.
pub(super) struct Sampler {
    isa: Isa,
    read: Vec<f32>,
    streamed: [Vec<f32>; 3],
}

impl Sampler {
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            isa: Isa::active()?,
            read: vec![1.0; BUFFER / size_of::<f32>()],
            streamed: [0.0, 1.0, 2.0].map(|x| vec![x; STREAMED / size_of::<f32>()]),
        })
    }

    /// One measurement of each, some 10 ms long.
    pub(super) fn sample(&mut self, pool: &ThreadPool) -> Result<Roof> {
        let past_caches = self.stream_gb_s(pool, true)?;
        Ok(Roof {
            peak_gflops: self.peak_gflops(pool)?,
            read_gb_s: self.read_gb_s(pool)?,
            stream_gb_s: self.stream_gb_s(pool, false)?.max(past_caches),
        })
    }

    fn peak_gflops(&self, pool: &ThreadPool) -> Result<f64> {
        let start = Instant::now();
        let flops = pool.broadcast(|_| dispatch(self.isa, MultiplyAdd)).into_iter();
        Ok(flops.sum::<Result<f64, _>>()? / start.elapsed().as_secs_f64() / 1e9)
    }

    fn read_gb_s(&self, pool: &ThreadPool) -> Result<f64> {
        let part = self.read.len() / pool.current_num_threads();
        let start = Instant::now();
        let read = |thread: usize| dispatch(self.isa, Read(&self.read[thread * part..][..part]));
        let read: Vec<Result<(), IsaError>> = pool.broadcast(|context| read(context.index()));
        let seconds = start.elapsed().as_secs_f64();
        read.into_iter().collect::<Result<(), _>>()?;
        let bytes = part * pool.current_num_threads() * size_of::<f32>();
        Ok(bytes as f64 / seconds / 1e9)
    }

    fn stream_gb_s(&mut self, pool: &ThreadPool, past_caches: bool) -> Result<f64> {
        let (isa, [a, b, c]) = (self.isa, &mut self.streamed);
        let part = a.len().div_ceil(pool.current_num_threads());
        let start = Instant::now();
        pool.install(|| {
            let parts = a.par_chunks_mut(part).zip(b.par_chunks(part)).zip(c.par_chunks(part));
            parts.try_for_each(|((a, b), c)| dispatch(isa, Add { a, b, c, past_caches }))
        })?;
        let seconds = start.elapsed().as_secs_f64();
        black_box(&a);
        Ok((3 * STREAMED) as f64 / seconds / 1e9)
    }
}

/// `a = b + c`, the traffic of a kernel with two inputs and an output: the sum of McCalpin's STREAM.
struct Add<'a> {
    a: &'a mut [f32],
    b: &'a [f32],
    c: &'a [f32],
    /// By way of a buffer; an ordinary store reads the line it writes to, which is not counted.
    past_caches: bool,
}

impl Kernel for Add<'_> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        let Self { a, b, c, past_caches } = self;
        simd.vectorize(
            #[inline(always)]
            || {
                if !past_caches {
                    add(a, b, c);
                    return;
                }
                let mut buffer = [0.0; BUFFERED];
                let inputs = b.chunks(BUFFERED).zip(c.chunks(BUFFERED));
                for (a, (b, c)) in a.chunks_mut(BUFFERED).zip(inputs) {
                    let buffer = &mut buffer[..a.len()];
                    add(buffer, b, c);
                    copy_past_caches(simd, buffer, a);
                }
            },
        );
    }
}

#[inline(always)]
fn add(a: &mut [f32], b: &[f32], c: &[f32]) {
    for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
        *a = b + c;
    }
}

/// Independent chains of multiply-adds, enough of them to hide their latency; returns the number
/// of operations.
struct MultiplyAdd;

impl Kernel for MultiplyAdd {
    type Output = f64;

    fn run<S: Simd>(self, simd: S) -> f64 {
        // AVX-512 has 32 registers, the others 16; two hold the factors.
        simd.vectorize(
            #[inline(always)]
            || {
                if S::f32s::LEN >= 16 {
                    multiply_add::<S, 24>(simd)
                } else {
                    multiply_add::<S, 12>(simd)
                }
            },
        )
    }
}

#[inline(always)]
fn multiply_add<S: Simd, const CHAINS: usize>(simd: S) -> f64 {
    let factor = S::f32s::simd_from(simd, black_box(0.999_9));
    let term = S::f32s::simd_from(simd, black_box(1e-4));
    let mut chains = [S::f32s::simd_from(simd, black_box(1.0)); CHAINS];
    for _ in 0..STEPS {
        for chain in &mut chains {
            *chain = chain.mul_add(factor, term);
        }
    }
    for chain in &chains {
        black_box(chain.as_slice());
    }
    (2 * STEPS * CHAINS * S::f32s::LEN) as f64
}

/// Reads a slice once.
struct Read<'a>(&'a [f32]);

impl Kernel for Read<'_> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        simd.vectorize(
            #[inline(always)]
            || read::<S>(simd, self.0),
        );
    }
}

#[inline(always)]
fn read<S: Simd>(simd: S, slice: &[f32]) {
    const CHAINS: usize = 8;
    let mut sums = [S::f32s::simd_from(simd, 0.0); CHAINS];
    for block in slice.chunks_exact(CHAINS * S::f32s::LEN) {
        for (sum, vector) in sums.iter_mut().zip(block.chunks_exact(S::f32s::LEN)) {
            *sum += S::f32s::from_slice(simd, vector);
        }
    }
    for sum in &sums {
        black_box(sum.as_slice());
    }
}
