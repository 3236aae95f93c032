//! Models in files.

mod folder;
mod gguf;
mod safetensors;

pub(crate) use folder::{beside, put, write_file};
pub use folder::{read_folder, write_folder};
pub(crate) use gguf::check_blocks;
pub use gguf::write_gguf;
