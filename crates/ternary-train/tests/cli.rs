//! The command line from a text to a model, its export and its continuations, and what it says about options
//! that contradict each other.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ternary-train")).args(arguments).output().unwrap()
}

/// What it prints; it must succeed.
fn printed(arguments: &[&str]) -> String {
    let output = run(arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    // Bytes that a model draws need not be UTF-8.
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Its message; it must fail without a panic.
fn refused(arguments: &[&str]) -> String {
    let output = run(arguments);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && !error.contains("panicked"), "{arguments:?}: {error}");
    error
}

/// A text in which no long passage comes twice.
fn write_text(path: &Path) {
    let mut state = 1_u64;
    let mut words = String::new();
    for _ in 0..8000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let letter = |shift: u64| char::from(b'a' + ((state >> shift) % 26) as u8);
        words.extend([letter(30), letter(40), letter(50), ' ']);
    }
    std::fs::write(path, words).unwrap();
}

#[test]
fn a_text_becomes_a_model_that_generates() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (text, model) = (path("text.txt"), path("model"));
    write_text(text.as_ref());
    let start = ["train", "--text", &text, "--out", &model, "--quiet"];
    let sizes = ["--steps", "4", "--batch", "2", "--context", "16", "--eval-windows", "4"];
    let trained = printed(&[&start[..], &sizes].concat());
    assert!(trained.contains("trained ternary absmean, groups of 128"), "{trained}");
    for file in ["config.json", "model.safetensors", "tokenizer.json", "report.md", "curve.svg"] {
        assert!(Path::new(&model).join(file).is_file(), "{file}");
    }
    // There is nothing left to do, and the result is the same.
    assert_eq!(printed(&["train", "--resume", "--out", &model, "--quiet"]), trained);
    assert!(printed(&["verify", &model]).contains(" 0 violations"));
    assert!(printed(&["eval", &model, "--text", &text]).contains("bits per byte"));

    let generate = ["generate", "--model", &model, "--prompt", "abc ", "--max-tokens", "9"];
    let greedy = printed(&[&generate[..], &["--json"]].concat());
    assert!(greedy.starts_with(r#"[{"prompt":[97,98,99,32],"tokens":["#), "{greedy}");
    let drafts = printed(&[&generate[..], &["--json", "--speculative", "3"]].concat());
    assert_eq!(drafts, greedy);
    printed(&[&generate[..], &["--beams", "2"]].concat());
    printed(&[&generate[..], &["--temperature", "0.8", "--top-k", "5", "--seed", "3"]].concat());

    let (gguf, copy) = (path("model.gguf"), path("copy"));
    printed(&["export", "--model", &model, "--format", "gguf", "--out", &gguf]);
    assert!(std::fs::read(&gguf).unwrap().starts_with(b"GGUF"));
    printed(&["export", "--model", &model, "--format", "safetensors", "--out", &copy]);
    assert_eq!(
        printed(&["generate", "--model", &copy, "--prompt", "abc ", "--json", "--max-tokens", "9"]),
        greedy
    );
}

#[test]
fn options_that_contradict_each_other_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let train = |options: &[&str]| refused(&[&["train", "--out", out], options].concat());
    for (options, names) in [
        (&["--resume", "--steps", "5"][..], &["--resume", "--steps"][..]),
        (&["--resume", "--seed", "1"], &["--resume", "--seed"]),
        (&["--float", "--group", "64"], &["--float", "--group"]),
        (&["--float", "--rule", "twn"], &["--float", "--rule"]),
        (&["--text", "a", "--val", "b", "--val-fraction", "0.2"], &["--val", "--val-fraction"]),
        (&["--init", "a", "--rope-theta", "50"], &["--init", "--rope-theta"]),
        (&["--val", "b"], &["--val", "--text"]),
        (&["--threads", "0"], &["--threads"]),
    ] {
        let error = train(options);
        assert!(names.iter().all(|name| error.contains(name)), "{options:?}: {error}");
    }
    let missing = folder.path().join("nothing").to_str().unwrap().to_owned();
    let error = refused(&["verify", &missing]);
    assert!(error.contains(&missing) && error.matches("os error").count() == 1, "{error}");
}
