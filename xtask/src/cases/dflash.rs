//! Greedy verification of a token tree.

use anyhow::{Context, Result, bail, ensure};
use dflash::{TokenTree, accept_greedy};
use half::{bf16, f16};
use ndarray::{Array1, Array2, Axis};
use safetensors::Dtype;
use serde::Deserialize;
use tensor_utils::Element;

use super::inputs::Inputs;
use super::tensor::{Output, Stored};

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Params {}

/// Computes `accepted_nodes` and `tokens`.
pub(super) fn run(inputs: &mut Inputs<'_>) -> Result<Vec<Output>> {
    match inputs.dtype("logits")? {
        Dtype::F64 => run_as::<f64>(inputs),
        Dtype::F32 => run_as::<f32>(inputs),
        Dtype::F16 => run_as::<f16>(inputs),
        Dtype::BF16 => run_as::<bf16>(inputs),
        other => bail!("`in.logits` is {other:?}, expected F64, F32, F16 or BF16"),
    }
}

fn run_as<T: Element + Stored>(inputs: &mut Inputs<'_>) -> Result<Vec<Output>> {
    let Params {} = inputs.params()?;
    let tokens: Array1<i64> = inputs.array("tree_tokens")?;
    let parents: Array1<i64> = inputs.array("tree_parents")?;
    let logits: Array2<T> = inputs.array("logits")?;
    let to_token = |&token: &i64| {
        u32::try_from(token).with_context(|| format!("`in.tree_tokens` has {token}"))
    };
    let tokens: Vec<u32> = tokens.iter().map(to_token).collect::<Result<_>>()?;
    let (tree, became) = TokenTree::merged(&tokens, &parents.to_vec())
        .context("`in.tree_tokens` and `in.tree_parents` are no tree")?;
    ensure!(
        logits.nrows() == 1 + tokens.len(),
        "`in.logits` has shape {:?}, expected {} rows",
        logits.shape(),
        1 + tokens.len(),
    );
    // Of siblings that became one node, the first stands for it.
    let mut first = vec![usize::MAX; tree.len()];
    for (node, &became) in became.iter().enumerate() {
        first[became] = first[became].min(node);
    }
    let rows: Vec<usize> = std::iter::once(0).chain(first.iter().map(|node| node + 1)).collect();
    let accepted = accept_greedy(&tree, logits.select(Axis(0), &rows).view());
    let accepted = accepted.map_err(|error| match error {
        dflash::Error::Nan { row } => dflash::Error::Nan { row: rows[row] },
        other => other,
    })?;
    let nodes: Array1<i64> = accepted.nodes.iter().map(|&node| first[node] as i64).collect();
    let tokens: Array1<i64> = accepted.tokens.iter().map(|&token| i64::from(token)).collect();
    Ok(vec![Output::new("accepted_nodes", nodes), Output::new("tokens", tokens)])
}
