//! Every error names what is wrong, and changes nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use kvcache::{
    Cache, Config, Error, Layout, Options, Queries, Rows, Storage, Window, attend_reference,
};
use ndarray::Array3;

fn rows(n: usize) -> Array3<f32> {
    Array3::ones((n, 2, 8))
}

fn cache(config: Config) -> Cache {
    Cache::new(&config).unwrap()
}

fn small() -> Config {
    Config { page_size: 4, layout: Layout::Paged { pages: 3 }, ..Config::new(1, 2, 8) }
}

#[test]
fn configurations() {
    for (config, option) in [
        (Config::new(0, 2, 8), "layers"),
        (Config::new(1, 0, 8), "key_heads"),
        (Config::new(1, 2, 0), "head_size"),
        (Config { value_size: 0, ..small() }, "value_size"),
        (Config { page_size: 0, ..small() }, "page_size"),
        (Config { window: Some(Window { size: 0, sinks: 3 }), ..small() }, "window"),
        (Config { layout: Layout::Paged { pages: usize::MAX }, ..small() }, "layout.pages"),
        (
            Config { layout: Layout::Contiguous { sequences: 1 << 30, capacity: 100 }, ..small() },
            "layout.capacity",
        ),
        (
            Config { layout: Layout::Contiguous { sequences: usize::MAX, capacity: 0 }, ..small() },
            "layout.sequences",
        ),
    ] {
        let error = Cache::new(&config).unwrap_err();
        assert!(error.to_string().contains(&format!("`{option}`")), "{error}");
    }
    let huge = Layout::Paged { pages: 1 << 31 };
    let error = Cache::new(&Config { layout: huge, ..Config::new(1, 1 << 20, 1 << 20) });
    assert!(matches!(error, Err(Error::Shape(_))), "{error:?}");
}

#[test]
fn room() {
    let mut cache = cache(small());
    let seq = cache.create().unwrap();
    cache.append(0, seq, rows(12).view(), rows(12).view()).unwrap();
    let before = cache.stats();
    let error = cache.append(0, seq, rows(1).view(), rows(1).view()).unwrap_err();
    assert_eq!(error, Error::OutOfPages { needed: 1, available: 0, total: 3 });
    assert_eq!(cache.stats(), before);

    let layout = Layout::Contiguous { sequences: 1, capacity: 6 };
    let mut cache = self::cache(Config { layout, ..small() });
    let seq = cache.create().unwrap();
    assert_eq!(cache.create(), Err(Error::OutOfRegions { total: 1 }));
    assert_eq!(cache.fork(seq), Err(Error::OutOfRegions { total: 1 }));
    // Regions are whole pages.
    let error = cache.append(0, seq, rows(9).view(), rows(9).view()).unwrap_err();
    assert_eq!(error, Error::RegionFull { sequence: seq, rows: 9, capacity: 8 });
    assert!(matches!(cache.match_prefix(0, &[1, 2]), Err(Error::NeedsPages { .. })));
    assert!(matches!(cache.register_prefix(seq, 0, &[]), Err(Error::NeedsPages { .. })));
    cache.check_invariants().unwrap();
}

#[test]
fn handles() {
    let mut one = cache(small());
    let mut other = cache(small());
    let seq = one.create().unwrap();
    assert_eq!(other.free(seq), Err(Error::UnknownSequence(seq)));
    one.free(seq).unwrap();
    assert_eq!(one.free(seq), Err(Error::UnknownSequence(seq)));
    let reused = one.create().unwrap();
    assert_ne!(reused, seq);
    assert_eq!(one.len(seq), Err(Error::UnknownSequence(seq)));
    assert_eq!(one.len(reused), Ok(0));
}

