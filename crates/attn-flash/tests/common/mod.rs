//! What the tests of this crate share: calls with all their arguments, drawn from a seed.

#![allow(dead_code, reason = "each test binary uses its own part")]

use attn_flash::{
    AncestorMask, Attention, Coverage, Error, Mask, NoMask, Options, Pair, Tile, Tiling, Window,
    Workspace, attention_into,
};
use ndarray::{Array2, Array3, Array4, ArrayD, ArrayView4, IxDyn};
use rand::RngExt;
use tensor_utils::testing::{Case, Guarded, Poison, Seeded, Tolerance, isas};
use tensor_utils::{Element, Isa};

/// Small tiles, whose edges small inputs straddle, and the default ones, on every instruction set.
pub(crate) fn tilings() -> Vec<Tiling> {
    let blocks = [(768, 256), (1, 32), (13, 64)];
    let all = isas().into_iter().flat_map(|isa| blocks.map(|blocks| tiling(blocks, isa)));
    all.collect()
}

pub(crate) fn tiling((query_block, key_block): (usize, usize), isa: Isa) -> Tiling {
    Tiling { query_block, key_block, isa: Some(isa) }
}

/// The compute type's rounding of scores of some tens, and the rounding of the output. That of the 16-bit
/// types is four times what is measured.
pub(crate) fn tolerance<T: Element>() -> Tolerance {
    match T::NAME {
        "f64" => Tolerance { abs: 2e-14, rel: 2e-14 },
        "f32" => Tolerance { abs: 1e-5, rel: 1e-5 },
        _ => Tolerance { abs: 2.5e-6, rel: T::EPSILON / 2.0 + 2.5e-6 },
    }
}

/// As [`tolerance`], for an lse, which is not rounded to the type of the output.
pub(crate) fn lse_tolerance<T: Element>() -> Tolerance {
    match T::NAME {
        "f64" | "f32" => tolerance::<T>(),
        _ => Tolerance { abs: 1e-6, rel: 1e-6 },
    }
}

/// The sizes of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) key_heads: usize,
    /// Query heads for each key/value head.
    pub(crate) group: usize,
    pub(crate) n: usize,
    pub(crate) m: usize,
    pub(crate) d: usize,
    pub(crate) e: usize,
}

impl Sizes {
    pub(crate) fn heads(&self) -> usize {
        self.key_heads * self.group
    }

    pub(crate) fn scores(&self) -> [usize; 4] {
        [self.batch, self.heads(), self.n, self.m]
    }
}

/// The tensors of a call.
#[derive(Debug, Clone)]
pub(crate) struct Inputs<T> {
    pub(crate) q: Array4<T>,
    pub(crate) k: Array4<T>,
    pub(crate) v: Array4<T>,
}

impl<T: Element> Inputs<T> {
    pub(crate) fn normal(sizes: Sizes, seed: u64) -> Self {
        let Sizes { batch, key_heads, n, m, d, e, .. } = sizes;
        let mut seeded = Seeded::new(seed);
        Self {
            q: seeded.normal((batch, sizes.heads(), n, d)),
            k: seeded.normal((batch, key_heads, m, d)),
            v: seeded.normal((batch, key_heads, m, e)),
        }
    }

    pub(crate) fn views(&self) -> (ArrayView4<'_, T>, ArrayView4<'_, T>, ArrayView4<'_, T>) {
        (self.q.view(), self.k.view(), self.v.view())
    }
}

