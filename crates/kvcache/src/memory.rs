//! What a cache costs, before there is one: bytes by model, length and storage, the longest context of
//! a device, and what decoding without a cache would cost. Everything here is arithmetic
//! (docs/derivation.md, section 5); the example `memory` prints the tables.

use crate::error::invalid;
use crate::form::{Form, Side};
use crate::{Config, Error, Storage};

/// What a number of rows has to be.
const ADDRESSED: &str = "rows whose bytes can be addressed";

/// Bytes of a page of one layer, its scales included: of keys and of values.
///
/// # Errors
/// [`Error::Option`] for a configuration that no cache can have.
pub fn page_bytes(config: &Config) -> Result<[usize; 2], Error> {
    config.check()?;
    let form = |side, storage, columns| {
        Form::new(side, storage, config.key_heads, columns, config.page_size, 1)
    };
    let keys = form(Side::Keys, config.keys, config.head_size);
    let values = form(Side::Values, config.values, config.value_size);
    Ok([keys.page_bytes(), values.page_bytes()])
}

/// Bytes of the pages of `rows` rows in all layers. The rows that quantised storage keeps in full
/// precision besides are [`residual_bytes`].
///
/// # Errors
/// As [`page_bytes`], and for more bytes than can be addressed.
pub fn cache_bytes(config: &Config, rows: usize) -> Result<usize, Error> {
    let page: usize = page_bytes(config)?.iter().sum();
    let bytes = (config.layers * page).checked_mul(rows.div_ceil(config.page_size));
    bytes.ok_or_else(|| invalid("rows", ADDRESSED, rows))
}

/// The part of its pages that a sequence of `len` rows leaves empty: under one page of `page_size` rows. 0
/// without rows or for pages of none.
pub fn fragmentation(page_size: usize, len: usize) -> f64 {
    if page_size == 0 || len == 0 {
        return 0.0;
    }
    1.0 - len as f64 / (len.div_ceil(page_size) as f64 * page_size as f64)
}

/// Pages of `sequences` sequences that have `prefix` rows in common and `own` more each: as forks, which
/// share the full pages of the prefix, and as copies.
pub fn pages_of_fork(
    page_size: usize,
    prefix: usize,
    own: usize,
    sequences: usize,
) -> (usize, usize) {
    let page_size = page_size.max(1);
    let copied = prefix.saturating_add(own).div_ceil(page_size).saturating_mul(sequences);
    let forked = match (sequences, own) {
        (0, _) => 0,
        // Nobody writes, so the partial page at the end is shared too.
        (_, 0) => prefix.div_ceil(page_size),
        _ => {
            let tail = (prefix % page_size).saturating_add(own).div_ceil(page_size);
            sequences.saturating_mul(tail).saturating_add(prefix / page_size)
        }
    };
    (forked, copied)
}

/// Most bytes in full precision that a sequence holds besides its pages, with quantised storage, while
/// it is decoded token by token: the pages that end within `residual` rows of the end, and the one
/// that is being filled.
///
/// # Errors
/// As [`page_bytes`], and for more bytes than can be addressed.
pub fn residual_bytes(config: &Config) -> Result<usize, Error> {
    config.check()?;
    let pages = config.residual.div_ceil(config.page_size) + 2;
    let side = |storage: Storage, columns| if storage.is_quantised() { columns } else { 0 };
    let row = side(config.keys, config.head_size) + side(config.values, config.value_size);
    let page = 4 * config.layers * config.key_heads * config.page_size * row;
    page.checked_mul(pages).ok_or_else(|| invalid("residual", ADDRESSED, config.residual))
}

/// The part of a page that is scales and minima, as a fraction of its numbers; 0 for float storage. Not
/// counted is what pads a page whose rows or head size are odd, or no multiple of 4 or 8 with codes.
///
/// # Errors
/// As [`page_bytes`].
pub fn scale_overhead(config: &Config) -> Result<f64, Error> {
    page_bytes(config)?;
    // Four bytes for each channel of keys and each row of values.
    let side = |storage: Storage, groups| if storage.is_quantised() { 4 * groups } else { 0 };
    let scales = side(config.keys, config.head_size) + side(config.values, config.page_size);
    let bits = config.keys.bits() * config.head_size + config.values.bits() * config.value_size;
    Ok(scales as f64 * 8.0 / (config.page_size * bits) as f64)
}

