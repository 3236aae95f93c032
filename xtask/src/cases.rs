//! Case files: one recorded call of a kernel, with the answer of a system that is not this one.
//!
//! A case is a `.safetensors` file with inputs `in.*`, expected outputs `out.*` and, in its
//! metadata, the kernel, its parameters and the tolerance. To make a kernel checkable, write an
//! adapter (`attn_flash.rs` is one) that calls the kernel's public API, and add a line to
//! [`KERNELS`].

mod attn_flash;
mod attn_flash_bwd;
mod beam;
mod check;
mod dflash;
mod file;
mod inputs;
mod kvcache;
mod layernorm_bwd;
mod qwen3;
mod softmax_topk;
mod tensor;
mod ternary;

use std::any::Any;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};

pub(crate) use check::Agreement;
use file::CaseFile;
use inputs::Inputs;
use tensor::{Output, may_be_wider, widens};
pub(crate) use tensor::{Stored, Tensor};

/// Computes a kernel's outputs from the inputs of a case.
///
/// It takes what it knows from the [`Inputs`]; what it leaves there is unknown and an error.
type Adapter = fn(&mut Inputs<'_>) -> Result<Vec<Output>>;

/// A kernel that cases may name.
pub(crate) struct Kernel {
    /// What the case files call it.
    name: &'static str,
    /// The crate that computes it.
    package: &'static str,
    run: Adapter,
}

/// Every kernel that has an adapter.
const KERNELS: &[Kernel] = &[
    Kernel { name: "attn-flash", package: "attn-flash", run: attn_flash::run },
    Kernel { name: "attn-flash-bwd", package: "attn-flash-bwd", run: attn_flash_bwd::run },
    Kernel { name: "kvcache", package: "kvcache", run: kvcache::run },
    Kernel { name: "beam", package: "beam", run: beam::run },
    Kernel { name: "layernorm-bwd", package: "layernorm-bwd", run: layernorm_bwd::run },
    Kernel { name: "softmax-topk", package: "softmax-topk", run: softmax_topk::run },
    Kernel { name: "ternary-quantize", package: "ternary-train", run: ternary::quantize },
    Kernel { name: "ternary-matmul", package: "ternary-train", run: ternary::matmul },
    Kernel { name: "dflash", package: "dflash", run: dflash::run },
    Kernel { name: "qwen3", package: "ternary-train", run: qwen3::run },
];

/// The crates whose kernels cases may name; those of one crate may be apart.
pub(crate) fn packages() -> impl Iterator<Item = &'static str> {
    KERNELS.iter().map(|kernel| kernel.package)
}

/// What came of a case that could be run.
pub(crate) struct Checked {
    /// The kernel it names.
    pub(crate) kernel: &'static str,
    /// How close the outputs came, or the message of a panic.
    pub(crate) outcome: Result<Agreement, String>,
}

/// Runs the case in `path` and compares every output it records.
///
/// An error means that there was nothing to compare: the file cannot be read, is not a case, or
/// asks for something that does not exist.
pub(crate) fn run(path: &Path) -> Result<Checked> {
    run_bytes(&read(path)?, path.parent().unwrap_or(Path::new(".")))
}

/// [`run`] for the contents of a case file that is in `folder`.
pub(crate) fn run_bytes(bytes: &[u8], folder: &Path) -> Result<Checked> {
    let case = CaseFile::parse(bytes)?;
    let kernel = lookup(&case.kernel)?;
    let mut inputs = Inputs::new(&case, folder);
    let outputs = match catch_unwind(AssertUnwindSafe(|| (kernel.run)(&mut inputs))) {
        Ok(outputs) => outputs?,
        Err(panic) => {
            return Ok(Checked { kernel: kernel.name, outcome: Err(panic_message(&*panic)) });
        }
    };
    inputs.finish()?;

    let mut agreement = Agreement::default();
    for (name, wanted) in &case.outputs {
        let got = outputs.iter().find(|output| output.name == name).with_context(|| {
            let known: Vec<_> =
                outputs.iter().map(|output| format!("out.{}", output.name)).collect();
            format!("unknown tensor `out.{name}`: {} computes {}", kernel.name, known.join(", "))
        })?;
        // The answer may be known more precisely than the kernel can give it.
        let or_wider = if may_be_wider(got.dtype) { " or wider" } else { "" };
        ensure!(
            widens(got.dtype, wanted.dtype),
            "`out.{name}` is {:?}, expected {:?}{or_wider} for these inputs",
            wanted.dtype,
            got.dtype,
        );
        ensure!(
            wanted.shape == got.shape,
            "`out.{name}` has shape {:?}, expected {:?} for these inputs",
            wanted.shape,
            got.shape,
        );
        agreement.add(name, &got.shape, &got.values, &wanted.values()?, case.tolerance);
    }
    Ok(Checked { kernel: kernel.name, outcome: Ok(agreement) })
}

/// The crate that computes the kernel which the case in `path` names; `None`: unknown kernel.
pub(crate) fn package(path: &Path) -> Result<Option<&'static str>> {
    let bytes = read(path)?;
    let case = CaseFile::parse(&bytes)?;
    Ok(lookup(&case.kernel).ok().map(|kernel| kernel.package))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    ensure!(path.is_file(), "not a regular file");
    fs::read(path).map_err(|error| anyhow!("cannot be read: {error}"))
}

fn lookup(name: &str) -> Result<&'static Kernel> {
    let Some(kernel) = KERNELS.iter().find(|kernel| kernel.name == name) else {
        let known: Vec<_> = KERNELS.iter().map(|kernel| kernel.name).collect();
        bail!("unknown kernel `{name}`; known: {}", known.join(", "));
    };
    Ok(kernel)
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let message = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the kernel panicked: {}", message.unwrap_or("no message"))
}
