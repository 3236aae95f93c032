//! `presets`: the shapes that have a name.

use anyhow::Result;
use ternary_train::Preset;

use crate::cli::say;

/// Prints a line for each preset.
pub(crate) fn run() -> Result<()> {
    for preset in Preset::ALL {
        let c = preset.config(256);
        say(format_args!(
            "{:8} {} layers, width {}, {} heads on {} of size {}, feed-forward {}: {} weights",
            preset.name(),
            c.num_hidden_layers,
            c.hidden_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.intermediate_size,
            c.parameters(),
        ));
    }
    Ok(())
}
