//! The Python process with PyTorch in it.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use ndarray::{Array, ArrayD, Dimension};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::duel::Contest;
use crate::cases::{Stored, Tensor};

const SCRIPT: &str = include_str!("../../peers/torch_peer.py");

/// What to do when there is no PyTorch.
const INSTALL: &str = "install it with `pip install torch` and pass its Python as `--python PATH`";

/// A running worker. It ends when it is dropped.
pub(super) struct Peer {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    version: String,
    /// Where tensors are exchanged, and the script is.
    folder: TempDir,
}

/// How an attempt to start a worker ended.
pub(super) enum Start {
    Ready(Peer),
    /// There is no Python or no PyTorch: the reason, with what to do about it.
    Missing(String),
}

/// An array on its way to the worker.
pub(super) struct Input {
    name: &'static str,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Answer {
    torch: Option<String>,
    missing: Option<String>,
    error: Option<String>,
    seconds: Option<f64>,
}

impl Peer {
    /// Starts `python` with the worker's script, computing on `threads` threads.
    pub(super) fn start(python: &Path, threads: usize) -> Result<Start> {
        let folder = TempDir::new().context("no folder for temporary files")?;
        let script = folder.path().join("torch_peer.py");
        std::fs::write(&script, SCRIPT).context("cannot write a temporary file")?;
        let count = threads.to_string();
        let child = Command::new(python)
            .arg(&script)
            .arg(&count)
            .envs([("OMP_NUM_THREADS", &count), ("MKL_NUM_THREADS", &count)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = match child {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let python = python.display();
                return Ok(Start::Missing(format!(
                    "there is no `{python}` for PyTorch; {INSTALL}"
                )));
            }
            child => child.with_context(|| format!("cannot run {}", python.display()))?,
        };
        let requests = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("the worker has no output")?);
        let mut peer = Self { child, requests, answers, version: String::new(), folder };
        let greeting = peer.answer()?;
        if let Some(reason) = greeting.missing {
            return Ok(Start::Missing(format!("no PyTorch ({reason}); {INSTALL}")));
        }
        peer.version = greeting.torch.context("the worker did not give PyTorch's version")?;
        Ok(Start::Ready(peer))
    }

    /// Name and version.
    pub(super) fn name(&self) -> String {
        format!("torch {}", self.version)
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What this Python lacks for an operation, with what to do about it.
    pub(super) fn lacks(&mut self, op: &str) -> Result<Option<String>> {
        let missing = self.ask(&json!({"do": "check", "op": op}))?.missing;
        Ok(missing.map(|library| format!("there is no `{library}`; `pip install {library}`")))
    }

    /// Hands over the inputs of an operation.
    pub(super) fn load(&mut self, op: &str, options: &Value, inputs: &[Input]) -> Result<()> {
        let path = self.folder.path().join("inputs.safetensors");
        let views = inputs.iter().map(|input| {
            let view = TensorView::new(input.dtype, input.shape.clone(), &input.bytes);
            view.map(|view| (input.name, view))
        });
        let views: Vec<_> = views.collect::<Result<_, _>>()?;
        safetensors::serialize_to_file(views, None, &path)?;
        self.ask(&json!({"do": "load", "op": op, "options": options, "inputs": path}))?;
        std::fs::remove_file(&path).context("cannot remove a temporary file")
    }

    /// Hands over the arrays of a contest, and computes once.
    pub(super) fn compute(&mut self, contest: &dyn Contest) -> Result<()> {
        let (operation, options) = contest.peer_operation();
        self.load(operation, &options, &contest.inputs())?;
        self.run(1)?;
        Ok(())
    }

    /// Runs the operation `repeats` times; returns the seconds one took.
    pub(super) fn run(&mut self, repeats: usize) -> Result<f64> {
        let answer = self.ask(&json!({"do": "run", "repeats": repeats}))?;
        Ok(answer.seconds.context("the worker did not give a time")? / repeats as f64)
    }

    /// An output of the last run.
    pub(super) fn output<T: Stored>(&mut self, name: &str) -> Result<ArrayD<T>> {
        let path = self.folder.path().join("outputs.safetensors");
        self.ask(&json!({"do": "save", "outputs": path}))?;
        let bytes = std::fs::read(&path).context("the worker saved nothing")?;
        Tensor::from(SafeTensors::deserialize(&bytes)?.tensor(name)?).array()
    }

    fn ask(&mut self, request: &Value) -> Result<Answer> {
        let requests = self.requests.as_mut().context("the worker has ended")?;
        writeln!(requests, "{request}").context("the worker does not listen any more")?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Answer> {
        let mut line = String::new();
        self.answers.read_line(&mut line).context("the worker cannot be read")?;
        if line.is_empty() {
            bail!("the Python worker ended without an answer; what it printed is above");
        }
        let answer: Answer = serde_json::from_str(&line)
            .with_context(|| format!("the Python worker answered `{}`", line.trim()))?;
        match answer.error {
            Some(error) => bail!("the Python worker failed: {error}"),
            None => Ok(answer),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Without input it ends by itself; if it did not start properly, it is ended.
        drop(self.requests.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Input {
    pub(super) fn new<T: Stored, D: Dimension>(name: &'static str, array: &Array<T, D>) -> Self {
        let mut bytes = Vec::with_capacity(array.len() * T::SIZE);
        array.iter().for_each(|value| value.write(&mut bytes));
        Self { name, dtype: T::DTYPE, shape: array.shape().to_vec(), bytes }
    }
}
