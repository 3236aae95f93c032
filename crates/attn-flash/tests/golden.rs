//! The cases in `fixtures/attn-flash`, whose answers PyTorch computed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;

use attn_flash::{AncestorMask, Attention, Options, Window, attention, attention_reference};
use ndarray::{Array3, Array4, ArrayD, Ix3, Ix4, IxDyn};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tensor_utils::testing::{Poison, Tolerance, check_close, recorded_cases};
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
        assert_eq!(metadata["kernel"], "attn-flash");
        let number = |key: &str| metadata[key].parse().unwrap();
        Self {
            tensors: SafeTensors::deserialize(bytes).unwrap(),
            params: serde_json::from_str(&metadata["params"]).unwrap(),
            tolerance: Tolerance { abs: number("atol"), rel: number("rtol") },
        }
    }

    /// The tensor in f64, which holds every value of the other types.
    fn get(&self, name: &str) -> Option<ArrayD<f64>> {
        let tensor = self.tensors.tensor(name).ok()?;
        let bytes = tensor.data();
        let values = match tensor.dtype() {
            Dtype::F64 => decode(bytes, f64::from_le_bytes),
            Dtype::F32 => decode(bytes, |b| f32::from_le_bytes(b).into()),
            Dtype::F16 => decode(bytes, |b| f16::from_le_bytes(b).into()),
            Dtype::BF16 => decode(bytes, |b| bf16::from_le_bytes(b).into()),
            Dtype::I64 => decode(bytes, |b| i64::from_le_bytes(b) as f64),
            Dtype::U8 | Dtype::BOOL => decode(bytes, |b: [u8; 1]| b[0].into()),
            other => panic!("{name} has type {other:?}"),
        };
        Some(ArrayD::from_shape_vec(IxDyn(tensor.shape()), values).unwrap())
    }

    fn floats<T: Element>(&self, name: &str) -> Option<ArrayD<T>> {
        Some(self.get(name)?.mapv(T::from_f64))
    }

    fn batch<T: Element>(&self, name: &str) -> Array4<T> {
        self.floats(name).unwrap().into_dimensionality::<Ix4>().unwrap()
    }

    fn check<T>(&self)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let (q, k, v) = (self.batch::<T>("in.q"), self.batch("in.k"), self.batch("in.v"));
        let bias = self.floats("in.bias");
        let mask = self.get("in.mask").map(|mask| mask.mapv(|x| x != 0.0));
        let lengths = self.get("in.kv_len").map(|lengths| lengths.mapv(|x| x as usize));
        let sinks = self.floats("in.sink");
        let parents = self.get("in.tree_parents").map(|parents| parents.mapv(|x| x as i64));
        let tree = parents.map(|p| AncestorMask::from_parents(p.as_slice().unwrap()).unwrap());

        let mut options = Options::<T>::default();
        for (param, value) in self.params.as_object().unwrap() {
            match param.as_str() {
                "causal" => options.causal = value.as_bool().unwrap(),
                "scale" => options.scale = value.as_f64(),
                "softcap" => options.softcap = value.as_f64(),
                "window" => {
                    let sides = value.as_u64().map(|window| window as usize - 1);
                    options.window = Window { left: sides, right: sides };
                }
                _ => panic!("unknown parameter {param}"),
            }
        }
        options.bias = bias.as_ref().map(|bias| bias.view());
        options.mask = mask.as_ref().map(|mask| mask.view());
        options.key_lengths = lengths.as_ref().map(|lengths| lengths.as_slice().unwrap());
        options.sinks = sinks.as_ref().map(|sinks| sinks.as_slice().unwrap());
        options.tree = tree.as_ref();

        let want = Attention {
            o: self.get("out.o").unwrap().into_dimensionality::<Ix4>().unwrap(),
            lse: self.get("out.lse").unwrap().into_dimensionality::<Ix3>().unwrap(),
        };
        let (q, k, v) = (q.view(), k.view(), v.view());
        let reference = attention_reference(q, k, v, &options).unwrap();
        self.check_result("reference", &reference.o, &reference.lse, &want);
        for tiling in common::tilings() {
            let got = common::attention_tiled((q, k, v), &options, &tiling).unwrap();
            self.check_result(&format!("{tiling:?}"), &got.o, &got.lse, &want);
        }
        let got = attention(q, k, v, &options).unwrap();
        self.check_result("default", &got.o, &got.lse, &want);
    }

    fn check_result<T: Element, A: Element>(
        &self,
        who: &str,
        o: &Array4<T>,
        lse: &Array3<A>,
        want: &Attention<f64>,
    ) {
        check_close(o, &want.o, self.tolerance).unwrap_or_else(|error| panic!("{who}: o: {error}"));
        check_close(lse, &want.lse, self.tolerance)
            .unwrap_or_else(|error| panic!("{who}: lse: {error}"));
    }
}

fn decode<const BYTES: usize>(bytes: &[u8], number: impl Fn([u8; BYTES]) -> f64) -> Vec<f64> {
    bytes.chunks_exact(BYTES).map(|chunk| number(chunk.try_into().unwrap())).collect()
}

#[test]
fn cases_from_pytorch() {
    let Some(paths) = recorded_cases(env!("CARGO_MANIFEST_DIR"), "attn-flash") else { return };
    assert!(paths.len() >= 39, "only {} cases found", paths.len());
    for path in paths {
        println!("{}", path.display());
        let bytes = fs::read(&path).unwrap();
        let case = Case::new(&bytes);
        match case.tensors.tensor("in.q").unwrap().dtype() {
            Dtype::F64 => case.check::<f64>(),
            Dtype::F32 => case.check::<f32>(),
            Dtype::BF16 => case.check::<bf16>(),
            Dtype::F16 => case.check::<f16>(),
            other => panic!("in.q has type {other:?}"),
        }
    }
}
