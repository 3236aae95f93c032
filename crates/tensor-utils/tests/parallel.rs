//! Fixed-order parallelism: the same bits on any number of threads.

use proptest::prelude::*;
use tensor_utils::testing::{Seeded, in_pool, property_cases, thread_counts};
use tensor_utils::{for_each_chunk, map_chunks_ordered};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(property_cases(64)))]

    #[test]
    fn chunks_are_fixed_and_merged_in_order(len in 0_usize..300, chunk in 0_usize..40) {
        let merge = |mut left: Vec<_>, mut right| { left.append(&mut right); left };
        let got = map_chunks_ordered(len, chunk, |range| vec![range], merge).unwrap_or_default();
        let step = chunk.max(1);
        let want: Vec<_> = (0..len).step_by(step).map(|i| i..len.min(i + step)).collect();
        prop_assert_eq!(got, want);
    }

    #[test]
    fn every_element_is_in_one_part(len in 0_usize..300, chunk in 0_usize..40) {
        let mut data: Vec<usize> = (0..len).collect();
        for_each_chunk(&mut data, chunk, |index, part| {
            assert!(!part.is_empty() && part.len() <= chunk.max(1));
            for (i, x) in part.iter_mut().enumerate() {
                assert_eq!(*x, index * chunk.max(1) + i);
                *x += 1000;
            }
        });
        prop_assert_eq!(data, (1000..1000 + len).collect::<Vec<_>>());
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    // Under Miri fewer, since it takes a second for a million steps.
    let (len, repeats) = if cfg!(miri) { (1003, 1) } else { (100_003, 20) };
    let x = Seeded::new(1).normal::<f32, _>(len).into_raw_vec_and_offset().0;
    let sum = || {
        let part = |range: std::ops::Range<usize>| x[range].iter().sum::<f32>();
        map_chunks_ordered(x.len(), 37, part, |left, right| left + right).unwrap()
    };
    let want = in_pool(1, sum).to_bits();
    for threads in thread_counts() {
        // Work is stolen differently every time.
        for _ in 0..repeats {
            assert_eq!(in_pool(threads, sum).to_bits(), want, "{threads} threads");
        }
    }
}

#[test]
fn largest_lengths() {
    let half = 1 << (usize::BITS - 1);
    for (chunk, want) in [
        (half, "0..half half..MAX"),
        (usize::MAX - 1, "0..MAX-1 MAX-1..MAX"),
        (usize::MAX, "0..MAX"),
    ] {
        let name = |at: usize| match at {
            usize::MAX => "MAX".to_owned(),
            at if at == half => "half".to_owned(),
            at if at == usize::MAX - 1 => "MAX-1".to_owned(),
            at => at.to_string(),
        };
        let map =
            |range: std::ops::Range<usize>| format!("{}..{}", name(range.start), name(range.end));
        let merge = |left, right| format!("{left} {right}");
        assert_eq!(map_chunks_ordered(usize::MAX, chunk, map, merge).unwrap(), want);
    }
}

#[test]
fn tree_depends_on_the_number_of_chunks_alone() {
    let tree = |chunks| {
        let merge = |left: String, right: String| format!("({left} {right})");
        map_chunks_ordered(chunks, 1, |range| range.start.to_string(), merge).unwrap()
    };
    for threads in thread_counts() {
        assert_eq!(in_pool(threads, || tree(3)), "((0 1) 2)");
        assert_eq!(in_pool(threads, || tree(7)), "(((0 1) (2 3)) ((4 5) 6))");
    }
}

#[test]
#[cfg_attr(miri, ignore = "a million steps take minutes")]
fn sum_over_a_million_rows_is_as_good_as_f64() {
    // Rows of one element, in chunks of 64: the error of an f32 sum in order grows a hundredfold.
    let x = Seeded::new(2).uniform::<f32, _>(1_000_000, 0.0..1.0).into_raw_vec_and_offset().0;
    let exact: f64 = x.iter().map(|&x| f64::from(x)).sum();
    let part = |range: std::ops::Range<usize>| x[range].iter().sum::<f32>();
    let sum = map_chunks_ordered(x.len(), 64, part, |left, right| left + right).unwrap();
    let error = (f64::from(sum) - exact).abs() / exact;
    assert!(error < 4.0 * f64::from(f32::EPSILON), "{error:e}");
    let in_order = x.iter().sum::<f32>();
    assert!((f64::from(in_order) - exact).abs() / exact > 100.0 * error);
}
