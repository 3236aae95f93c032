//! Attention over a cache that was filled in chunks.

use anyhow::{Result, bail, ensure};
use half::{bf16, f16};
use kvcache::{Cache, Config, Layout, Options, Queries, Storage};
use ndarray::{Array1, Array4, ArrayView4, Axis};
use safetensors::Dtype;
use serde::Deserialize;
use tensor_utils::Element;

use super::inputs::{Inputs, expect_shape};
use super::tensor::{Output, Stored};

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Params {
    storage: StorageName,
    layout: LayoutName,
    page_size: usize,
    chunk: usize,
    causal: bool,
    scale: Option<f64>,
}

impl Default for Params {
    fn default() -> Self {
        let (storage, layout) = (StorageName::F32, LayoutName::Paged);
        Self { storage, layout, page_size: 16, chunk: 1, causal: true, scale: None }
    }
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum StorageName {
    F32,
    Bf16,
    F16,
    Int8,
    Int4,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum LayoutName {
    Contiguous,
    Paged,
}

/// Appends the rows, a chunk of each sequence in turn, then attends.
pub(super) fn run(inputs: &mut Inputs<'_>) -> Result<Vec<Output>> {
    match inputs.dtype("q")? {
        Dtype::F32 => run_as::<f32>(inputs),
        Dtype::F16 => run_as::<f16>(inputs),
        Dtype::BF16 => run_as::<bf16>(inputs),
        other => bail!("`in.q` is {other:?}, expected F32, F16 or BF16"),
    }
}

fn run_as<T: Element<Acc = f32> + Stored>(inputs: &mut Inputs<'_>) -> Result<Vec<Output>> {
    let params: Params = inputs.params()?;
    ensure!(
        params.causal,
        "the parameter `causal` is false, expected true: a cache is always causal"
    );
    let q: Array4<T> = inputs.array("q")?;
    let k: Array4<T> = inputs.array("k")?;
    let v: Array4<T> = inputs.array("v")?;
    let lens: Array1<i64> = inputs.array("len")?;
    let (batch, heads, queries, head_size) = q.dim();
    let (_, key_heads, rows, value_size) = v.dim();
    expect_shape("k", &k.clone().into_dyn(), &[&[batch, key_heads, rows, head_size]])?;
    expect_shape("len", &lens.clone().into_dyn(), &[&[batch]])?;
    ensure!(v.dim().0 == batch, "`in.v` has {} batch entries, expected {batch}", v.dim().0);
    let valid = |&len: &i64| usize::try_from(len).is_ok_and(|len| (queries..=rows).contains(&len));
    ensure!(lens.iter().all(valid), "`in.len` is {lens}, expected {queries} to {rows}");
    let lens = lens.mapv(|len| len as usize).to_vec();
    ensure!(params.chunk > 0, "the parameter `chunk` is 0, expected at least 1");

    let storage = match params.storage {
        StorageName::F32 => Storage::F32,
        StorageName::Bf16 => Storage::Bf16,
        StorageName::F16 => Storage::F16,
        StorageName::Int8 => Storage::Int8,
        StorageName::Int4 => Storage::Int4,
    };
    let layout = match params.layout {
        LayoutName::Contiguous => Layout::Contiguous { sequences: batch, capacity: rows },
        LayoutName::Paged => {
            Layout::Paged { pages: batch * rows.div_ceil(params.page_size.max(1)) }
        }
    };
    let config = Config {
        value_size,
        page_size: params.page_size,
        layout,
        ..Config::new(1, key_heads, head_size).stored_as(storage)
    };
    let mut cache = Cache::new(&config)?;
    let seqs = (0..batch).map(|_| cache.create()).collect::<Result<Vec<_>, _>>()?;
    for start in (0..rows).step_by(params.chunk) {
        for (entry, (&seq, &len)) in seqs.iter().zip(&lens).enumerate() {
            let rows = start.min(len)..(start + params.chunk).min(len);
            let part = |x: &ArrayView4<'_, T>| {
                let x = x.index_axis(Axis(0), entry).permuted_axes([1, 0, 2]).to_owned();
                x.slice_axis(Axis(0), rows.clone().into()).to_owned()
            };
            cache.append(0, seq, part(&k.view()).view(), part(&v.view()).view())?;
        }
    }

    // Queries of all sequences, one after the other, and back.
    let packed = q.permuted_axes([0, 2, 1, 3]).as_standard_layout().into_owned();
    let packed = packed.into_shape_with_order((batch * queries, heads, head_size))?;
    let batch_rows: Vec<_> = seqs.iter().map(|&seq| Queries::last(seq, queries)).collect();
    let options = Options { scale: params.scale, ..Options::default() };
    let result = cache.attend(0, packed.view(), &batch_rows, &options)?;
    let o = result.o.into_shape_with_order((batch, queries, heads, value_size))?;
    let o = o.permuted_axes([0, 2, 1, 3]).as_standard_layout().into_owned();
    Ok(vec![Output::new("o", o)])
}
