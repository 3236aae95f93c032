//! Scratch memory that the caller owns.

/// Scratch memory for [`Cache::attend_into`](crate::Cache::attend_into). It grows to what the largest
/// call needs; calls that need no more allocate nothing.
#[derive(Debug, Default)]
pub struct Workspace {
    pub(crate) row: Vec<f32>,
}

impl Workspace {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }
}