#[test]
fn rows_that_do_not_fit() {
    let mut cache = cache(Config { layers: 2, ..small().stored_as(Storage::Int8) });
    let seq = cache.create().unwrap();
    let wrong = Array3::<f32>::ones((1, 2, 7));
    assert!(matches!(cache.append(0, seq, wrong.view(), rows(1).view()), Err(Error::Shape(_))));
    assert!(matches!(cache.append(0, seq, rows(1).view(), rows(2).view()), Err(Error::Shape(_))));
    let error = cache.append(2, seq, rows(1).view(), rows(1).view()).unwrap_err();
    assert!(error.to_string().starts_with("`layer` is 2"), "{error}");
    let mut nan = rows(3);
    nan[[2, 1, 5]] = f32::NAN;
    let error = cache.append(0, seq, rows(3).view(), nan.view()).unwrap_err();
    assert!(error.to_string().contains("`v` has NaN at row 2, head 1, element 5"), "{error}");
    assert_eq!(cache.layer_len(0, seq), Ok(0));

    cache.append(0, seq, rows(3).view(), rows(3).view()).unwrap();
    assert_eq!((cache.len(seq), cache.layer_len(0, seq)), (Ok(0), Ok(3)));
    let uneven = Error::UnevenLayers { sequence: seq, shortest: 0, longest: 3 };
    assert_eq!(cache.fork(seq), Err(uneven.clone()));
    assert_eq!(cache.compact(seq, 0, &[]), Err(uneven));
    cache.truncate(seq, 0).unwrap();
    assert_eq!(cache.layer_len(0, seq), Ok(0));
    cache.check_invariants().unwrap();
}

#[test]
fn what_cannot_be_undone() {
    let mut quantised = cache(Config { residual: 0, ..small().stored_as(Storage::Int4) });
    let seq = quantised.create().unwrap();
    for _ in 0..9 {
        quantised.append(0, seq, rows(1).view(), rows(1).view()).unwrap();
    }
    let before = quantised.stats();
    let error = quantised.truncate(seq, 3).unwrap_err();
    assert!(matches!(error, Error::Irreversible { exact_from: 8, .. }), "{error}");
    assert!(matches!(quantised.compact(seq, 3, &[1]), Err(Error::Irreversible { .. })));
    assert_eq!(quantised.stats(), before);
    quantised.truncate(seq, 4).unwrap();

    let window = Some(Window { size: 2, sinks: 0 });
    let mut windowed = cache(Config { window, ..small() });
    let seq = windowed.create().unwrap();
    for _ in 0..50 {
        windowed.append(0, seq, rows(1).view(), rows(1).view()).unwrap();
        assert!(windowed.stats().live <= 2);
    }
    assert!(matches!(windowed.truncate(seq, 30), Err(Error::Irreversible { .. })));
    windowed.truncate(seq, 49).unwrap();
    assert!(windowed.page_tables(&[seq]).is_err());
    assert!(windowed.read(0, seq, 0, 1).is_err());
}

#[test]
fn edits_out_of_range() {
    let mut cache = cache(small());
    let seq = cache.create().unwrap();
    cache.append(0, seq, rows(5).view(), rows(5).view()).unwrap();
    for error in [
        cache.truncate(seq, 6).unwrap_err(),
        cache.compact(seq, 6, &[]).unwrap_err(),
        cache.compact(seq, 3, &[2]).unwrap_err(),
        cache.compact(seq, 0, &[1, 1]).unwrap_err(),
        cache.compact(seq, 0, &[2, 1]).unwrap_err(),
        cache.register_prefix(seq, 0, &[1]).unwrap_err(),
        cache.read(0, seq, 3, 3).unwrap_err(),
        cache.read(0, seq, 3, usize::MAX).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Option { .. }), "{error}");
    }
}

