//! Rules for single files.

use std::path::Path;

use super::{File, Findings};

/// Top-level folders that exist on one machine only; a path into them works for nobody else.
const PRIVATE_FOLDERS: &[&str] = &["home", "opt", "root", "work"];

/// Macros that mark code as unfinished.
const UNFINISHED: &[&str] = &["todo", "dbg", "unimplemented"];

/// The one file that may call the matrix multiplication library.
const GEMM: &str = "crates/tensor-utils/src/gemm.rs";

/// What a reference implementation may not use, since the fast path does.
const FAST: &[&str] = &["simd", "rayon", "gemm", "dispatch"];

pub(super) fn check(file: &File, findings: &mut Findings) {
    for (number, line) in file.lines() {
        if has_private_path(line) {
            let fix = "write it relative to the workspace, or take it as an argument";
            findings.add(&file.path, number, format_args!("a path of one machine: {fix}"));
        }
    }
    if file.is_rust() {
        check_rust(file, findings);
    }
}

fn check_rust(file: &File, findings: &mut Findings) {
    let path = &file.path;
    if !file.text.starts_with("//!") && !file.text.starts_with("#![doc") {
        findings.add(path, 1, "does not say what it is for: begin it with `//!`");
    }
    let in_gemm = path == Path::new(GEMM);
    let is_reference = path.ends_with("src/reference.rs");
    let is_contents = path.ends_with("src/lib.rs");
    for (number, line) in file.lines() {
        let code = without_comment(line);
        for name in UNFINISHED {
            if code.contains(&format!("{name}!(")) {
                findings.add(path, number, format_args!("`{name}!` is left over: finish it"));
            }
        }
        if !in_gemm && code.contains(concat!("matrixmultiply", "::")) {
            findings.add(path, number, "calls the library directly: call tensor_utils' gemm");
        }
        if is_contents && (code.starts_with("fn ") || code.starts_with("pub fn ")) {
            findings.add(path, number, "a function in lib.rs: move it to a module");
        }
        if is_reference && let Some(fast) = FAST.iter().find(|fast| code.contains(**fast)) {
            let fix = "the reference shares nothing with the fast path; write plain loops";
            findings.add(path, number, format_args!("`{fast}` in a reference: {fix}"));
        }
    }
    let code: Vec<_> = file.text.lines().map(without_comment).collect();
    for number in parallel_sums(&code.join("\n")) {
        let fix = "its order changes from run to run; sum fixed blocks and add them in order";
        findings.add(path, number, format_args!("a parallel sum: {fix}"));
    }
}

fn without_comment(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

/// Whether the line has an absolute path that begins with a private folder.
fn has_private_path(line: &str) -> bool {
    PRIVATE_FOLDERS.iter().any(|folder| {
        let pattern = format!("/{folder}/");
        line.match_indices(&pattern).any(|(at, _)| {
            // Part of a longer path or an address, unless it stands at the beginning of a word.
            let before = line[..at].chars().next_back();
            before.is_none_or(|c| !(c.is_alphanumeric() || "._-/}*~".contains(c)))
        })
    })
}

/// Lines with a `sum` or `product` of a parallel iterator itself; sums inside its closures are
/// serial.
fn parallel_sums(text: &str) -> Vec<usize> {
    let mut lines = Vec::new();
    for (start, _) in text.match_indices("par_") {
        let mut depth = 0_i32;
        for (offset, c) in text[start..].char_indices() {
            match c {
                '(' | '[' | '{' => depth += 1,
                ')' | ']' | '}' => depth -= 1,
                _ => {}
            }
            if depth < 0 || (depth == 0 && c == ';') {
                break;
            }
            let rest = &text[start + offset..];
            if depth == 0 && (rest.starts_with(".sum") || rest.starts_with(".product")) {
                lines.push(text[..start + offset].lines().count());
                break;
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> Vec<String> {
        let mut findings = Findings::default();
        check(&File { path: path.into(), text: format!("//! Docs.\n{text}") }, &mut findings);
        findings.0
    }

    #[test]
    fn paths_of_one_machine_are_found() {
        for folder in PRIVATE_FOLDERS {
            assert!(has_private_path(&format!("open(\"/{folder}/data\")")), "{folder}");
            assert!(has_private_path(&format!("/{folder}/data")), "{folder}");
            assert!(!has_private_path(&format!("https://example.org/{folder}/data")), "{folder}");
            assert!(!has_private_path(&format!("../{folder}/data")), "{folder}");
        }
    }

    #[test]
    fn unfinished_code_is_found_outside_comments() {
        for name in UNFINISHED {
            assert_eq!(findings("a.rs", &format!("fn f() {{ {name}!() }}\n")).len(), 1, "{name}");
            assert_eq!(findings("a.rs", &format!("// {name}!()\n")).len(), 0, "{name}");
        }
    }

    #[test]
    fn parallel_sums_are_found_and_serial_sums_inside_are_not() {
        let iterator = concat!("par", "_iter()");
        let bad = format!("let x: f32 = v\n    .{iterator}\n    .map(|x| (x * x))\n    .sum();\n");
        assert_eq!(parallel_sums(&bad), [4]);
        let good = "let x: Vec<f32> = v.par_chunks(9).map(|c| c.iter().sum()).collect();\n\
                    let y: f32 = x.iter().sum();\n";
        assert_eq!(parallel_sums(good), Vec::<usize>::new());
    }

    #[test]
    fn each_rule_names_file_and_line() {
        let call = concat!("fn f() { matrixmultiply", "::sgemm() }\n");
        assert_eq!(findings(GEMM, call), Vec::<String>::new());
        assert!(findings("crates/x/src/y.rs", call)[0].starts_with("crates/x/src/y.rs:2: "));
        assert_eq!(findings("crates/x/src/lib.rs", "pub fn f() {}\n").len(), 1);
        assert_eq!(findings("crates/x/src/reference.rs", "use rayon::prelude::*;\n").len(), 1);
        let mut undocumented = Findings::default();
        check(&File { path: "a.rs".into(), text: "fn f() {}\n".into() }, &mut undocumented);
        assert_eq!(undocumented.0.len(), 1);
    }
}