/// What a model keeps for each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model {
    /// Its name.
    pub name: &'static str,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub query_heads: usize,
    /// Key/value heads; with [`latent`](Self::latent), 1.
    pub key_heads: usize,
    /// Head size; with [`latent`](Self::latent), that of keys.
    pub head_size: usize,
    /// Multi-head latent attention: of the `head_size` numbers that are kept per token and layer, those
    /// that serve as values too.
    pub latent: Option<usize>,
    /// Positions that a sliding window keeps.
    pub window: Option<usize>,
    /// Weights.
    pub parameters: u64,
}

impl Model {
    /// Models with published sizes.
    pub const KNOWN: [Self; 9] = [
        Self::new("Llama-2-7B", 32, 32, 32, 128, 6_738_415_616),
        Self::new("Llama-2-13B", 40, 40, 40, 128, 13_015_864_320),
        Self::new("Llama-2-70B", 80, 64, 8, 128, 68_976_648_192),
        Self::new("Llama-3-8B", 32, 32, 8, 128, 8_030_261_248),
        Self::new("Llama-3-70B", 80, 64, 8, 128, 70_553_706_496),
        Self::new("Qwen3-0.6B", 28, 16, 8, 128, 596_049_920),
        Self::new("Qwen3-8B", 36, 32, 8, 128, 8_190_735_360),
        Self { window: Some(4096), ..Self::new("Mistral-7B v0.1", 32, 32, 8, 128, 7_241_732_096) },
        Self {
            latent: Some(512),
            ..Self::new("DeepSeek-V3 (MLA)", 61, 128, 1, 576, 671_026_419_200)
        },
    ];

    const fn new(
        name: &'static str,
        layers: usize,
        query_heads: usize,
        key_heads: usize,
        head_size: usize,
        parameters: u64,
    ) -> Self {
        let (latent, window) = (None, None);
        Self { name, layers, query_heads, key_heads, head_size, latent, window, parameters }
    }

    /// Numbers kept per token, all layers.
    pub fn numbers_per_token(&self) -> usize {
        let sides = if self.latent.is_some() { 1 } else { 2 };
        product(&[sides, self.layers, self.key_heads, self.head_size])
    }

    /// Bytes per token, scales apart: exact for float storage.
    pub fn bytes_per_token(&self, storage: Storage) -> usize {
        product(&[self.numbers_per_token(), storage.bits()]) / 8
    }

    /// Bytes of `batch` sequences of `len` tokens, scales apart; a window caps the length.
    pub fn bytes(&self, batch: usize, len: usize, storage: Storage) -> usize {
        let kept = self.window.map_or(len, |window| window.min(len));
        product(&[batch, kept, self.bytes_per_token(storage)])
    }

    /// The longest context of one sequence on a device of `memory` bytes whose weights take
    /// `weight_bits` bits each, with nothing else on it; `None` without a bound (a window that fits, or a
    /// model that keeps nothing) and 0 if the weights do not fit.
    pub fn longest_context(&self, memory: u64, weight_bits: u64, storage: Storage) -> Option<u64> {
        let weights = self.parameters.saturating_mul(weight_bits) / 8;
        let token = self.bytes_per_token(storage) as u64;
        let tokens = memory.saturating_sub(weights).checked_div(token)?;
        match self.window {
            Some(window) if tokens >= window as u64 => None,
            _ => Some(tokens),
        }
    }
}

/// A product, or the largest number if it is larger.
fn product(factors: &[usize]) -> usize {
    factors.iter().fold(1, |product: usize, &factor| product.saturating_mul(factor))
}

/// Tokens that pass through the layers when `new` tokens are generated after a prompt: with a cache
/// each once, without one the whole sequence for every new token.
pub fn tokens_processed(prompt: u64, new: u64) -> (u64, u64) {
    let cached = prompt.saturating_add(new.saturating_sub(1));
    let grown = u128::from(new) * u128::from(new.saturating_sub(1)) / 2;
    let uncached = (u128::from(new) * u128::from(prompt)).saturating_add(grown);
    (cached, u64::try_from(uncached).unwrap_or(u64::MAX))
}