/// Attention with tiles of our choice, into outputs that show every element that was not written
/// and every one beside them that was.
pub(crate) fn attention_tiled<T, M>(
    (q, k, v): (ArrayView4<'_, T>, ArrayView4<'_, T>, ArrayView4<'_, T>),
    options: &Options<'_, T, M>,
    tiling: &Tiling,
) -> Result<Attention<T>, Error>
where
    T: Element + Poison,
    T::Acc: Poison,
    M: Mask,
{
    let (batch, heads, n, d) = q.dim();
    let e = v.dim().3;
    let mut workspace = Workspace::new(d, e, tiling)?;
    if batch * heads * n == 0 {
        let mut empty = Attention {
            o: Array4::default((batch, heads, n, e)),
            lse: Array3::default((batch, heads, n)),
        };
        attention_into(empty.o.view_mut(), empty.lse.view_mut(), q, k, v, options, &mut workspace)?;
        return Ok(empty);
    }
    let mut o = Guarded::<T, _>::padded((batch, heads, n, e));
    let mut lse = Guarded::<T::Acc, _>::padded((batch, heads, n));
    attention_into(o.view_mut(), lse.view_mut(), q, k, v, options, &mut workspace)?;
    Ok(Attention { o: o.finish().unwrap(), lse: lse.finish().unwrap() })
}

/// How an array of scores is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broadcast {
    Nothing,
    Batch,
    BatchAndHeads,
    /// One row for all queries.
    Rows,
    /// One element for all keys.
    Columns,
    Everything,
}

impl Broadcast {
    pub(crate) const ALL: [Self; 6] = [
        Self::Nothing,
        Self::Batch,
        Self::BatchAndHeads,
        Self::Rows,
        Self::Columns,
        Self::Everything,
    ];

    fn shape(self, [batch, heads, n, m]: [usize; 4]) -> IxDyn {
        match self {
            Self::Nothing => IxDyn(&[batch, heads, n, m]),
            Self::Batch => IxDyn(&[1, heads, n, m]),
            Self::BatchAndHeads => IxDyn(&[n, m]),
            Self::Rows => IxDyn(&[batch, 1, 1, m]),
            Self::Columns => IxDyn(&[heads, n, 1]),
            Self::Everything => IxDyn(&[]),
        }
    }
}

/// A user's mask, with and without an answer for whole tiles.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum UserMask {
    Everything,
    /// Documents of this length packed one after the other, on the keys' positions.
    Documents {
        length: usize,
        first_query: usize,
    },
    /// Every so many keys, shifted by batch entry and head; never says more than `Partial`.
    Dilated(usize),
    /// Keys before this one; sharp about whole tiles.
    Prefix(usize),
    /// So many keys more for each batch entry and head than for the one before; sharp about whole
    /// tiles, which differ between the heads that share keys.
    Growing(usize),
    /// Another mask as a part of its call sees it, that begins at this batch entry, head, query and
    /// key.
    Part(Box<Self>, [usize; 4]),
}

impl UserMask {
    pub(crate) fn part(&self, first: [usize; 4]) -> Self {
        Self::Part(Box::new(self.clone()), first)
    }
}

impl Mask for UserMask {
    fn visible(&self, at: Pair) -> bool {
        match *self {
            Self::Part(ref mask, [batch, head, query, key]) => mask.visible(Pair {
                batch: at.batch + batch,
                head: at.head + head,
                query: at.query + query,
                key: at.key + key,
            }),
            Self::Everything => true,
            Self::Documents { length, first_query } => {
                (at.query + first_query) / length == at.key / length
            }
            Self::Dilated(step) => {
                (at.key + at.query + at.head + 2 * at.batch).is_multiple_of(step)
            }
            Self::Prefix(length) => at.key < length,
            Self::Growing(step) => at.key < step * (at.batch + at.head),
        }
    }

    fn coverage(&self, tile: Tile) -> Coverage {
        assert!(!tile.queries.is_empty() && !tile.keys.is_empty(), "{tile:?}");
        match *self {
            Self::Part(ref mask, [batch, head, query, key]) => mask.coverage(Tile {
                batch: tile.batch + batch,
                head: tile.head + head,
                queries: tile.queries.start + query..tile.queries.end + query,
                keys: tile.keys.start + key..tile.keys.end + key,
            }),
            Self::Everything => Coverage::Full,
            Self::Documents { length, first_query } => {
                let document = |first: usize, last: usize| (first / length, last / length);
                let queries = &tile.queries;
                let queries = document(queries.start + first_query, queries.end - 1 + first_query);
                let keys = document(tile.keys.start, tile.keys.end - 1);
                if queries.1 < keys.0 || keys.1 < queries.0 {
                    Coverage::Skip
                } else if queries.0 == queries.1 && keys == queries {
                    Coverage::Full
                } else {
                    Coverage::Partial
                }
            }
            Self::Dilated(_) => Coverage::Partial,
            Self::Prefix(length) => prefix_coverage(&tile, length),
            Self::Growing(step) => prefix_coverage(&tile, step * (tile.batch + tile.head)),
        }
    }
}

