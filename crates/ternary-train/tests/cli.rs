//! The command line from a text to a model, its export and its continuations, and what it says about options
//! that contradict each other.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Output, Stdio};

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
    assert!(trained.contains("\nvalidation loss "), "{trained}");
    for file in ["config.json", "model.safetensors", "tokenizer.json", "report.md", "curve.svg"] {
        assert!(Path::new(&model).join(file).is_file(), "{file}");
    }
    let report = std::fs::read_to_string(Path::new(&model).join("report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["validation"]["tokens"], 5 * 4 * 16);
    // A run does not take the place of another.
    let error = refused(&[&start[..], &sizes].concat());
    assert!(error.contains("--resume") && error.contains("--out"), "{error}");
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
        (&["--eval-every", "0"], &["--eval-every"]),
        (&["--eval-windows", "0"], &["--eval-windows"]),
        (&["--checkpoint-every", "0"], &["--checkpoint-every"]),
        (&["--lr", "0"], &["--lr", "positive"]),
        (&["--batch", "0"], &["--batch"]),
        (&["--context", "0"], &["--context"]),
        (&["--bpe", "100"], &["--bpe", "256"]),
    ] {
        let error = train(options);
        assert!(names.iter().all(|name| error.contains(name)), "{options:?}: {error}");
    }
    for (arguments, names) in [
        (&["generate", "--model", "a", "--prompt", "b", "--seed", "1"][..], &["--temperature"][..]),
        (
            &["generate", "--model", "a", "--prompt", "b", "--temperature", "0"],
            &["--temperature", "greedy"],
        ),
        (&["eval", "a", "--text", "b", "--ngram", "9"], &["--ngram", "1..=8"]),
    ] {
        let error = refused(arguments);
        assert!(names.iter().all(|name| error.contains(name)), "{arguments:?}: {error}");
    }
    let missing = folder.path().join("nothing").to_str().unwrap().to_owned();
    let error = refused(&["verify", &missing]);
    assert!(error.contains(&missing) && error.matches("os error").count() == 1, "{error}");
}

/// What `train` with `options` and few steps says.
fn train(text: &str, out: &str, options: &[&str]) -> Output {
    let start = ["train", "--text", text, "--out", out, "--quiet", "--steps", "2", "--batch", "2"];
    run(&[&start[..], &["--context", "16", "--eval-windows", "4"], options].concat())
}

#[test]
fn a_text_too_short_to_measure_with_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (text, short) = (path("text.txt"), path("short.txt"));
    write_text(text.as_ref());
    std::fs::write(&short, "fifteen letters").unwrap();
    for (options, name) in
        [(["--val", &short], "--val: "), (["--val-fraction", "0.0004"], "--val-fraction: ")]
    {
        let output = train(&text, &path("model"), &options);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(name), "{error}");
        assert!(error.contains("a window takes 16"), "{error}");
    }
}

#[test]
fn a_training_goes_on_from_another_model_with_its_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let text = path("text.txt");
    write_text(text.as_ref());
    let (float, ternary) = (path("float"), path("ternary"));
    assert!(train(&text, &float, &["--float", "--bpe", "300"]).status.success());
    assert!(train(&text, &ternary, &["--init", &float]).status.success());
    let tokenizer = |model: &str| std::fs::read(Path::new(model).join("tokenizer.json")).unwrap();
    assert!(tokenizer(&ternary) == tokenizer(&float));
    printed(&["verify", &ternary]);
    assert!(train(&text, &path("again"), &["--init", &ternary, "--float"]).status.success());
    for (model, options, what) in
        [(&float, &["--bpe", "300"][..], "--bpe"), (&ternary, &[], "ternary already")]
    {
        let output = train(&text, &path("other"), &[&["--init", model], options].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(what), "{error}");
    }

    // What is measured is the text of the tokens, which normalising may make longer than the file.
    let file = Path::new(&float).join("tokenizer.json");
    let json = String::from_utf8(tokenizer(&float)).unwrap();
    let longer =
        r#""normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}"#;
    assert!(json.contains("\"normalizer\": null"));
    std::fs::write(&file, json.replace("\"normalizer\": null", longer)).unwrap();
    assert!(printed(&["eval", &float, "--text", &text]).contains("xz alone"));
}