/// Operations per byte of the cache that attention reads, `queries` positions at once: each number is
/// used by every query head of its group, with a multiplication and an addition, and twice where it is part
/// of a key and a value (latent attention).
pub fn intensity(model: &Model, queries: usize, storage: Storage) -> f64 {
    let group = model.query_heads as f64 / model.key_heads as f64;
    let used = 1.0 + model.latent.unwrap_or(0) as f64 / model.head_size as f64;
    2.0 * group * queries as f64 * used * 8.0 / storage.bits() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_figures() {
        let per_token = |name: &str| {
            let model = Model::KNOWN.into_iter().find(|model| model.name == name);
            model.map(|model| model.bytes_per_token(Storage::F16))
        };
        for (name, bytes) in [
            ("Llama-2-7B", 524_288),
            ("Llama-3-8B", 131_072),
            ("Llama-3-70B", 327_680),
            ("Mistral-7B v0.1", 131_072),
            ("DeepSeek-V3 (MLA)", 70_272),
        ] {
            assert_eq!(per_token(name), Some(bytes), "{name}");
        }
        let mistral = Model::KNOWN[7];
        assert_eq!(mistral.bytes(1, 100_000, Storage::F16), 512 << 20);
        assert_eq!(mistral.longest_context(80_000_000_000, 16, Storage::F16), None);
    }

    /// 80 GB of 10^9 bytes less 13.5 GB of weights, in steps of 512 KiB: 127 thousand; with 3 GB set aside
    /// for activations, 121 thousand.
    #[test]
    fn context_of_7b_on_80_gb() {
        let model = Model::KNOWN[0];
        let all = model.longest_context(80_000_000_000, 16, Storage::F16);
        assert_eq!(all, Some(126_882));
        let less = model.longest_context(77_000_000_000, 16, Storage::F16);
        assert_eq!(less, Some(121_160));
    }

    #[test]
    fn with_and_without_a_cache() {
        let (cached, uncached) = tokens_processed(1024, 100);
        assert_eq!((cached, uncached), (1123, 107_350));
        assert_eq!(tokens_processed(5, 0), (5, 0));
    }

    /// 128 query heads use 576 numbers as keys and 512 of them as values.
    #[test]
    fn intensities() {
        let of = |model: Model, storage| intensity(&model, 1, storage);
        assert_eq!(of(Model::KNOWN[3], Storage::F16), 4.0);
        assert_eq!(of(Model::KNOWN[3], Storage::Int4), 16.0);
        let latent = 2.0 * 128.0 * (576.0 + 512.0) / (576.0 * 2.0);
        assert!((of(Model::KNOWN[8], Storage::F16) - latent).abs() < 1e-9);
    }

    #[test]
    fn waste_and_sharing() {
        assert_eq!(fragmentation(64, 65), 1.0 - 65.0 / 128.0);
        assert_eq!(
            (fragmentation(64, 128), fragmentation(64, 0), fragmentation(0, 5)),
            (0.0, 0.0, 0.0)
        );
        // 31 full pages are shared, of the 32nd and what follows each has its own.
        assert_eq!(pages_of_fork(64, 2047, 2, 8), (31 + 16, 8 * 33));
        assert_eq!(pages_of_fork(64, 2048, 0, 8), (32, 256));
        assert_eq!(pages_of_fork(64, 100, 0, 8), (2, 16));
        assert_eq!(pages_of_fork(64, 100, 5, 0), (0, 0));
    }

    #[test]
    fn sizes_without_bound() {
        let nothing = Model { layers: 0, key_heads: 0, ..Model::KNOWN[0] };
        assert_eq!(nothing.longest_context(u64::MAX, u64::MAX, Storage::F16), None);
        assert!(!intensity(&nothing, 1, Storage::F32).is_finite());
        assert_eq!(Model::KNOWN[0].bytes(usize::MAX, usize::MAX, Storage::F32), usize::MAX);
        assert_eq!(Model::KNOWN[0].longest_context(1 << 40, u64::MAX, Storage::F16), Some(0));
        assert_eq!(tokens_processed(u64::MAX, u64::MAX), (u64::MAX, u64::MAX));
        let config = Config::new(1, 8, 128).stored_as(Storage::Int8);
        assert!(cache_bytes(&config, usize::MAX).is_err());
        assert!(residual_bytes(&Config { residual: usize::MAX, ..config.clone() }).is_err());
        let huge = 1 << 24;
        let config = Config { page_size: huge, ..Config::new(huge, huge, huge) };
        assert!(page_bytes(&config).is_err());
    }

    #[test]
    fn scales_cost_less_than_a_tenth() {
        for storage in [Storage::Int8, Storage::Int4] {
            let config = Config { page_size: 128, ..Config::new(1, 8, 128) }.stored_as(storage);
            let overhead = scale_overhead(&config).unwrap_or(1.0);
            assert!(overhead < 0.1, "{storage:?}: {overhead}");
        }
        let config = Config::new(1, 8, 128).stored_as(Storage::Int8);
        assert!(scale_overhead(&config).is_ok_and(|overhead| overhead < 0.05));
    }
}
