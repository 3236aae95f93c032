//! The cases in `fixtures/layernorm-bwd`, whose answers PyTorch computed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;

use common::{Features, Inputs, Source, Wanted};
use layernorm_bwd::{Kind, layer_norm_backward_reference, layer_norm_reference, rows};
use ndarray::{Array1, Array2, ArrayD, ArrayRef, Dimension, Ix1, IxDyn};
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
        assert_eq!(metadata["kernel"], "layernorm-bwd");
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
            other => panic!("{name} has type {other:?}"),
        };
        Some(ArrayD::from_shape_vec(IxDyn(tensor.shape()), values).unwrap())
    }

    /// `[..., D]` as rows.
    fn matrix<T: Element>(&self, name: &'static str) -> Array2<T> {
        let tensor = self.get(name).unwrap();
        rows(name, tensor.view()).unwrap().mapv(T::from_f64)
    }

    fn vector<W: Element>(&self, name: &str) -> Option<Array1<W>> {
        let tensor = self.get(name)?.mapv(W::from_f64);
        Some(tensor.into_dimensionality::<Ix1>().unwrap())
    }

    fn inputs<T, W>(&self) -> Inputs<T, W>
    where
        T: Element + Poison,
        W: Element<Acc = T::Acc> + Poison,
        T::Acc: Poison,
    {
        let mut features = Features::default();
        for (param, value) in self.params.as_object().unwrap() {
            match (param.as_str(), value.as_str()) {
                ("eps", _) => features.eps = value.as_f64().unwrap(),
                ("kind", Some("layernorm")) => features.kind = Kind::LayerNorm,
                ("kind", Some("rmsnorm")) => features.kind = Kind::RmsNorm,
                _ => panic!("unknown parameter {param}: {value}"),
            }
        }
        let x: Array2<T> = self.matrix("in.x");
        let gamma: Array1<W> = self.vector("in.gamma").unwrap();
        let beta = self.vector("in.beta");
        features.beta = beta.is_some();
        let none = Array1::default(gamma.len());
        Inputs {
            features,
            dres: Array2::default(x.dim()),
            dy: self.matrix("in.dy"),
            x,
            beta: beta.unwrap_or(none.clone()),
            gamma,
            before: [none.clone(), none],
        }
    }

    fn check<T, W>(&self)
    where
        T: Element + Poison,
        W: Element<Acc = T::Acc> + Poison,
        T::Acc: Poison,
    {
        let inputs = self.inputs::<T, W>();
        let (x, dy) = (inputs.x.view(), inputs.dy.view());
        let forward = layer_norm_reference(x, &inputs.options()).unwrap();
        let backward = layer_norm_backward_reference(dy, x, &inputs.options()).unwrap();
        self.check_output("reference", "out.y", &forward.y);
        self.check_output("reference", "out.mean", &forward.mean);
        self.check_output("reference", "out.rstd", &forward.rstd);
        self.check_output("reference", "out.dx", &backward.dx);
        self.check_output("reference", "out.dgamma", &backward.dgamma);
        self.check_output("reference", "out.dbeta", &backward.dbeta);
        for isa in common::isas() {
            let forward = inputs.forward(isa);
            self.check_output(isa.name(), "out.y", &forward.y);
            self.check_output(isa.name(), "out.mean", &forward.mean);
            self.check_output(isa.name(), "out.rstd", &forward.rstd);
            for source in [Source::Statistics, Source::Input] {
                let features = Features { source, ..inputs.features };
                let inputs = Inputs { features, ..inputs.clone() };
                let got = inputs.backward_wanted(Wanted::ALL, isa);
                self.check_output(isa.name(), "out.dx", &got.dx.unwrap());
                self.check_output(isa.name(), "out.dgamma", &got.dgamma.unwrap());
                self.check_output(isa.name(), "out.dbeta", &got.dbeta.unwrap());
            }
        }
    }

    /// Compares with an output, if the case has it.
    fn check_output<T: Element, D: Dimension>(&self, who: &str, name: &str, got: &ArrayRef<T, D>) {
        let Some(want) = self.get(name) else { return };
        let want = want.to_shape(got.raw_dim()).unwrap().to_owned();
        check_close(got, &want, self.tolerance)
            .unwrap_or_else(|error| panic!("{who}: {name}: {error}"));
    }
}

fn decode<const BYTES: usize>(bytes: &[u8], number: impl Fn([u8; BYTES]) -> f64) -> Vec<f64> {
    bytes.chunks_exact(BYTES).map(|chunk| number(chunk.try_into().unwrap())).collect()
}

#[test]
fn cases_from_pytorch() {
    let Some(paths) = recorded_cases(env!("CARGO_MANIFEST_DIR"), "layernorm-bwd") else { return };
    assert!(paths.len() >= 26, "only {} cases found", paths.len());
    for path in paths {
        println!("{}", path.display());
        let bytes = fs::read(&path).unwrap();
        let case = Case::new(&bytes);
        let dtype = |name| case.tensors.tensor(name).unwrap().dtype();
        match (dtype("in.x"), dtype("in.gamma")) {
            (Dtype::F64, Dtype::F64) => case.check::<f64, f64>(),
            (Dtype::F32, Dtype::F32) => case.check::<f32, f32>(),
            (Dtype::BF16, Dtype::BF16) => case.check::<bf16, bf16>(),
            (Dtype::F16, Dtype::F16) => case.check::<f16, f16>(),
            (Dtype::BF16, Dtype::F32) => case.check::<bf16, f32>(),
            (x, gamma) => panic!("in.x has type {x:?}, in.gamma {gamma:?}"),
        }
    }
}
