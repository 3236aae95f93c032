//! Models in files.

mod folder;
mod gguf;
mod new_file;
mod safetensors;

use std::path::Path;

use crate::Error;

pub use folder::{read_folder, write_folder};
pub(crate) use gguf::check_blocks;
pub use gguf::write_gguf;
pub(crate) use new_file::{NewFile, write_file};

/// Checks that a tensor has neither NaN nor infinity: training ends before it comes to such weights, and
/// all that a model says with them is NaN.
fn check_finite(path: &Path, name: &str, values: &[f32]) -> Result<(), Error> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => {
            let what = format!("`{name}` has {} at element {at}, expected finite", values[at]);
            Err(Error::file(path, what))
        }
        None => Ok(()),
    }
}
