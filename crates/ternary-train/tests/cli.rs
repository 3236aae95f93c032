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
        (&["--context", "2049"], &["--context", "2048"]),
        (&["--batch", "18446744073709551615"], &["--batch", "counted"]),
        (&["--accumulate", "18446744073709551615"], &["--accumulate", "counted"]),
        (&["--steps", "18446744073709551615"], &["--steps", "counted"]),
        (&["--embedding-rate", "1e-320"], &["--embedding-rate", "finite"]),
        (&["--residual-rate", "1e-310"], &["--residual-rate", "finite"]),
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
        (
            &["generate", "--model", "a", "--prompt", "b", "--beams", "2", "--top-k", "3"],
            &["--top-k"],
        ),
        (
            &["generate", "--model", "a", "--prompt", "b", "--beams", "2", "--seed", "3"],
            &["--seed"],
        ),
        (
            &["generate", "--model", "a", "--prompt", "b", "--speculative", "2", "--top-p", "1"],
            &["--top-p"],
        ),
        (
            &["generate", "--model", "a", "--prompt", "b", "--speculative", "2", "--min-p", "0"],
            &["--min-p"],
        ),
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
    let output = train(&short, &path("model"), &["--val", &text]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("--text: the training text has 16 tokens"), "{error}");
    assert!(!Path::new(&path("model")).exists());
}

/// Float to the last step is a float model: in its files, its report and where it is measured.
#[test]
fn a_model_whose_every_step_is_float_is_float() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (text, held_out) = (path("text.txt"), path("held-out.txt"));
    write_text(text.as_ref());
    std::fs::write(&held_out, "what the model is measured with, in one window or two\n").unwrap();
    let measured = ["--val", &held_out];
    let trained = |out: &str, options: &[&str]| {
        let output = train(&text, out, &[&measured[..], options].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report = std::fs::read_to_string(Path::new(out).join("report.json")).unwrap();
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        (report, String::from_utf8(output.stdout).unwrap())
    };
    let (report, printed_first) = trained(&path("model"), &["--float-steps", "2"]);
    assert_eq!((&report["weights"], &report["zeros"]), (&"float".into(), &().into()));
    assert!(refused(&["verify", &path("model")]).contains("groups are not ternary"));
    let eval = ["eval", &path("model"), "--text", &held_out, "--context", "16", "--windows", "3"];
    let loss = report["validation"]["loss"].as_f64().unwrap();
    let evaluated = printed(&eval);
    assert!(evaluated.contains(&format!("loss                 {loss:.4}")), "{evaluated} {loss}");
    // There is nothing left to do, and the result is the same.
    let resumed = printed(&["train", "--resume", "--out", &path("model"), "--quiet"]);
    assert_eq!(resumed, printed_first);
    let (report, _) = trained(&path("switched"), &["--float-steps", "1"]);
    assert_eq!(report["weights"], "ternary absmean, groups of 128");
    printed(&["verify", &path("switched")]);
}

#[test]
fn the_command_of_the_report_is_quoted() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("it's a text.txt");
    let model = folder.path().join("model");
    small(&text, &model);
    let report = std::fs::read_to_string(model.join("report.md")).unwrap();
    let quoted = text.to_str().unwrap().replace('\'', r"'\''");
    assert!(report.contains(&format!(" train --text '{quoted}' --out ")), "{report}");
}

/// A checkpoint keeps the paths of the texts, and a resumed training reads them again.
#[cfg(unix)]
#[test]
fn texts_that_cannot_be_read_again_are_refused() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let (text, out) = (folder.path().join("text.txt"), folder.path().join("model"));
    let odd = folder.path().join(OsStr::from_bytes(b"odd-\xff.txt"));
    let pipe = folder.path().join("pipe");
    write_text(&text);
    std::fs::copy(&text, &odd).unwrap();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let trained = |text: &Path, val: &Path, out: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ternary-train"));
        command.args(["train", "--quiet", "--steps", "1", "--batch", "1", "--eval-windows", "1"]);
        command.arg("--text").arg(text).arg("--val").arg(val).arg("--out").arg(out);
        command.args(["--guard", "0"]).output().unwrap()
    };
    for (output, what) in [
        (trained(&odd, &text, &out), ["--text ", "not UTF-8"]),
        (trained(&text, &odd, &out), ["--val ", "not UTF-8"]),
        (trained(&pipe, &text, &out), ["--text ", "not a regular file"]),
    ] {
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(what.iter().all(|what| error.contains(what)), "{error}");
        assert!(!out.exists());
    }
    // Other paths are in the report alone, for people.
    let out = folder.path().join(OsStr::from_bytes(b"model-\xff"));
    let output = trained(&text, &text, &out);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(out.join("report.md").exists());
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

/// How far the work is and what went wrong is said to whoever listens; the work does not depend on it.
#[test]
fn a_closed_error_stream_is_no_failure() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (text, model) = (path("text.txt"), path("model"));
    write_text(text.as_ref());
    let code = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ternary-train"));
        command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stderr.take());
        child.wait().unwrap().code()
    };
    let train = ["train", "--text", &text, "--out", &model, "--steps", "2", "--batch", "2"];
    let sizes = ["--context", "16", "--eval-windows", "4", "--eval-every", "1"];
    assert_eq!(code(&[&train[..], &sizes].concat()), Some(0));
    assert!(Path::new(&model).join("report.md").is_file());
    let generate = ["generate", "--model", &model, "--prompt", "abc ", "--max-tokens", "9"];
    assert_eq!(code(&generate), Some(0));
    assert_eq!(code(&["verify", &path("none")]), Some(1));
}

/// The name that was given, not that of the file which was to be moved there; what is no file stays.
#[cfg(unix)]
#[test]
fn what_cannot_be_exported_to_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    small(path("text.txt").as_ref(), path("model").as_ref());
    let export = ["export", "--model", &path("model"), "--format", "gguf", "--out"];
    let missing = path("none/x.gguf");
    let error = refused(&[&export[..], &[&missing]].concat());
    assert!(error.contains(&missing) && error.matches("none/").count() == 1, "{error}");
    let pipe = path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let error = refused(&[&export[..], &[&pipe]].concat());
    assert!(error.contains(&pipe) && error.contains("not a regular file"), "{error}");
    let (link, target) = (path("link.gguf"), path("target.gguf"));
    std::os::unix::fs::symlink("target.gguf", &link).unwrap();
    printed(&[&export[..], &[&link]].concat());
    assert!(std::fs::read(&target).unwrap().starts_with(b"GGUF"));
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
}

#[test]
fn eval_names_its_own_options() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    small(path("text.txt").as_ref(), path("model").as_ref());
    std::fs::write(path("short.txt"), "x").unwrap();
    for (options, names) in [
        (["--text", &path("text.txt"), "--context", "2049"], ["--context", "2048"]),
        (["--text", &path("text.txt"), "--batch", "18446744073709551615"], ["--batch", "counted"]),
        // Its one byte and the newline that ends the file.
        (["--text", &path("short.txt"), "--context", "16"], ["gets one", "has 2 tokens"]),
    ] {
        let error = refused(&[&["eval", &path("model")], &options[..]].concat());
        assert!(names.iter().all(|name| error.contains(name)), "{options:?}: {error}");
    }
}
