//! What a cache costs in bytes, before there is one.

use crate::store::{Form, Side};
use crate::{Config, Error};

/// Bytes of a page of one layer, its scales included: keys and values.
///
/// # Errors
/// [`Error::Option`] for a configuration that no cache can have.
pub fn page_bytes(config: &Config) -> Result<[usize; 2], Error> {
    config.check()?;
    let form = |side, storage, columns| Form {
        side,
        storage,
        heads: config.key_heads,
        columns,
        rows: config.page_size,
    };
    let keys = form(Side::Keys, config.keys, config.head_size);
    let values = form(Side::Values, config.values, config.value_size);
    Ok([keys.page_bytes(), values.page_bytes()])
}
