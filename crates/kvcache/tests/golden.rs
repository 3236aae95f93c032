//! The cases in `fixtures/kvcache`, whose answers PyTorch computed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;

use common::isas;
use kvcache::{Cache, Config, Layout, Options, Queries, Storage};
use ndarray::{Array3, Array4, ArrayD, Axis, Ix4, IxDyn};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tensor_utils::testing::recorded_cases;
use tensor_utils::{Element, bf16, f16};

/// The tensor in f64, which holds every value of the other types.
fn get(tensors: &SafeTensors<'_>, name: &str) -> ArrayD<f64> {
    let tensor = tensors.tensor(name).unwrap();
    let bytes = tensor.data();
    let values = match tensor.dtype() {
        Dtype::F32 => decode(bytes, |b| f32::from_le_bytes(b).into()),
        Dtype::F16 => decode(bytes, |b| f16::from_le_bytes(b).into()),
        Dtype::BF16 => decode(bytes, |b| bf16::from_le_bytes(b).into()),
        Dtype::I64 => decode(bytes, |b| i64::from_le_bytes(b) as f64),
        other => panic!("{name} has type {other:?}"),
    };
    ArrayD::from_shape_vec(IxDyn(tensor.shape()), values).unwrap()
}

fn decode<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    bytes.as_chunks::<N>().0.iter().map(|&bytes| f(bytes)).collect()
}

/// Runs the case with queries and rows of type `T`.
fn check<T: Element<Acc = f32>>(name: &str, bytes: &[u8]) {
    let (_, metadata) = SafeTensors::read_metadata(bytes).unwrap();
    let metadata = metadata.metadata().as_ref().unwrap();
    let number = |key: &str| metadata[key].parse::<f64>().unwrap();
    let (atol, rtol) = (number("atol"), number("rtol"));
    let params: Value = serde_json::from_str(&metadata["params"]).unwrap();
    let tensors = SafeTensors::deserialize(bytes).unwrap();
    let floats = |name: &str| -> Array4<T> {
        get(&tensors, name).mapv(T::from_f64).into_dimensionality::<Ix4>().unwrap()
    };
    let (q, k, v) = (floats("in.q"), floats("in.k"), floats("in.v"));
    let lens: Vec<usize> = get(&tensors, "in.len").iter().map(|&len| len as usize).collect();
    let want = get(&tensors, "out.o").into_dimensionality::<Ix4>().unwrap();

    let (batch, heads, n, d) = q.dim();
    let (_, key_heads, rows, e) = v.dim();
    let usize_param =
        |key: &str, default| params.get(key).map_or(default, |x| x.as_u64().unwrap() as usize);
    let page_size = usize_param("page_size", 16);
    let text = |key: &str| params.get(key).and_then(Value::as_str).map(str::to_owned);
    let storage = text("storage").unwrap_or("f32".to_owned());
    let storage = Storage::ALL.into_iter().find(|s| s.name() == storage).unwrap();
    let layout = match text("layout").as_deref() {
        Some("contiguous") => Layout::Contiguous { sequences: batch, capacity: rows },
        _ => Layout::Paged { pages: batch * rows.div_ceil(page_size) },
    };
    let config = Config { value_size: e, layout, page_size, ..Config::new(1, key_heads, d) };
    let mut cache = Cache::new(&config.stored_as(storage)).unwrap();
    let seqs: Vec<_> = (0..batch).map(|_| cache.create().unwrap()).collect();
    let chunk = usize_param("chunk", 1);
    for start in (0..rows).step_by(chunk) {
        for (entry, (&seq, &len)) in seqs.iter().zip(&lens).enumerate() {
            let part = |x: &Array4<T>| {
                let x = x.index_axis(Axis(0), entry);
                let range = start.min(len)..(start + chunk).min(len);
                x.slice_axis(Axis(1), range.into()).permuted_axes([1, 0, 2]).to_owned()
            };
            cache.append(0, seq, part(&k).view(), part(&v).view()).unwrap();
        }
    }
    let mut packed = Array3::<T>::default((batch * n, heads, d));
    for ((b, h, i, c), &x) in q.indexed_iter() {
        packed[[b * n + i, h, c]] = x;
    }
    let queries: Vec<_> = seqs.iter().map(|&seq| Queries::last(seq, n)).collect();
    for isa in isas() {
        let scale = params.get("scale").and_then(Value::as_f64);
        let options = Options { scale, isa: Some(isa), ..Options::default() };
        let got = cache.attend(0, packed.view(), &queries, &options).unwrap();
        for ((b, h, i, c), &want) in want.indexed_iter() {
            let got = got.o[[b * n + i, h, c]].to_f64();
            let error = (got - want).abs();
            assert!(
                error <= atol + rtol * want.abs(),
                "{name}, {isa}: {got} at {:?}, expected {want}, off by {error} of {atol}",
                [b, h, i, c]
            );
        }
    }
}

#[test]
fn cases_pass() {
    let Some(paths) = recorded_cases(env!("CARGO_MANIFEST_DIR"), "kvcache") else { return };
    let mut cases = 0;
    for path in paths {
        let bytes = fs::read(&path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        match tensors.tensor("in.q").unwrap().dtype() {
            Dtype::F32 => check::<f32>(&name, &bytes),
            Dtype::F16 => check::<f16>(&name, &bytes),
            Dtype::BF16 => check::<bf16>(&name, &bytes),
            other => panic!("{name} has queries of type {other:?}"),
        }
        cases += 1;
    }
    assert!(cases >= 29, "{cases} cases");
}
