//! Sizes and options that tests go through one by one.

use attn_flash::Window;

use crate::common::{Broadcast, Features, Sizes, UserMask};

/// Around the heights and widths of register tiles.
pub(crate) const HEAD_SIZES: [usize; 10] = [1, 3, 16, 40, 59, 64, 80, 111, 128, 257];

/// For what does not depend on them.
pub(crate) const FEW_SIZES: [Sizes; 5] = [
    Sizes { batch: 2, key_heads: 2, group: 2, n: 13, m: 37, d: 16, e: 8 },
    Sizes { batch: 1, key_heads: 1, group: 3, n: 45, m: 33, d: 7, e: 20 },
    Sizes { batch: 3, key_heads: 1, group: 1, n: 1, m: 97, d: 40, e: 40 },
    Sizes { batch: 1, key_heads: 1, group: 1, n: 70, m: 129, d: 24, e: 17 },
    Sizes { batch: 1, key_heads: 1, group: 2, n: 40, m: 270, d: 16, e: 16 },
];

/// Every option by itself, several ways where there are several.
pub(crate) fn options() -> Vec<Features> {
    let plain = Features::default;
    let causal = |query_offset| Features { causal: true, query_offset, ..plain() };
    let window = |left, right| Features { window: Window { left, right }, ..plain() };
    let user_mask = |user_mask| Features { user_mask, ..plain() };
    let mut all = vec![
        plain(),
        Features { scale: Some(0.4), ..plain() },
        Features { scale: Some(0.0), ..plain() },
        Features { scale: Some(-0.2), ..plain() },
        causal(None),
        causal(Some(0)),
        causal(Some(-9)),
        causal(Some(17)),
        causal(Some(isize::MIN)),
        window(Some(0), Some(0)),
        window(Some(6), None),
        window(None, Some(6)),
        Features { query_offset: Some(3), ..window(Some(2), Some(4)) },
        Features { causal: true, ..window(Some(20), Some(5)) },
        Features { softcap: Some(1.5), ..plain() },
        Features { softcap: Some(30.0), ..plain() },
        Features { key_lengths: true, ..plain() },
        Features { alibi_slopes: Some(false), ..plain() },
        Features { alibi_slopes: Some(true), query_offset: Some(-5), ..plain() },
        Features { sinks: true, ..plain() },
        Features { tree: true, ..plain() },
        user_mask(UserMask::Documents { length: 29, first_query: 0 }),
        user_mask(UserMask::Dilated(3)),
        user_mask(UserMask::Prefix(45)),
        user_mask(UserMask::Prefix(0)),
    ];
    for broadcast in Broadcast::ALL {
        all.push(Features { bias: Some(broadcast), ..plain() });
        all.push(Features { bias: Some(broadcast), bias_masks: true, ..plain() });
        all.push(Features { mask: Some(broadcast), ..plain() });
    }
    all
}

/// Sets the options of `b` that are not the default on top of those of `a`.
pub(crate) fn combine(a: &Features, b: &Features) -> Features {
    let plain = Features::default();
    Features {
        scale: b.scale.or(a.scale),
        causal: a.causal || b.causal,
        query_offset: b.query_offset.or(a.query_offset),
        window: if b.window == plain.window { a.window } else { b.window },
        softcap: b.softcap.or(a.softcap),
        bias: b.bias.or(a.bias),
        bias_masks: a.bias_masks || b.bias_masks,
        mask: b.mask.or(a.mask),
        key_lengths: a.key_lengths || b.key_lengths,
        alibi_slopes: b.alibi_slopes.or(a.alibi_slopes),
        sinks: a.sinks || b.sinks,
        tree: a.tree || b.tree,
        user_mask: if b.user_mask == plain.user_mask { &a.user_mask } else { &b.user_mask }.clone(),
    }
}
