//! Benches of the ground floor: `cargo bench -p tensor-utils`. Names are `op/impl/shape`; every
//! result is checked once before it is timed.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ndarray::Array2;
use tensor_utils::simd::{Simd, SimdBase, SimdFloat, SimdFrom};
use tensor_utils::testing::{Seeded, Tolerance, check_close};
use tensor_utils::{Float, Isa, Kernel, bf16, dispatch, exp_nonpositive_fast, f16, gemm, widen};

/// The inner loop of softmax: `sum of e^x` over non-positive `x`, four vectors at a time.
struct ExpAndSum<'a> {
    x: &'a [f32],
    fast: bool,
}

impl Kernel for ExpAndSum<'_> {
    type Output = f32;

    fn run<S: Simd>(self, simd: S) -> f32 {
        simd.vectorize(
            #[inline(always)]
            || {
                let mut sums = [S::f32s::simd_from(simd, 0.0); 4];
                for x in self.x.chunks_exact(4 * S::f32s::LEN) {
                    for (x, sum) in x.chunks_exact(S::f32s::LEN).zip(&mut sums) {
                        let x = S::f32s::from_slice(simd, x);
                        *sum += if self.fast {
                            exp_nonpositive_fast(simd, x)
                        } else {
                            f32::exp_nonpositive_vector(simd, x)
                        };
                    }
                }
                let [a, b, c, d] = sums;
                ((a + b) + (c + d)).as_slice().iter().sum()
            },
        )
    }
}

fn exp_and_sum(criterion: &mut Criterion) {
    const LEN: usize = 4096;
    let x = Seeded::new(1).uniform::<f32, _>(LEN, -20.0..0.0).into_raw_vec_and_offset().0;
    let naive = |x: &[f32]| x.iter().map(|x| x.exp()).sum::<f32>();
    let mut group = criterion.benchmark_group("exp_and_sum");
    group.throughput(Throughput::Elements(LEN as u64));
    group.bench_function(format!("std/{LEN}"), |bencher| bencher.iter(|| naive(black_box(&x))));
    for isa in Isa::available() {
        for (name, fast) in [(format!("{isa}/{LEN}"), false), (format!("{isa}-fast/{LEN}"), true)] {
            let run = |x| dispatch(isa, ExpAndSum { x, fast }).expect("available");
            assert!((run(&x) / naive(&x) - 1.0).abs() < 1e-5);
            group.bench_function(name, |bencher| bencher.iter(|| run(black_box(&x))));
        }
    }
    group.finish();
}

/// The heart of a matrix product: one register tile of C over packed panels of A and B.
struct Tile<'a> {
    k: usize,
    a: &'a [f32],
    b: &'a [f32],
    c: &'a mut [f32],
}

/// Rows and columns of the tile that fills the registers of `isa`.
fn tile_shape(isa: Isa) -> (usize, usize) {
    match isa {
        Isa::Avx512 | Isa::Avx512Bf16 => (12, 32),
        Isa::Avx2 => (6, 16),
        _ => (6, 8),
    }
}

impl Kernel for Tile<'_> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        simd.vectorize(
            #[inline(always)]
            || match S::f32s::LEN {
                16 => tile::<S, 12, 2>(simd, self),
                _ => tile::<S, 6, 2>(simd, self),
            },
        );
    }
}

#[inline(always)]
fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(simd: S, tile: Tile<'_>) {
    let columns = VECTORS * S::f32s::LEN;
    let mut sums = [[S::f32s::simd_from(simd, 0.0); VECTORS]; ROWS];
    let panels = tile.a.chunks_exact(ROWS).zip(tile.b.chunks_exact(columns));
    for (a, b) in panels.take(tile.k) {
        let mut row = [S::f32s::simd_from(simd, 0.0); VECTORS];
        for j in 0..VECTORS {
            row[j] = S::f32s::from_slice(simd, &b[j * S::f32s::LEN..][..S::f32s::LEN]);
        }
        for i in 0..ROWS {
            let a = S::f32s::simd_from(simd, a[i]);
            for j in 0..VECTORS {
                sums[i][j] = a.mul_add(row[j], sums[i][j]);
            }
        }
    }
    for (c, sums) in tile.c.chunks_exact_mut(columns).zip(sums) {
        for (c, sum) in c.chunks_exact_mut(S::f32s::LEN).zip(sums) {
            sum.store_slice(c);
        }
    }
}

fn register_tile(criterion: &mut Criterion) {
    const K: usize = 256;
    let mut group = criterion.benchmark_group("tile");
    for isa in Isa::available() {
        let (rows, columns) = tile_shape(isa);
        let mut seeded = Seeded::new(2);
        let (a, b): (Array2<f32>, Array2<f32>) =
            (seeded.normal((K, rows)), seeded.normal((K, columns)));
        let (a_slice, b_slice) = (a.as_slice().expect("dense"), b.as_slice().expect("dense"));
        let mut c = vec![0.0; rows * columns];
        let mut run = || {
            let tile = Tile { k: K, a: black_box(a_slice), b: black_box(b_slice), c: &mut c };
            dispatch(isa, tile).expect("available");
        };
        run();
        group.throughput(Throughput::Elements((2 * rows * columns * K) as u64));
        group.bench_function(format!("{isa}/{rows}x{columns}x{K}"), |bencher| {
            bencher.iter(&mut run)
        });
        let c = Array2::from_shape_vec((rows, columns), c).expect("sizes fit");
        check_close(&c, &a.t().dot(&b), Tolerance { abs: 1e-4, rel: 1e-4 }).expect("tile is right");
    }
    group.finish();
}

fn matrix_product(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gemm");
    for size in [64, 256, 512] {
        let mut seeded = Seeded::new(3);
        let (a, b): (Array2<f32>, Array2<f32>) =
            (seeded.normal((size, size)), seeded.normal((size, size)));
        let mut c = Array2::zeros((size, size));
        gemm(&mut c, &a, &b, 1.0, 0.0).expect("shapes fit");
        check_close(&c, &a.dot(&b), Tolerance { abs: 1e-3, rel: 1e-4 }).expect("product is right");
        group.throughput(Throughput::Elements(2 * (size as u64).pow(3)));
        group.bench_function(format!("matrixmultiply/{size}x{size}x{size}"), |bencher| {
            bencher.iter(|| gemm(&mut c, black_box(&a), black_box(&b), 1.0, 0.0));
        });
    }
    group.finish();
}

fn conversion(criterion: &mut Criterion) {
    const LEN: usize = 4096;
    let mut group = criterion.benchmark_group("widen");
    group.throughput(Throughput::Elements(LEN as u64));
    let mut wide = vec![0.0; LEN];
    let narrow = Seeded::new(4).normal::<bf16, _>(LEN).into_raw_vec_and_offset().0;
    group.bench_function(format!("bf16/{LEN}"), |bencher| {
        bencher.iter(|| widen(black_box(&narrow), &mut wide));
    });
    let narrow = Seeded::new(4).normal::<f16, _>(LEN).into_raw_vec_and_offset().0;
    group.bench_function(format!("f16/{LEN}"), |bencher| {
        bencher.iter(|| widen(black_box(&narrow), &mut wide));
    });
    group.finish();
}

criterion_group!(benches, exp_and_sum, register_tile, matrix_product, conversion);
criterion_main!(benches);
