//! The cases in `fixtures/attn-flash-bwd`, whose answers PyTorch computed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;

use attn_flash::{AncestorMask, Options, Window, attention};
use attn_flash_bwd::{Gradients, Inputs, attention_backward, attention_backward_reference};
use common::ByName;
use ndarray::{Array3, Array4, ArrayD, Ix1, Ix3, Ix4, IxDyn};
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
        assert_eq!(metadata["kernel"], "attn-flash-bwd");
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

    fn rows(&self, name: &str) -> Array3<f64> {
        self.get(name).unwrap().into_dimensionality::<Ix3>().unwrap()
    }

    /// What autograd found.
    fn want(&self) -> Gradients<f64> {
        let sinks = self.get("out.dsink");
        Gradients {
            dq: self.batch("out.dq"),
            dk: self.batch("out.dk"),
            dv: self.batch("out.dv"),
            delta: self.rows("out.delta"),
            dbias: self.get("out.dbias"),
            dsinks: sinks.map(|sinks| sinks.into_dimensionality::<Ix1>().unwrap()),
        }
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

        let forward = attention(q.view(), k.view(), v.view(), &options).unwrap();
        check_close(&forward.o, &self.batch::<f64>("out.o"), self.tolerance).unwrap();
        check_close(&forward.lse, &self.rows("out.lse"), self.tolerance).unwrap();
        let d_o = self.batch("in.do");
        let inputs = Inputs {
            q: q.view(),
            k: k.view(),
            v: v.view(),
            o: forward.o.view(),
            lse: forward.lse.view(),
            d_o: d_o.view(),
            d_lse: None,
        };
        let want = self.want();
        self.check_result(
            "reference",
            &attention_backward_reference(&inputs, &options).unwrap(),
            &want,
        );
        for tiling in common::tilings() {
            let got = common::backward_tiled(&inputs, &options, &tiling).unwrap();
            self.check_result(&format!("{tiling:?}"), &got, &want);
        }
        self.check_result("default", &attention_backward(&inputs, &options).unwrap(), &want);
    }

    fn check_result(&self, who: &str, got: &impl ByName, want: &Gradients<f64>) {
        let (got, want) = (got.by_name(), want.by_name());
        assert_eq!(got.len(), want.len(), "{who}");
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            check_close(got, want, self.tolerance)
                .unwrap_or_else(|error| panic!("{who}: {name}: {error}"));
        }
    }
}

fn decode<const BYTES: usize>(bytes: &[u8], number: impl Fn([u8; BYTES]) -> f64) -> Vec<f64> {
    bytes.chunks_exact(BYTES).map(|chunk| number(chunk.try_into().unwrap())).collect()
}

#[test]
fn cases_from_pytorch() {
    let Some(paths) = recorded_cases(env!("CARGO_MANIFEST_DIR"), "attn-flash-bwd") else { return };
    assert!(paths.len() >= 38, "only {} cases found", paths.len());
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
