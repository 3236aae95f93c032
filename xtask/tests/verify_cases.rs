//! `cargo xtask verify-cases` as a user meets it: lines, last line and exit code.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic; the helpers here are not #[test] themselves"
)]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tempfile::TempDir;

/// A case that a test then spoils.
struct Case {
    metadata: Vec<(&'static str, String)>,
    tensors: Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Case {
    /// One query, one key, size 1: the output is the value, the lse the score.
    fn correct() -> Self {
        let metadata = [
            ("format", "kernel-case/1"),
            ("kernel", "attn-flash"),
            ("params", r#"{"causal": true, "window": 3}"#),
            ("atol", "1e-6"),
            ("rtol", "1e-6"),
        ];
        let case = Self {
            metadata: metadata.map(|(key, value)| (key, value.to_owned())).to_vec(),
            tensors: Vec::new(),
        };
        case.floats("in.q", &[1, 1, 1, 1], &[2.0])
            .floats("in.k", &[1, 1, 1, 1], &[3.0])
            .floats("in.v", &[1, 1, 1, 1], &[5.0])
            .floats("out.o", &[1, 1, 1, 1], &[5.0])
            .floats("out.lse", &[1, 1, 1], &[6.0])
    }

    /// The same call, of a cache with one row.
    fn of_cache() -> Self {
        let mut case = Self::correct().with("kernel", "kvcache").with("params", "{}");
        case.tensors.retain(|&(name, ..)| name != "out.lse");
        case.integers("in.len", &[1], &[1])
    }

    /// No tensors yet.
    fn of(kernel: &str, params: &str) -> Self {
        let case = Self { tensors: Vec::new(), ..Self::correct() };
        case.with("kernel", kernel).with("params", params)
    }

    /// Two tokens that are equally likely.
    fn of_beams(params: &str) -> Self {
        Self::of("beam", params)
            .floats("in.bigram", &[2, 2], &[0.0; 4])
            .integers("in.prompts", &[1, 1], &[0])
            .integers("out.sequences", &[1, 1, 2], &[0, 0])
    }

    /// The largest of as many zeros as `vocabulary`.
    fn of_top_k(vocabulary: usize, params: &str) -> Self {
        Self::of("softmax-topk", params)
            .floats("in.logits", &[1, vocabulary], &vec![0.0; vocabulary])
            .integers("out.indices", &[1, 1], &[0])
    }

    /// Replaces a metadata value.
    fn with(mut self, key: &'static str, value: &str) -> Self {
        self.metadata.retain(|&(other, _)| other != key);
        self.metadata.push((key, value.to_owned()));
        self
    }

    /// Adds or replaces a tensor.
    fn tensor(mut self, name: &'static str, dtype: Dtype, shape: &[usize], data: Vec<u8>) -> Self {
        self.tensors.retain(|&(other, ..)| other != name);
        self.tensors.push((name, dtype, shape.to_vec(), data));
        self
    }

    fn floats(self, name: &'static str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, Dtype::F32, shape, bytes)
    }

    fn integers(self, name: &'static str, shape: &[usize], values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, Dtype::I64, shape, bytes)
    }

    fn bytes(&self) -> Vec<u8> {
        let metadata = self.metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone()));
        let tensors = self.tensors.iter().map(|(name, dtype, shape, data)| {
            (*name, TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        safetensors::serialize(tensors, Some(metadata.collect())).unwrap()
    }

    fn write(&self, folder: &TempDir, name: &str) {
        fs::write(folder.path().join(name), self.bytes()).unwrap();
    }
}

/// Runs `verify-cases PATH`; returns the exit code and what it printed.
fn verify(path: &Path) -> (i32, String) {
    verify_with(&[], path)
}

fn verify_with(options: &[&str], path: &Path) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("verify-cases")
        .args(options)
        .arg(path)
        .output()
        .expect("the binary was built");
    let code = output.status.code().expect("it ended by itself");
    (code, String::from_utf8(output.stdout).unwrap())
}

/// Expects exit code 2 and a line with the file's name and `message`.
fn expect_error(case: &Case, message: &str) {
    let folder = TempDir::new().unwrap();
    case.write(&folder, "spoilt.safetensors");
    let (code, text) = verify(folder.path());
    let line = text.lines().next().unwrap_or_default();
    assert!(
        line.contains("spoilt.safetensors") && line.contains(message),
        "no `{message}` in {line}"
    );
    assert_eq!(code, 2, "{text}");
    assert_eq!(text.lines().last(), Some("0 passed, 0 failed"));
}

#[test]
fn a_correct_case_passes() {
    let folder = TempDir::new().unwrap();
    Case::correct().write(&folder, "right.safetensors");
    let (code, text) = verify(folder.path());
    let first = text.lines().next().unwrap();
    assert!(first.starts_with("right ") && first.contains("attn-flash"), "{text}");
    assert!(first.ends_with("PASS"), "{text}");
    assert_eq!(text.lines().last(), Some("1 passed, 0 failed"));
    assert_eq!(code, 0);
}

#[test]
fn a_wrong_answer_fails_and_is_shown() {
    let folder = TempDir::new().unwrap();
    Case::correct().floats("out.o", &[1, 1, 1, 1], &[5.5]).write(&folder, "wrong.safetensors");
    let (code, text) = verify(folder.path());
    assert!(text.contains("FAIL worst: out.o[0, 0, 0, 0] wanted 5.5 got 5.0"), "{text}");
    assert_eq!(text.lines().last(), Some("0 passed, 1 failed"));
    assert_eq!(code, 1);
}

#[test]
fn nan_is_not_an_answer() {
    let folder = TempDir::new().unwrap();
    let case = Case::correct().with("atol", "1e30");
    case.floats("out.o", &[1, 1, 1, 1], &[f32::NAN]).write(&folder, "nan.safetensors");
    assert_eq!(verify(folder.path()).0, 1);
}

#[test]
fn all_optional_inputs_are_understood() {
    let folder = TempDir::new().unwrap();
    Case::correct()
        .with("params", r#"{"scale": 1, "softcap": null, "window": 1}"#)
        .integers("in.kv_len", &[1], &[1])
        .tensor("in.mask", Dtype::BOOL, &[1, 1], vec![1])
        .tensor("in.bias", Dtype::F16, &[1, 1, 1, 1], vec![0, 0])
        .integers("in.tree_parents", &[1], &[-1])
        .floats("in.sink", &[1], &[f32::NEG_INFINITY])
        .write(&folder, "all.safetensors");
    let (code, text) = verify(folder.path());
    assert_eq!(code, 0, "{text}");
}

#[test]
fn an_answer_may_be_more_precise_than_the_kernel() {
    let folder = TempDir::new().unwrap();
    let double = 5.000_000_1_f64.to_le_bytes().to_vec();
    let case = Case::correct().tensor("out.o", Dtype::F64, &[1, 1, 1, 1], double);
    case.write(&folder, "double.safetensors");
    let (code, text) = verify(folder.path());
    assert!(text.contains("max abs 1.0e-7"), "{text}");
    assert_eq!(code, 0);
}

#[test]
fn an_lse_may_be_rounded_to_the_type_of_the_inputs() {
    let folder = TempDir::new().unwrap();
    let half = |values: &[f32]| -> Vec<u8> {
        values.iter().flat_map(|&value| half::f16::from_f32(value).to_le_bytes()).collect()
    };
    // ln 3 is 1.09861.., and 1.09863.. as an f16.
    let case = Case::of("softmax-topk", r#"{"k": 1}"#)
        .with("atol", "0")
        .with("rtol", "0")
        .tensor("in.logits", Dtype::F16, &[1, 3], half(&[0.0; 3]))
        .tensor("out.lse", Dtype::F16, &[1], half(&[3.0_f32.ln()]));
    case.write(&folder, "rounded.safetensors");
    let (code, text) = verify(folder.path());
    assert_eq!(code, 0, "{text}");
    let case = case.floats("out.lse", &[1], &[3.0_f32.ln()]).with("rtol", "2e-7");
    case.write(&folder, "rounded.safetensors");
    assert_eq!(verify(folder.path()).0, 0);
}

#[test]
fn a_cache_is_always_causal() {
    for params in ["{}", r#"{"causal": true}"#] {
        let folder = TempDir::new().unwrap();
        Case::of_cache().with("params", params).write(&folder, "causal.safetensors");
        let (code, text) = verify(folder.path());
        assert_eq!(code, 0, "{text}");
    }
    let case = Case::of_cache().with("params", r#"{"causal": false}"#);
    expect_error(&case, "`causal` is false, expected true: a cache is always causal");
}

#[test]
fn a_wrong_k_is_told_from_an_empty_vocabulary() {
    let folder = TempDir::new().unwrap();
    Case::of_top_k(3, r#"{"k": 1}"#).write(&folder, "right.safetensors");
    let (code, text) = verify(folder.path());
    assert_eq!(code, 0, "{text}");
    for k in [0, -1, i64::MIN] {
        let case = Case::of_top_k(3, &format!(r#"{{"k": {k}}}"#));
        expect_error(&case, &format!("the parameter `k` is {k}, expected at least 1"));
    }
    expect_error(&Case::of_top_k(3, r#"{"k": 4}"#), "`k` is 4, expected 1 to 3");
    expect_error(&Case::of_top_k(0, r#"{"k": 1}"#), "`logits` has rows of 0 tokens, expected 1 to");
}

#[test]
fn only_cases_of_the_package_are_run() {
    let folder = TempDir::new().unwrap();
    Case::correct().write(&folder, "right.safetensors");
    let file = folder.path().join("right.safetensors");
    for path in [folder.path(), &file] {
        assert_eq!(verify_with(&["-p", "attn-flash"], path).0, 0);
        let (code, text) = verify_with(&["-p", "beam"], path);
        assert_eq!(text.lines().last(), Some("0 passed, 0 failed"));
        assert_eq!(code, 2, "{text}");
    }
    let (_, text) = verify_with(&["-p", "beam"], &file);
    assert!(
        text.contains("right.safetensors: is a case of attn-flash, expected one of beam"),
        "{text}"
    );
    assert_eq!(verify_with(&["-p", "nobody"], &file), (2, String::new()));
}

#[test]
fn a_truncated_file_does_not_stop_the_others() {
    let folder = TempDir::new().unwrap();
    let bytes = Case::correct().bytes();
    fs::write(folder.path().join("a-cut.safetensors"), &bytes[..bytes.len() - 1]).unwrap();
    Case::correct().write(&folder, "b-right.safetensors");
    let (code, text) = verify(folder.path());
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].contains("a-cut.safetensors") && lines[0].contains("truncated"), "{text}");
    assert!(lines[1].starts_with("b-right") && lines[1].ends_with("PASS"), "{text}");
    assert_eq!(lines.last(), Some(&"1 passed, 0 failed"));
    assert_eq!(code, 2);
}

#[test]
fn wrong_parameters_are_named() {
    let with = |params| Case::correct().with("params", params);
    expect_error(&with(r#"{"causl": true}"#), "unknown field `causl`");
    expect_error(&with(r#"{"causal": "yes"}"#), "expected a boolean");
    expect_error(&with(r#"{"window": -1}"#), "window");
    expect_error(&with(r#"{"window": 0}"#), "`window` is 0");
    expect_error(&with(r#"{"softcap": -1}"#), "softcap");
    expect_error(&with(r#"{"scale": 1, "scale": 2}"#), "the key `scale` is there twice");
    expect_error(&with("[]"), "`[]`");
    expect_error(&with("{"), "`{`");
}

#[test]
fn wrong_tensors_are_named() {
    let case = Case::correct;
    expect_error(&case().floats("in.extra", &[1], &[1.0]), "unknown tensor `in.extra`");
    expect_error(&case().floats("out.extra", &[1], &[1.0]), "unknown tensor `out.extra`");
    expect_error(&case().floats("weight", &[1], &[1.0]), "unknown tensor `weight`");

    let mut missing = case();
    missing.tensors.retain(|&(name, ..)| name != "in.k");
    expect_error(&missing, "`in.k` is missing");
}

#[test]
fn wrong_shapes_are_named() {
    let case = Case::correct;
    expect_error(&case().floats("in.q", &[1, 1, 1], &[1.0]), "`in.q` has shape [1, 1, 1]");
    expect_error(&case().floats("in.k", &[1, 1, 1, 2], &[1.0, 1.0]), "`k`");
    expect_error(&case().floats("in.q", &[1, 3, 1, 1], &[1.0; 3]), "`out.lse` has shape");
    expect_error(&case().floats("out.o", &[1, 1, 1], &[5.0]), "`out.o` has shape [1, 1, 1]");
    expect_error(&case().floats("in.bias", &[1], &[0.0]), "`in.bias` has shape [1]");
    expect_error(&case().integers("in.tree_parents", &[2], &[-1, 0]), "`in.tree_parents` has");
    expect_error(&case().integers("in.kv_len", &[1], &[-2]), "`in.kv_len` contains -2");
    // A number has no rows.
    let message = "has shape [], expected at least one axis";
    expect_error(&Case::of_top_k(1, r#"{"k": 1}"#).floats("in.logits", &[], &[0.0]), message);
    let norm = Case::of("layernorm-bwd", "{}").floats("in.x", &[], &[1.0]);
    let norm = norm.floats("in.dy", &[], &[1.0]).floats("in.gamma", &[1], &[1.0]);
    expect_error(&norm.floats("in.beta", &[1], &[0.0]).floats("out.y", &[], &[0.0]), message);
    // Rows without end, in a file of a few hundred bytes.
    let endless = Case::of("ternary-quantize", "{}").floats("in.w", &[1 << 40, 0], &[]);
    expect_error(
        &endless.floats("out.codes", &[1, 1], &[0.0]),
        "`in.w` has shape [1099511627776, 0]",
    );
}

#[test]
fn wrong_types_are_named() {
    let case = Case::correct;
    expect_error(&case().integers("in.q", &[1, 1, 1, 1], &[1]), "`in.q` is I64");
    expect_error(&case().integers("in.k", &[1, 1, 1, 1], &[1]), "`in.k` is I64, expected F32");
    let half = case().tensor("out.o", Dtype::F16, &[1, 1, 1, 1], vec![0, 0x45]);
    expect_error(&half, "`out.o` is F16, expected F32 or wider");
    expect_error(&case().integers("out.o", &[1, 1, 1, 1], &[5]), "`out.o` is I64");
    // There is nothing wider than integers of 64 bits.
    let narrow = Case::of_top_k(3, r#"{"k": 1}"#);
    let narrow = narrow.tensor("out.indices", Dtype::I32, &[1, 1], vec![0; 4]);
    expect_error(&narrow, "`out.indices` is I32, expected I64 for these inputs");
    expect_error(&case().tensor("in.bias", Dtype::F64, &[1, 1], vec![0; 8]), "`in.bias` is F64");
    expect_error(&case().floats("in.mask", &[1, 1], &[1.0]), "`in.mask` is F32");
    expect_error(&case().floats("in.kv_len", &[1], &[1.0]), "`in.kv_len` is F32");
}

#[test]
fn what_is_not_a_case_is_named() {
    expect_error(&Case::correct().with("kernel", "warp-drive"), "unknown kernel `warp-drive`");
    expect_error(&Case::correct().with("format", "pt"), "not a case");
    expect_error(&Case::correct().with("atol", "small"), "`atol` is `small`");
    for (missing, _) in Case::correct().metadata {
        let mut case = Case::correct();
        case.metadata.retain(|&(key, _)| key != missing);
        expect_error(&case, &format!("its metadata has no key `{missing}`"));
    }
}

#[test]
fn an_empty_folder_and_a_missing_path_are_errors() {
    let folder = TempDir::new().unwrap();
    let (code, text) = verify(folder.path());
    assert!(text.contains("no case file"), "{text}");
    assert_eq!(code, 2);

    let (code, text) = verify(&folder.path().join("nowhere"));
    assert!(text.contains("nowhere") && text.contains("no such file or folder"), "{text}");
    assert_eq!(code, 2);
}

#[test]
fn a_model_beside_a_case_is_not_a_case() {
    let folder = TempDir::new().unwrap();
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    fs::write(model.join("model.safetensors"), "weights").unwrap();
    Case::correct().write(&folder, "right.safetensors");
    let (code, text) = verify(folder.path());
    assert_eq!(text.lines().last(), Some("1 passed, 0 failed"));
    assert_eq!(code, 0, "{text}");
}

/// A case and its model are moved together.
#[test]
fn a_model_elsewhere_is_refused() {
    for model in ["/models/nano", "../nano", "a/../../nano", ""] {
        let case = Case::of("qwen3", &format!(r#"{{"model": "{model}"}}"#));
        let case = case.integers("in.ids", &[1, 1], &[0]).integers("out.greedy", &[1, 1], &[0]);
        expect_error(&case, &format!("`model` is `{model}`, expected the name of a folder beside"));
    }
}

#[test]
fn a_row_of_merged_siblings_is_named_as_the_file_has_it() {
    let nan = f32::NAN;
    let case = Case::of("dflash", "{}")
        .integers("in.tree_tokens", &[3], &[0, 0, 1])
        .integers("in.tree_parents", &[3], &[-1, -1, 0])
        .floats("in.logits", &[4, 2], &[2.0, 1.0, 1.0, 2.0, 1.0, 2.0, nan, 1.0])
        .integers("out.accepted_nodes", &[2], &[0, 2])
        .integers("out.tokens", &[3], &[0, 1, 0]);
    expect_error(&case, "NaN in row 3");
}

#[test]
fn results_that_do_not_fit_into_memory_are_an_error() {
    for beams in ["1000000000000", "4611686018427387904"] {
        let case = Case::of_beams(&format!(r#"{{"num_beams": {beams}, "max_new_tokens": 2}}"#));
        expect_error(&case, "there is no memory for `sequences`");
    }
}

#[test]
fn a_parameter_of_the_wrong_kind_is_told_what_it_may_be() {
    expect_error(&Case::of_beams(r#"{"eos": -1}"#), "`eos` must be a token or a list of tokens");
    let word = r#"{"rule": "transformers", "early_stopping": "always"}"#;
    expect_error(&Case::of_beams(word), r#"`early_stopping` must be true, false or "never""#);
}

/// A reader that has gone, as `head` does, does not change what comes of the cases.
#[test]
fn a_closed_output_is_no_failure() {
    let folder = TempDir::new().unwrap();
    for i in 0..3 {
        Case::correct().write(&folder, &format!("{i}.safetensors"));
    }
    let mut child = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("verify-cases")
        .arg(folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Nor does one of the errors.
#[test]
fn a_closed_error_stream_is_no_failure() {
    for (arguments, code) in [
        (&["verify-cases", "-p", "nobody", "x"][..], 2),
        (&["faults", "-p", "nobody", "--list"], 1),
        (&["compare", "-p", "nobody"], 1),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stderr.take());
        assert_eq!(child.wait().unwrap().code(), Some(code), "{arguments:?}");
    }
}

/// What is too large for int8 has no result.
#[test]
fn rows_with_nan_have_nan() {
    let folder = TempDir::new().unwrap();
    for (name, x) in [("nan", f32::NAN), ("inf", f32::INFINITY)] {
        Case::of("ternary-matmul", r#"{"group": 32}"#)
            .tensor("in.codes", Dtype::I8, &[1, 2], vec![1, 0])
            .floats("in.scales", &[1, 1], &[0.5])
            .floats("in.x", &[1, 2], &[1.0, x])
            .floats("out.y", &[1, 1], &[f32::NAN])
            .write(&folder, &format!("{name}.safetensors"));
    }
    let (code, text) = verify(folder.path());
    assert_eq!(code, 0, "{text}");
}
