//! The cases in `fixtures/kvcache`, whose answers PyTorch computed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use kvcache::{Cache, Config, Layout, Options, Queries, Storage};
use ndarray::{Array3, Array4, Axis};
use serde_json::Value;
use tensor_utils::testing::{Case, Tolerance, isas, recorded_cases};
use tensor_utils::{Element, bf16, f16};

/// Runs the case with queries and rows of type `T`.
fn check<T: Element<Acc = f32>>(case: &Case) {
    let params = &case.params;
    let Tolerance { abs, rel } = case.tolerance;
    let (q, k, v): (Array4<T>, Array4<T>, Array4<T>) =
        (case.array("in.q"), case.array("in.k"), case.array("in.v"));
    let lens: Vec<_> = case.integers("in.len").iter().map(|&len| len as usize).collect();
    let want: Array4<f64> = case.array("out.o");

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
                error <= abs + rel * want.abs(),
                "{isa}: {got} at {:?}, expected {want}, off by {error} of {abs}",
                [b, h, i, c]
            );
        }
    }
}

#[test]
fn cases_pass() {
    for case in recorded_cases(env!("CARGO_MANIFEST_DIR"), "kvcache", 29) {
        match case.dtype("in.q").as_str() {
            "f32" => check::<f32>(&case),
            "bf16" => check::<bf16>(&case),
            "f16" => check::<f16>(&case),
            other => panic!("in.q has type {other}"),
        }
    }
}
