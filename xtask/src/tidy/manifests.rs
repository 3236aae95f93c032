//! Rules for `Cargo.toml`: dependencies are declared once, and no crate depends upwards.

use super::{File, Findings};

/// The crates by floor: each may depend on the floors below its own.
const FLOORS: &[&[&str]] = &[
    &["tensor-utils"],
    &["attn-flash", "layernorm-bwd", "softmax-topk"],
    &["attn-flash-bwd", "kvcache"],
    &["beam", "dflash"],
    &["ternary-train"],
];

pub(super) fn check(file: &File, findings: &mut Findings) {
    let is_manifest = file.path.file_name().is_some_and(|name| name == "Cargo.toml");
    // A project of its own is not a member: it stands beside the workspace.
    let is_own_project = file.text.lines().any(|line| line.starts_with("[workspace]"));
    if !is_manifest || is_own_project {
        return;
    }
    let mut section = "";
    let mut package = "";
    let mut inherits_lints = false;
    for (number, line) in file.lines() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
            if section.contains("dependencies.") {
                let fix = "write it as `name.workspace = true` under `[dependencies]`";
                findings.add(&file.path, number, format_args!("a dependency as a table: {fix}"));
            }
            continue;
        }
        let Some((key, value)) = line.split_once('=') else { continue };
        let (key, value) = (key.trim(), value.trim());
        if section == "package" && key == "name" {
            package = value.trim_matches('"');
        }
        inherits_lints |= section == "lints" && key == "workspace" && value == "true";
        let dependency = key.trim_end_matches(".workspace");
        // A crate's tests may use the crate itself, with more features.
        let is_other = dependency != package && !key.starts_with('#');
        if section.ends_with("dependencies") && is_other {
            if dependency == key && !value.contains("workspace = true") {
                let fix = "declare it in the root Cargo.toml and write `workspace = true` here";
                findings.add(
                    &file.path,
                    number,
                    format_args!("`{key}` has its own version: {fix}"),
                );
            }
            if points_up(package, dependency) {
                let fix = "move what it needs to a lower floor";
                let what = format_args!("`{package}` may not depend on `{dependency}`: {fix}");
                findings.add(&file.path, number, what);
            }
        }
    }
    if !inherits_lints {
        findings.add(&file.path, 0, "has its own lints: add `[lints]` with `workspace = true`");
    }
}

/// Whether `dependency` is not on a floor below `package`. Crates from elsewhere have no floor.
fn points_up(package: &str, dependency: &str) -> bool {
    let floor = |name: &str| FLOORS.iter().position(|floor| floor.contains(&name));
    match (floor(package), floor(dependency)) {
        (Some(package), Some(dependency)) => dependency >= package,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(manifest: &str) -> Vec<String> {
        let text = format!("[package]\nname = \"kvcache\"\n[lints]\nworkspace = true\n{manifest}");
        let mut findings = Findings::default();
        check(&File { path: "crates/kvcache/Cargo.toml".into(), text }, &mut findings);
        findings.0
    }

    #[test]
    fn dependencies_come_from_the_workspace() {
        let good = "[dependencies]\nhalf.workspace = true\n# note = 1\n\
                    [dev-dependencies]\nrand = { workspace = true, features = [\"std\"] }\n\
                    kvcache = { path = \".\", features = [\"testing\"] }\n";
        assert_eq!(findings(good), Vec::<String>::new());
        for bad in ["half = \"2\"", "half = { version = \"2\" }"] {
            let found = findings(&format!("[dependencies]\n{bad}\n"));
            assert_eq!(found.len(), 1, "{bad}");
            assert!(found[0].starts_with("crates/kvcache/Cargo.toml:6: `half`"), "{found:?}");
        }
        assert_eq!(findings("[dependencies.half]\nworkspace = true\n").len(), 1);
    }

    #[test]
    fn no_arrow_points_up() {
        assert!(findings("[dependencies]\nattn-flash.workspace = true\n").is_empty());
        for above in ["beam", "attn-flash-bwd", "ternary-train"] {
            assert_eq!(findings(&format!("[dependencies]\n{above}.workspace = true\n")).len(), 1);
        }
    }
}
