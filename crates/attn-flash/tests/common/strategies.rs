//! Random sizes and options.

use attn_flash::Window;
use proptest::option::weighted;
use proptest::prelude::*;
use proptest::sample::select;

use crate::common::{Broadcast, Features, Sizes, UserMask};

pub(crate) fn sizes() -> impl Strategy<Value = Sizes> {
    let queries = prop_oneof![0..4_usize, 4..30_usize, 30..100_usize];
    let keys = prop_oneof![0..4_usize, 4..70_usize, 70..300_usize];
    let size = || prop_oneof![4 => 1..24_usize, 1 => 24..80_usize];
    (1..3_usize, 1..3_usize, 1..4_usize, queries, keys, size(), size()).prop_map(
        |(batch, key_heads, group, n, m, d, e)| Sizes { batch, key_heads, group, n, m, d, e },
    )
}

fn user_masks() -> impl Strategy<Value = UserMask> {
    prop_oneof![
        3 => Just(UserMask::Everything),
        1 => (1..90_usize, 0..90_usize)
            .prop_map(|(length, first_query)| UserMask::Documents { length, first_query }),
        1 => (1..5_usize).prop_map(UserMask::Dilated),
        1 => (0..300_usize).prop_map(UserMask::Prefix),
        1 => (0..60_usize).prop_map(UserMask::Growing),
    ]
}

/// Any subset of the options.
pub(crate) fn features() -> impl Strategy<Value = Features> {
    let window = (weighted(0.2, 0..80_usize), weighted(0.2, 0..80_usize))
        .prop_map(|(left, right)| Window { left, right });
    let positions = (any::<bool>(), weighted(0.2, -40..300_isize), window);
    let scores = (
        weighted(0.2, -0.5..0.5_f64),
        weighted(0.2, 0.5..20.0_f64),
        weighted(0.3, select(&Broadcast::ALL[..])),
        any::<bool>(),
        weighted(0.2, any::<bool>()),
    );
    let masks = (
        weighted(0.2, select(&Broadcast::ALL[..])),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
        user_masks(),
    );
    (positions, scores, masks).prop_map(|(positions, scores, masks)| {
        let (causal, query_offset, window) = positions;
        let (scale, softcap, bias, bias_masks, alibi_slopes) = scores;
        let (mask, key_lengths, sinks, tree, user_mask) = masks;
        Features {
            scale,
            causal,
            query_offset,
            window,
            softcap,
            bias,
            bias_masks,
            mask,
            key_lengths,
            alibi_slopes,
            sinks,
            tree,
            user_mask,
        }
    })
}