#[test]
fn a_training_that_diverges_says_so_and_leaves_nothing_to_go_on_from() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let text = path("text.txt");
    write_text(text.as_ref());
    let options = ["--lr", "1e5", "--warmup", "0", "--checkpoint-every", "1"];
    let output = train(&text, &path("model"), &options);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("training diverged at step 1"), "{error}");
    assert!(!folder.path().join("model/checkpoint.safetensors").exists());
}

/// A small trained model in `out`.
fn small(text: &Path, out: &Path) {
    write_text(text);
    assert!(train(text.to_str().unwrap(), out.to_str().unwrap(), &[]).status.success());
}

/// The texts are found from any folder, under the path that they had; another tokenizer is refused.
#[test]
fn a_run_is_resumed_from_another_folder_with_its_own_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    write_text(&folder.path().join("text.txt"));
    let here = |folder: &Path, arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ternary-train"));
        command.args(arguments).current_dir(folder).output().unwrap()
    };
    let out = folder.path().join("model");
    let out = out.to_str().unwrap();
    let sizes =
        ["--steps", "2", "--batch", "2", "--context", "16", "--eval-windows", "4", "--quiet"];
    let start = [&["train", "--text", "text.txt", "--out", out][..], &sizes].concat();
    assert!(here(folder.path(), &start).status.success());
    let resume = ["train", "--resume", "--out", out, "--quiet"];
    let resumed = here(elsewhere.path(), &resume);
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    let tokenizer = Path::new(out).join("tokenizer.json");
    let mut json = std::fs::read(&tokenizer).unwrap();
    json.push(b' ');
    std::fs::write(&tokenizer, json).unwrap();
    assert!(refused(&resume).contains("has changed since the checkpoint was written"));
    std::fs::remove_file(&tokenizer).unwrap();
    assert!(refused(&resume).contains("tokenizer.json"));
}

/// What is refused leaves no folder.
#[test]
fn what_is_refused_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("new");
    for options in [&["--resume"][..], &["--val", "b"], &["--text", "none.txt"]] {
        refused(&[&["train", "--out", out.to_str().unwrap()], options].concat());
        assert!(!out.exists(), "{options:?}");
    }
}

#[test]
fn what_cannot_be_generated_is_said_once() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    small(&folder.path().join("text.txt"), &model);
    let generate = ["generate", "--model", model.to_str().unwrap(), "--prompt", "abc "];
    // Nothing more is the same whatever it is to be chosen by.
    for way in [&[][..], &["--beams", "2"], &["--speculative", "3"], &["--temperature", "1"]] {
        let text = printed(&[&generate[..], &["--max-tokens", "0"], way].concat());
        assert_eq!(text.trim_end(), "abc", "{way:?}");
    }
    let output = run(&[&generate[..], &["--temperature", "1", "--top-k", "0"]].concat());
    assert_eq!(output.stdout, b"");
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(error.matches("`k` is 0").count(), 1, "{error}");
    // A weight without ternary form comes with its matrix and its folder.
    let file = model.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let at = bytes.len() - 100_001;
    bytes[at] ^= 0x40;
    std::fs::write(&file, bytes).unwrap();
    let error = refused(&generate);
    assert!(error.contains("model.layers.") && error.contains(model.to_str().unwrap()), "{error}");
}

/// `head` has gone after its line.
#[test]
fn a_closed_output_is_no_failure() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    small(&folder.path().join("text.txt"), &model);
    for arguments in [
        &["verify", model.to_str().unwrap()][..],
        &["generate", "--model", model.to_str().unwrap(), "--prompt", "abc ", "--max-tokens", "9"],
    ] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ternary-train"))
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !error.contains("panicked"), "{arguments:?}: {error}");
    }
}
