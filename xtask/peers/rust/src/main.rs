//! The Rust libraries' side of `cargo xtask compare`: `peers LIBRARY THREADS`.
//!
//! The protocol is that of `../torch_peer.py`: a JSON request a line on standard input, a JSON answer
//! a line on standard output, tensors as safetensors files. All of them are `f32`.

mod burn_peer;
mod candle_peer;

use std::collections::HashMap;
use std::io::{BufRead, Write, stdin, stdout};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::{Value, json};

/// An array in row order.
pub(crate) struct Array {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

pub(crate) type Arrays = HashMap<String, Array>;

/// An operation with its inputs.
pub(crate) trait Operation {
    /// Computes once, and keeps the outputs.
    fn run(&mut self) -> Result<()>;

    /// Those of the last run.
    fn outputs(&self) -> Result<Arrays>;
}

/// An operation, or why the library does not have it.
pub(crate) type Prepared = Result<Result<Box<dyn Operation>, String>>;

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
enum Request {
    Load { op: String, options: Value, inputs: PathBuf },
    Run { repeats: usize },
    Save { outputs: PathBuf },
}

fn main() {
    // The other side prints the error.
    if let Err(error) = serve() {
        answer(&json!({"error": format!("{error:#}")}));
    }
}

fn serve() -> Result<()> {
    let library = std::env::args().nth(1).context("no library is named")?;
    let (name, prepare): (_, fn(&str, &Value, &Arrays) -> Prepared) = match library.as_str() {
        "candle" => (candle_peer::NAME, candle_peer::prepare),
        "burn" => (burn_peer::NAME, burn_peer::prepare),
        other => bail!("there is no library `{other}` here"),
    };
    answer(&json!({"peer": name}));
    let mut operation = None;
    for line in stdin().lock().lines() {
        match serde_json::from_str(&line?)? {
            Request::Load { op, options, inputs } => {
                operation = None;
                let Some(inputs) = read(&inputs)? else {
                    answer(&json!({"lacks": "only f32 is compared"}));
                    continue;
                };
                match prepare(&op, &options, &inputs)? {
                    Ok(prepared) => {
                        operation = Some(prepared);
                        answer(&json!({}));
                    }
                    Err(reason) => answer(&json!({"lacks": reason})),
                }
            }
            Request::Run { repeats } => {
                let operation = operation.as_mut().context("no operation is loaded")?;
                let start = Instant::now();
                for _ in 0..repeats {
                    operation.run()?;
                }
                answer(&json!({"seconds": start.elapsed().as_secs_f64()}));
            }
            Request::Save { outputs } => {
                let operation = operation.as_ref().context("no operation is loaded")?;
                write(&outputs, &operation.outputs()?)?;
                answer(&json!({}));
            }
        }
    }
    Ok(())
}

fn answer(message: &Value) {
    let mut out = stdout().lock();
    // If nobody listens any more, there is nobody to tell.
    let _ = writeln!(out, "{message}").and_then(|()| out.flush());
}

/// `None` if an array is not `f32`.
fn read(path: &PathBuf) -> Result<Option<Arrays>> {
    let bytes = std::fs::read(path)?;
    let mut arrays = Arrays::new();
    for (name, tensor) in SafeTensors::deserialize(&bytes)?.tensors() {
        if tensor.dtype() != Dtype::F32 {
            return Ok(None);
        }
        let (values, _) = tensor.data().as_chunks();
        let values = values.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        arrays.insert(name, Array { shape: tensor.shape().to_vec(), values });
    }
    Ok(Some(arrays))
}

fn write(path: &PathBuf, arrays: &Arrays) -> Result<()> {
    let bytes: HashMap<_, Vec<u8>> = arrays
        .iter()
        .map(|(name, array)| (name, array.values.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let mut views = Vec::new();
    for (name, array) in arrays {
        views.push((name, TensorView::new(Dtype::F32, array.shape.clone(), &bytes[name])?));
    }
    Ok(safetensors::serialize_to_file(views, None, path)?)
}
