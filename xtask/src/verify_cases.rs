//! `verify-cases`: runs case files and compares the outputs with the answers they record.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::anyhow;
use walkdir::{DirEntry, WalkDir};

use crate::cases;
use crate::workspace::{note, say};

/// Run recorded cases through the public API of the kernels.
///
/// Exit code 0: all passed. 1: a case failed. 2: a file could not be run; its line says why.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Case files, or folders that are searched for `*.safetensors`
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// Only cases of this crate's kernels, and files that cannot be read
    #[arg(short, long, value_name = "CRATE")]
    package: Option<String>,
}

/// A file to run, or what is wrong with a path.
struct CasePath {
    /// Its name in the table: the path within `folder` without the ending.
    name: String,
    path: Result<PathBuf, String>,
}

impl CasePath {
    fn new(folder: PathBuf, path: PathBuf) -> Self {
        let name = path.strip_prefix(&folder).unwrap_or(&path).with_extension("");
        Self { name: name.display().to_string(), path: Ok(path) }
    }

    fn error(path: &Path, error: &anyhow::Error) -> Self {
        Self { name: String::new(), path: Err(describe(path, error)) }
    }
}

/// Runs every case under the paths of `args`; prints a line for each.
pub(crate) fn run(args: &Args) -> ExitCode {
    if let Some(package) = args.package.as_deref()
        && !cases::packages().any(|known| known == package)
    {
        let known: BTreeSet<_> = cases::packages().collect();
        let known: Vec<_> = known.into_iter().collect();
        let known = known.join(", ");
        note(format_args!("error: no case is of --package {package}, but of {known}"));
        return ExitCode::from(2);
    }
    let (mut passed, mut failed, mut errors) = (0, 0, 0);
    for case in args.paths.iter().flat_map(|path| find(path, args.package.as_deref())) {
        let CasePath { name, path } = case;
        match path.and_then(|path| cases::run(&path).map_err(|error| describe(&path, &error))) {
            Ok(checked) => {
                let line = Line::new(&checked);
                say(format_args!("{name:<36} {:<14} {}", checked.kernel, line.text));
                *(if line.passes { &mut passed } else { &mut failed }) += 1;
            }
            Err(message) => {
                say(format_args!("ERROR {message}"));
                errors += 1;
            }
        }
    }
    if errors > 0 {
        say(format_args!("{errors} could not be run"));
    }
    say(format_args!("{passed} passed, {failed} failed"));
    match (errors, failed) {
        (0, 0) => ExitCode::SUCCESS,
        (0, _) => ExitCode::from(1),
        _ => ExitCode::from(2),
    }
}

/// Whether there is a case of `package` in `folder`.
pub(crate) fn any(folder: &Path, package: &str) -> bool {
    let owner = |case: CasePath| cases::package(&case.path.ok()?).ok()?;
    find(folder, None).into_iter().any(|case| owner(case) == Some(package))
}

/// The rest of a case's line.
struct Line {
    passes: bool,
    text: String,
}

impl Line {
    fn new(checked: &cases::Checked) -> Self {
        let (passes, text) = match &checked.outcome {
            Ok(cases::Agreement { max_abs, max_rel, worst }) => {
                let errors = format!("max abs {max_abs:<8.1e} max rel {max_rel:<8.1e}");
                match worst {
                    None => (true, format!("{errors} PASS")),
                    Some(worst) => (false, format!("{errors} FAIL {worst}")),
                }
            }
            Err(panic) => (false, format!("FAIL {panic}")),
        };
        Self { passes, text }
    }
}

/// The case files at `path`: itself, or all in the folder, in order of their names.
///
/// A folder with a `config.json` is a model that a case refers to, and is passed over.
fn find(path: &Path, package: Option<&str>) -> Vec<CasePath> {
    if path.is_file() {
        if let (Some(package), Ok(Some(owner))) = (package, cases::package(path))
            && package != owner
        {
            let error = anyhow!("is a case of {owner}, expected one of {package} (--package)");
            return vec![CasePath::error(path, &error)];
        }
        return vec![CasePath::new(path.with_file_name(""), path.to_owned())];
    }
    if !path.exists() {
        return vec![CasePath::error(path, &anyhow!("there is no such file or folder"))];
    }
    if !path.is_dir() {
        return vec![CasePath::error(path, &anyhow!("is neither a file nor a folder"))];
    }
    let is_model = |entry: &DirEntry| entry.path().join("config.json").exists();
    let is_case = |path: &Path| path.extension().is_some_and(|end| end == "safetensors");
    let is_wanted = |path: &Path| match (package, cases::package(path)) {
        (Some(package), Ok(owner)) => owner == Some(package),
        _ => true,
    };
    let mut found = Vec::new();
    let entries = WalkDir::new(path).follow_links(true).sort_by_file_name().into_iter();
    for entry in entries.filter_entry(|entry| !is_model(entry)) {
        match entry {
            Ok(file) if !file.file_type().is_dir() && is_case(file.path()) => {
                if is_wanted(file.path()) {
                    found.push(CasePath::new(path.to_owned(), file.into_path()));
                }
            }
            Ok(_) => {}
            Err(error) => found.push(CasePath::error(path, &anyhow!(error))),
        }
    }
    if found.is_empty() {
        let whose = package.map(|package| format!(" of {package}")).unwrap_or_default();
        let error = anyhow!("there is no case file (*.safetensors){whose} in this folder");
        found.push(CasePath::error(path, &error));
    }
    found
}

fn describe(path: &Path, error: &anyhow::Error) -> String {
    format!("{}: {error:#}", path.display())
}