fn prefix_coverage(tile: &Tile, length: usize) -> Coverage {
    if tile.keys.start >= length {
        Coverage::Skip
    } else if tile.keys.end <= length {
        Coverage::Full
    } else {
        Coverage::Partial
    }
}

/// Which options a call has; [`Setting::new`] fills in the arrays.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Features {
    pub(crate) scale: Option<f64>,
    pub(crate) causal: bool,
    pub(crate) query_offset: Option<isize>,
    pub(crate) window: Window,
    pub(crate) softcap: Option<f64>,
    pub(crate) bias: Option<Broadcast>,
    /// Whether a part of the bias is -inf.
    pub(crate) bias_masks: bool,
    pub(crate) mask: Option<Broadcast>,
    pub(crate) key_lengths: bool,
    /// ALiBi slopes, and whether every batch entry has its own.
    pub(crate) alibi_slopes: Option<bool>,
    pub(crate) sinks: bool,
    /// Has no effect if there are more queries than keys.
    pub(crate) tree: bool,
    pub(crate) user_mask: UserMask,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            scale: None,
            causal: false,
            query_offset: None,
            window: Window::default(),
            softcap: None,
            bias: None,
            bias_masks: false,
            mask: None,
            key_lengths: false,
            alibi_slopes: None,
            sinks: false,
            tree: false,
            user_mask: UserMask::Everything,
        }
    }
}

/// Options that own their arrays.
#[derive(Debug, Clone)]
pub(crate) struct Setting<T: Element> {
    pub(crate) features: Features,
    pub(crate) bias: Option<ArrayD<T>>,
    pub(crate) mask: Option<ArrayD<bool>>,
    pub(crate) key_lengths: Option<Vec<usize>>,
    pub(crate) alibi_slopes: Option<Array2<T::Acc>>,
    pub(crate) sinks: Option<Vec<T::Acc>>,
    pub(crate) tree: Option<AncestorMask>,
}

impl<T: Element> Setting<T> {
    pub(crate) fn new(features: &Features, sizes: Sizes, seed: u64) -> Self {
        let Sizes { batch, n, m, .. } = sizes;
        let heads = sizes.heads();
        let mut seeded = Seeded::new(seed ^ 0x5e77_1465);
        let bias = features.bias.map(|broadcast| {
            let mut bias: ArrayD<T> = seeded.normal(broadcast.shape(sizes.scores()));
            if features.bias_masks {
                let hidden = |rng: &mut Seeded| rng.rng().random_bool(0.3);
                bias.map_inplace(|x| {
                    if hidden(&mut seeded) {
                        *x = T::from_f64(f64::NEG_INFINITY);
                    }
                });
            }
            bias
        });
        let mask = features.mask.map(|broadcast| {
            // A row of zeros now and then: nothing visible.
            let rows: ArrayD<f64> = seeded.uniform(broadcast.shape(sizes.scores()), 0.0..1.0);
            let mut mask = rows.mapv(|x| x < 0.6);
            for mut row in mask.rows_mut() {
                if seeded.rng().random_bool(0.1) {
                    row.fill(false);
                }
            }
            mask
        });
        let mut length = || seeded.rng().random_range(0..=m);
        let key_lengths = features.key_lengths.then(|| (0..batch).map(|_| length()).collect());
        let alibi_slopes = features.alibi_slopes.map(|each_entry| {
            seeded.uniform((if each_entry { batch } else { 1 }, heads), 0.0..0.1)
        });
        let sinks = features.sinks.then(|| {
            let mut sinks: Vec<T::Acc> = seeded.normal(heads).into_raw_vec_and_offset().0;
            if let Some(first) = sinks.first_mut() {
                *first = T::Acc::from_f64(f64::NEG_INFINITY);
            }
            sinks
        });
        let parent = |node: usize| seeded.rng().random_range(-1..node as i64);
        let tree = (features.tree && n <= m).then(|| {
            let parents: Vec<i64> = (0..n).map(parent).collect();
            AncestorMask::from_parents(&parents).unwrap()
        });
        let features = features.clone();
        Self { features, bias, mask, key_lengths, alibi_slopes, sinks, tree }
    }