#[test]
fn attention() {
    let mut cache = cache(small());
    let seq = cache.create().unwrap();
    cache.append(0, seq, rows(5).view(), rows(5).view()).unwrap();
    let q = Array3::<f32>::ones((2, 4, 8));
    let call = |q: &Array3<f32>, queries: Queries<'_>, options: Options| {
        cache.attend(0, q.view(), &[queries], &options).unwrap_err().to_string()
    };
    let plain = Options::default();
    for (got, named) in [
        (call(&Array3::ones((2, 3, 8)), Queries::last(seq, 2), plain), "`q`"),
        (call(&Array3::ones((2, 4, 9)), Queries::last(seq, 2), plain), "`q`"),
        (call(&q, Queries::last(seq, 3), plain), "`q`"),
        (call(&Array3::ones((6, 4, 8)), Queries::last(seq, 6), plain), "`batch`"),
        (call(&q, Queries::tree(seq, &[-1, 1]), plain), "`parents`"),
        (call(&q, Queries::tree(seq, &[-1, -2]), plain), "`parents`"),
        (call(&q, Queries::last(seq, 2), Options { scale: Some(f64::NAN), ..plain }), "`scale`"),
        (call(&q, Queries::last(seq, 2), Options { scale: Some(1e39), ..plain }), "`scale`"),
        (call(&q, Queries::last(seq, 2), Options { softcap: Some(0.0), ..plain }), "`softcap`"),
        (call(&q, Queries::last(seq, 2), Options { softcap: Some(1e39), ..plain }), "`softcap`"),
        (call(&q, Queries::last(seq, 2), Options { softcap: Some(1e-46), ..plain }), "`softcap`"),
        (
            call(
                &q,
                Queries::last(seq, 2),
                Options { window: Some(Window { size: 0, sinks: 0 }), ..plain },
            ),
            "`window`",
        ),
    ] {
        assert!(got.contains(named), "{got} does not name {named}");
    }
    assert!(cache.attend(1, q.view(), &[Queries::last(seq, 2)], &plain).is_err());
}

#[test]
fn heads_not_divisible() {
    let mut cache = cache(small());
    let seq = cache.create().unwrap();
    cache.append(0, seq, rows(5).view(), rows(5).view()).unwrap();
    let error = |heads| {
        let q = Array3::<f32>::ones((1, heads, 8));
        cache.attend(0, q.view(), &[Queries::last(seq, 1)], &Options::default()).unwrap_err()
    };
    for heads in [1, 3, 5] {
        assert_eq!(error(heads), Error::HeadsNotDivisible { query_heads: heads, key_heads: 2 });
    }
    let expected = "`q` has 3 heads and the cache has 2: \
        the number of query heads must be a multiple of the number of key/value heads";
    assert_eq!(error(3).to_string(), expected);
    assert!(matches!(error(0), Error::Shape(_)), "{}", error(0));
}

/// The oracle refuses what [`Cache::attend`] refuses.
#[test]
fn oracle() {
    let plain = Options::default();
    let none = Window { size: 0, sinks: 1 };
    let tree = Rows::Tree;
    for (heads, rows, options, window, named) in [
        (3, Rows::Last(2), plain, None, "`q`"),
        (0, Rows::Last(2), plain, None, "`q`"),
        (4, Rows::Last(1), plain, None, "`q`"),
        (4, Rows::Last(5), plain, None, "`q`"),
        (4, tree(&[-1]), plain, None, "`q`"),
        (4, tree(&[-1, 0, 1]), plain, None, "`q`"),
        (4, tree(&[0, -1]), plain, None, "`parents`"),
        (4, tree(&[1, 0]), plain, None, "`parents`"),
        (4, tree(&[-1, -2]), plain, None, "`parents`"),
        (4, Rows::Last(2), plain, Some(none), "`window`"),
        (4, Rows::Last(2), Options { window: Some(none), ..plain }, None, "`window`"),
        (4, Rows::Last(2), Options { scale: Some(f64::INFINITY), ..plain }, None, "`scale`"),
        (4, Rows::Last(2), Options { softcap: Some(0.0), ..plain }, None, "`softcap`"),
        (4, Rows::Last(2), Options { softcap: Some(1e39), ..plain }, None, "`softcap`"),
    ] {
        let q = Array3::<f32>::ones((2, heads, 8));
        let k = self::rows(5);
        let result = attend_reference(q.view(), k.view(), k.view(), rows, &options, window);
        let error = result.unwrap_err().to_string();
        assert!(error.contains(named), "{error} does not name {named}");
    }
    for (q, k, named) in [
        (Array3::<f32>::ones((6, 4, 8)), rows(5), "`rows`"),
        (Array3::ones((1, 4, 8)), Array3::ones((5, 0, 8)), "`k`"),
        (Array3::ones((1, 4, 0)), Array3::ones((5, 2, 0)), "`k`"),
        (Array3::ones((1, 4, 9)), rows(5), "`k`"),
    ] {
        let last = Rows::Last(q.dim().0);
        let result = attend_reference(q.view(), k.view(), k.view(), last, &plain, None);
        let error = result.unwrap_err().to_string();
        assert!(error.contains(named), "{error} does not name {named}");
    }
}

