//! A process with a peer in it: Python with PyTorch, or one of the Rust libraries.

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
    name: String,
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
    peer: Option<String>,
    missing: Option<String>,
    lacks: Option<String>,
    error: Option<String>,
    seconds: Option<f64>,
}

impl Peer {
    /// Starts `python` with PyTorch, computing on `threads` threads.
    pub(super) fn torch(python: &Path, threads: usize) -> Result<Start> {
        let folder = TempDir::new().context("no folder for temporary files")?;
        let script = folder.path().join("torch_peer.py");
        std::fs::write(&script, SCRIPT).context("cannot write a temporary file")?;
        let mut command = Command::new(python);
        command.arg(&script);
        Ok(match Self::start(command, threads, folder)? {
            Start::Missing(reason) => Start::Missing(format!("no PyTorch ({reason}); {INSTALL}")),
            ready => ready,
        })
    }

    /// Starts the Rust worker with a library, computing on `threads` threads.
    pub(super) fn rust(worker: &Path, library: &str, threads: usize) -> Result<Start> {
        let mut command = Command::new(worker);
        command.arg(library);
        Self::start(command, threads, TempDir::new().context("no folder for temporary files")?)
    }

    fn start(mut command: Command, threads: usize, folder: TempDir) -> Result<Start> {
        let count = threads.to_string();
        let limits = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"];
        let child = command
            .arg(&count)
            .envs(limits.map(|name| (name, &count)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let program = command.get_program().to_string_lossy();
        let mut child = match child {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Ok(Start::Missing(format!("there is no `{program}`")));
            }
            child => child.with_context(|| format!("cannot run {program}"))?,
        };
        let requests = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("the worker has no output")?);
        let mut peer = Self { child, requests, answers, name: String::new(), folder };
        let greeting = peer.answer()?;
        if let Some(reason) = greeting.missing {
            return Ok(Start::Missing(reason));
        }
        peer.name = greeting.peer.context("the worker did not say which library it has")?;
        Ok(Start::Ready(peer))
    }

    /// Name and version.
    pub(super) fn name(&self) -> String {
        self.name.clone()
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Hands over the inputs of an operation; or says why the peer cannot compute it.
    pub(super) fn load(
        &mut self,
        op: &str,
        options: &Value,
        inputs: &[Input],
    ) -> Result<Option<String>> {
        let path = self.folder.path().join("inputs.safetensors");
        let views = inputs.iter().map(|input| {
            let view = TensorView::new(input.dtype, input.shape.clone(), &input.bytes);
            view.map(|view| (input.name, view))
        });
        let views: Vec<_> = views.collect::<Result<_, _>>()?;
        safetensors::serialize_to_file(views, None, &path)?;
        let request = json!({"do": "load", "op": op, "options": options, "inputs": path});
        let lacks = self.ask(&request)?.lacks;
        std::fs::remove_file(&path).context("cannot remove a temporary file")?;
        Ok(lacks)
    }

    /// Hands over the arrays of a contest, and computes once; or says why the peer cannot.
    pub(super) fn compute(&mut self, contest: &dyn Contest) -> Result<Option<String>> {
        let (operation, options) = contest.peer_operation();
        let lacks = self.load(operation, &options, &contest.inputs())?;
        if lacks.is_none() {
            self.run(1)?;
        }
        Ok(lacks)
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
            bail!("the worker ended without an answer; what it printed is above");
        }
        let answer: Answer = serde_json::from_str(&line)
            .with_context(|| format!("the worker answered `{}`", line.trim()))?;
        match answer.error {
            Some(error) => bail!("the worker failed: {error}"),
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
