//! Products with a matrix of 4096 x 14336, by number of tokens.

use anyhow::Result;
use ndarray::Array2;
use ternary_train::{Activations, PackedMatrix, Ternary, Tiling};

use super::machine::{int8_peak, read_bandwidth};
use super::median;

const ROWS: usize = 4096;
const COLUMNS: usize = 14336;
/// Matrices in turn, so that none is in a cache when its turn comes.
const MATRICES: usize = 16;

pub(super) fn run() -> Result<()> {
    let group = 128;
    let packed = (0..MATRICES)
        .map(|seed| {
            let code = |(i, j): (usize, usize)| ((i * 7 + j * 3 + seed) % 3) as i8 - 1;
            PackedMatrix::new(&Ternary {
                codes: Array2::from_shape_fn((ROWS, COLUMNS), code),
                scales: Array2::from_elem((ROWS, COLUMNS / group), 0.03125),
                group,
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let (bandwidth, peak) = (read_bandwidth()?, int8_peak()?);
    println!("{ROWS} x {COLUMNS}, {} threads", rayon::current_num_threads());
    println!("read bandwidth {:.1} GB/s", bandwidth / 1e9);
    if let Some(peak) = peak {
        println!("int8 peak {:.0} GOP/s", peak / 1e9);
    }
    for tokens in [1, 2, 4, 8, 16, 64, 512] {
        let x = Array2::from_shape_fn((tokens, COLUMNS), |(t, j)| ((t * 31 + j) % 255) as f32);
        let x = Activations::new(&x, group)?;
        let mut y = Array2::zeros((tokens, ROWS));
        let mut turn = 0;
        let seconds = median(if tokens > 64 { 7 } else { 33 }, || {
            turn += 1;
            packed[turn % MATRICES].product_into(y.view_mut(), &x, &Tiling::default())?;
            Ok(())
        })?;
        let bytes = packed[0].bytes() as f64 / seconds;
        let operations = (2 * tokens * ROWS * COLUMNS) as f64 / seconds;
        print!("{tokens:4} tokens {:8.0} us", seconds * 1e6);
        print!("  {:6.1} GB/s ({:3.0} % of reading)", bytes / 1e9, 100.0 * bytes / bandwidth);
        print!("  {:6.0} GOP/s", operations / 1e9);
        match peak {
            Some(peak) => println!(" ({:2.0} % of the peak)", 100.0 * operations / peak),
            None => println!(),
        }
    }
    Ok(())
}
