//! Products with a matrix of 4096 x 14336, by number of tokens.

use std::time::Instant;

use anyhow::Result;
use ndarray::Array2;
use ternary_train::{Activations, PackedMatrix, Ternary, Tiling};

use super::Pairs;
use super::machine::Machine;
use crate::cli::say;

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
    let machine = Machine::new();
    say(format_args!("{ROWS} x {COLUMNS}, {} threads", rayon::current_num_threads()));
    say(format_args!(
        "medians of pairs: products in turn with reading memory and with int8 in registers"
    ));
    for tokens in [1, 2, 4, 8, 16, 64, 512] {
        let x = Array2::from_shape_fn((tokens, COLUMNS), |(t, j)| ((t * 31 + j) % 255) as f32);
        let x = Activations::new(&x, group)?;
        let mut y = Array2::zeros((tokens, ROWS));
        // A few at once, as long as the other side of the pair takes.
        let calls = if tokens > 8 { 2 } else { MATRICES };
        let mut turn = 0;
        let mut pairs = Pairs::default();
        for _ in 0..=if tokens > 64 { 5 } else { 15 } {
            let bandwidth = machine.read_bandwidth();
            let start = Instant::now();
            for _ in 0..calls {
                turn += 1;
                packed[turn % MATRICES].product_into(y.view_mut(), &x, &Tiling::default())?;
            }
            let seconds = start.elapsed().as_secs_f64() / calls as f64;
            let bytes = packed[0].bytes() as f64 / seconds;
            let operations = (2 * tokens * ROWS * COLUMNS) as f64 / seconds;
            let peak = machine.int8_peak().unwrap_or(f64::INFINITY);
            pairs.add([seconds, bytes, bytes / bandwidth, operations, operations / peak]);
        }
        let [seconds, bytes, of_bandwidth, operations, of_peak] = pairs.medians();
        say(format_args!(
            "{tokens:4} tokens {:8.0} us  {:6.1} GB/s ({:3.0} % of reading)  {:6.0} GOP/s ({:2.0} % of the peak)",
            seconds * 1e6,
            bytes / 1e9,
            100.0 * of_bandwidth,
            operations / 1e9,
            100.0 * of_peak,
        ));
    }
    say(format_args!("reading {:.1} GB/s", machine.read_bandwidth() / 1e9));
    if let Some(peak) = machine.int8_peak() {
        say(format_args!("int8 in registers {:.0} GOP/s", peak / 1e9));
    }
    Ok(())
}