    /// Those of a recorded case.
    pub(crate) fn recorded(case: &Case) -> Self {
        let mut features = Features::default();
        for (param, value) in case.params.as_object().unwrap() {
            match param.as_str() {
                "causal" => features.causal = value.as_bool().unwrap(),
                "scale" => features.scale = value.as_f64(),
                "softcap" => features.softcap = value.as_f64(),
                "window" => {
                    let sides = value.as_u64().map(|window| window as usize - 1);
                    features.window = Window { left: sides, right: sides };
                }
                _ => panic!("unknown parameter {param}"),
            }
        }
        let tree = case.get("in.tree_parents").map(|_| case.integers("in.tree_parents"));
        Self {
            features,
            bias: case.floats("in.bias"),
            mask: case.get("in.mask").map(|mask| mask.mapv(|x| x != 0.0)),
            key_lengths: case
                .get("in.kv_len")
                .map(|lengths| lengths.iter().map(|&x| x as usize).collect()),
            alibi_slopes: None,
            sinks: case.floats("in.sink").map(|sinks| sinks.into_raw_vec_and_offset().0),
            tree: tree.map(|parents| AncestorMask::from_parents(&parents).unwrap()),
        }
    }

    pub(crate) fn options(&self) -> Options<'_, T, &UserMask> {
        self.without_user_mask().with_user_mask(&self.features.user_mask)
    }

    pub(crate) fn without_user_mask(&self) -> Options<'_, T> {
        let features = &self.features;
        Options {
            scale: features.scale,
            causal: features.causal,
            query_offset: features.query_offset,
            window: features.window,
            softcap: features.softcap,
            bias: self.bias.as_ref().map(|bias| bias.view()),
            mask: self.mask.as_ref().map(|mask| mask.view()),
            key_lengths: self.key_lengths.as_deref(),
            alibi_slopes: self.alibi_slopes.as_ref().map(|slopes| slopes.view()),
            sinks: self.sinks.as_deref(),
            tree: self.tree.as_ref(),
            user_mask: NoMask,
        }
    }

    /// Which pairs are visible when all scores are finite, by the rules of [`Options`].
    pub(crate) fn visible(&self, sizes: Sizes) -> Array4<bool> {
        let Sizes { n, m, .. } = sizes;
        let features = &self.features;
        let Window { left, right } = features.window;
        let first = features.query_offset.unwrap_or(m as isize - n as isize) as i128;
        let mask = self.mask.as_ref().map(|mask| mask.broadcast(sizes.scores()).unwrap());
        let bias = self.bias.as_ref().map(|bias| bias.broadcast(sizes.scores()).unwrap());
        Array4::from_shape_fn(sizes.scores(), |(batch, head, query, key)| {
            let at = [batch, head, query, key];
            let (p, j) = (query as i128 + first, key as i128);
            (!features.causal || j <= p)
                && left.is_none_or(|left| p - j <= left as i128)
                && right.is_none_or(|right| j - p <= right as i128)
                && self.key_lengths.as_ref().is_none_or(|lengths| key < lengths[batch])
                && mask.is_none_or(|mask| mask[at])
                && bias.is_none_or(|bias| bias[at].to_f64() != f64::NEG_INFINITY)
                && self
                    .tree
                    .as_ref()
                    .is_none_or(|tree| key < m - n || tree.contains(query, key - (m - n)))
                && features.user_mask.visible(Pair { batch, head, query, key })
        })
    }
}
