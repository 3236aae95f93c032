//! The cases in `fixtures/softmax-topk`, whose answers PyTorch computed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;

use common::tilings;
use ndarray::{Array2, ArrayD, ArrayRef, Dimension, IxDyn};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use softmax_topk::{
    Logit, Options, PerRow, TopK, Workspace, rows, softmax_topk, softmax_topk_into,
    softmax_topk_reference,
};
use tensor_utils::testing::{Tolerance, check_close, recorded_cases};
use tensor_utils::{Element, bf16, f16};

/// A file of the format `kernel-case/1`.
struct Case<'a> {
    tensors: SafeTensors<'a>,
    params: Value,
    tolerance: Tolerance,
}

impl<'a> Case<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let (_, metadata) = SafeTensors::read_metadata(bytes).unwrap();
        let metadata = metadata.metadata().as_ref().unwrap();
        assert_eq!(metadata["format"], "kernel-case/1");
        assert_eq!(metadata["kernel"], "softmax-topk");
        let number = |key: &str| metadata[key].parse().unwrap();
        Self {
            tensors: SafeTensors::deserialize(bytes).unwrap(),
            params: serde_json::from_str(&metadata["params"]).unwrap(),
            tolerance: Tolerance { abs: number("atol"), rel: number("rtol") },
        }
    }

    /// The tensor in f64, which holds every value of the other types here.
    fn get(&self, name: &str) -> ArrayD<f64> {
        let tensor = self.tensors.tensor(name).unwrap();
        let bytes = tensor.data();
        let values = match tensor.dtype() {
            Dtype::F64 => decode(bytes, f64::from_le_bytes),
            Dtype::F32 => decode(bytes, |b| f32::from_le_bytes(b).into()),
            Dtype::F16 => decode(bytes, |b| f16::from_le_bytes(b).into()),
            Dtype::BF16 => decode(bytes, |b| bf16::from_le_bytes(b).into()),
            Dtype::I64 => decode(bytes, |b| i64::from_le_bytes(b) as f64),
            other => panic!("{name} has type {other:?}"),
        };
        ArrayD::from_shape_vec(IxDyn(tensor.shape()), values).unwrap()
    }

    fn check<T: Logit>(&self) {
        let tensor = self.get("in.logits").mapv(T::from_f64);
        let logits: Array2<T> = rows("logits", tensor.view()).unwrap().to_owned();
        let mut options = Options::<T::Acc>::default();
        let mut k = 0;
        for (param, value) in self.params.as_object().unwrap() {
            match param.as_str() {
                "k" => k = value.as_u64().unwrap() as usize,
                "temperature" => options.temperature = PerRow::All(value.as_f64().unwrap()),
                "log" => options.log = value.as_bool().unwrap(),
                _ => panic!("unknown parameter {param}: {value}"),
            }
        }
        let want = softmax_topk_reference(logits.view(), k, &options).unwrap();
        self.check_top("reference", &want);
        let mut got = softmax_topk(logits.view(), k, &options).unwrap();
        for tiling in tilings() {
            let mut workspace = Workspace::new(logits.dim().0, logits.dim().1, k, &tiling).unwrap();
            softmax_topk_into(got.view_mut(), logits.view(), &options, &mut workspace).unwrap();
            self.check_top(&format!("{tiling:?}"), &got);
        }
    }

    fn check_top<A: Element>(&self, who: &str, top: &TopK<A>) {
        let indices = top.indices.mapv(f64::from);
        let exact = Tolerance { abs: 0.0, rel: 0.0 };
        self.check_output(who, "out.indices", &indices, exact);
        self.check_output(who, "out.probs", &top.probs, self.tolerance);
        self.check_output(who, "out.lse", &top.lse, self.tolerance);
    }

    fn check_output<T: Element, D: Dimension>(
        &self,
        who: &str,
        name: &str,
        got: &ArrayRef<T, D>,
        tolerance: Tolerance,
    ) {
        let want = self.get(name);
        let want = want.to_shape(got.raw_dim()).unwrap().to_owned();
        check_close(got, &want, tolerance).unwrap_or_else(|error| panic!("{who}: {name}: {error}"));
    }
}

fn decode<const BYTES: usize>(bytes: &[u8], number: impl Fn([u8; BYTES]) -> f64) -> Vec<f64> {
    bytes.chunks_exact(BYTES).map(|chunk| number(chunk.try_into().unwrap())).collect()
}

#[test]
fn cases_from_pytorch() {
    let Some(paths) = recorded_cases(env!("CARGO_MANIFEST_DIR"), "softmax-topk") else { return };
    assert!(paths.len() >= 30, "only {} cases found", paths.len());
    for path in paths {
        println!("{}", path.display());
        let bytes = fs::read(&path).unwrap();
        let case = Case::new(&bytes);
        match case.tensors.tensor("in.logits").unwrap().dtype() {
            Dtype::F64 => case.check::<f64>(),
            Dtype::F32 => case.check::<f32>(),
            Dtype::BF16 => case.check::<bf16>(),
            Dtype::F16 => case.check::<f16>(),
            other => panic!("in.logits has type {other:?}"),
        }
    }
}