/// What a window has released is never read, whichever query asks for it: one behind the sinks, or one whose
/// own window has more of them.
#[test]
fn released_rows() {
    let windowed = |size, sinks| {
        let mut cache = cache(Config { window: Some(Window { size, sinks }), ..small() });
        let seq = cache.create().unwrap();
        for _ in 0..50 {
            cache.append(0, seq, rows(1).view(), rows(1).view()).unwrap();
        }
        (cache, seq)
    };
    let attend = |(cache, seq): &(Cache, _), queries, window| {
        let q = Array3::<f32>::ones((queries, 2, 8));
        let options = Options { window, ..Options::default() };
        cache.attend(0, q.view(), &[Queries::last(*seq, queries)], &options)
    };
    let with_sinks = windowed(2, 4);
    let error = attend(&with_sinks, 45, None).unwrap_err();
    assert!(matches!(error, Error::Released { row: 4, position: 5, .. }), "{error}");
    let error = attend(&with_sinks, 50, None).unwrap_err();
    assert!(matches!(error, Error::Released { row: 4, position: 4, .. }), "{error}");
    attend(&with_sinks, 1, None).unwrap();

    let without = windowed(6, 0);
    attend(&without, 1, None).unwrap();
    let error = attend(&without, 5, None).unwrap_err();
    assert!(matches!(error, Error::Released { row: 40, position: 45, .. }), "{error}");
    // Of a narrower window, but for sinks.
    attend(&without, 5, Some(Window { size: 1, sinks: 0 })).unwrap();
    let error = attend(&without, 5, Some(Window { size: 1, sinks: 1000 })).unwrap_err();
    assert!(matches!(error, Error::Released { row: 40, position: 45, .. }), "{error}");
}

/// A residual without end keeps all rows in full precision.
#[test]
fn a_residual_without_end() {
    let config = Config { residual: usize::MAX, ..small().stored_as(Storage::Int4) };
    let mut cache = cache(config);
    let seq = cache.create().unwrap();
    let x = Array3::from_shape_fn((12, 2, 8), |(row, head, i)| (row * 31 + head * 7 + i) as f32);
    for row in 0..12 {
        let row = x.slice(ndarray::s![row..row + 1, .., ..]);
        cache.append(0, seq, row, row).unwrap();
    }
    assert_eq!(cache.read(0, seq, 0, 12), Ok((x.clone(), x)));
}

/// Sequences that share their last page copy it once less than there are of them.
#[test]
fn a_batch_in_a_pool_that_is_nearly_full() {
    let layout = Layout::Paged { pages: 2 };
    let mut cache = cache(Config { layout, ..small() });
    let first = cache.create().unwrap();
    cache.append(0, first, rows(2).view(), rows(2).view()).unwrap();
    let second = cache.fork(first).unwrap();
    cache.append_batch(0, &[first, second], &[1, 1], rows(2).view(), rows(2).view()).unwrap();
    cache.check_invariants().unwrap();
    assert_eq!(cache.stats().live, 2);
    let third = cache.fork(first).unwrap();
    let full = Err(Error::OutOfPages { needed: 1, available: 0, total: 2 });
    assert_eq!(
        cache.append_batch(0, &[first, third], &[1, 1], rows(2).view(), rows(2).view()),
        full
    );
    cache.check_invariants().unwrap();
}
