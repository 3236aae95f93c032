//! What must not change a bit of the result: pages and their order, chunks of the prompt, neighbours in
//! the batch, threads, and whether the nodes of a tree are decoded together or one by one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use kvcache::{
    Attention, Cache, Config, Error, Layout, Options, PageTables, Queries, SeqId, Storage, Window,
};
use ndarray::{Array3, Array4, ArrayView3, Axis, concatenate, s};
use tensor_utils::bf16;
use tensor_utils::testing::{Seeded, in_pool, isas};

/// Two chunks of 1024 positions and a part of a block.
const LEN: usize = 1150;
/// Queries, the last rows of the sequence.
const QUERIES: usize = 70;
const KEY_HEADS: usize = 2;
const HEADS: usize = 6;
const SIZE: usize = 40;

/// One sequence and its queries.
struct Rows {
    q: Array3<f32>,
    k: Array3<f32>,
    v: Array3<f32>,
}

impl Rows {
    fn new(seed: u64) -> Self {
        let seeded = &mut Seeded::new(seed);
        Self {
            q: seeded.normal((QUERIES, HEADS, SIZE)),
            k: seeded.normal((LEN, KEY_HEADS, SIZE)),
            v: seeded.normal((LEN, KEY_HEADS, SIZE)),
        }
    }

    /// Appends rows `from..to`.
    fn append(&self, cache: &mut Cache, seq: SeqId, from: usize, to: usize) {
        cache
            .append(0, seq, self.k.slice(s![from..to, .., ..]), self.v.slice(s![from..to, .., ..]))
            .unwrap();
    }
}

fn config(storage: Storage, page_size: usize) -> Config {
    let layout = Layout::Paged { pages: 5 * LEN.div_ceil(page_size) + 40 };
    Config { page_size, layout, ..Config::new(1, KEY_HEADS, SIZE) }.stored_as(storage)
}

/// A cache with the rows in one piece.
fn whole(config: &Config, rows: &Rows) -> (Cache, SeqId) {
    let mut cache = Cache::new(config).unwrap();
    let seq = cache.create().unwrap();
    rows.append(&mut cache, seq, 0, LEN);
    (cache, seq)
}

/// Attention of the queries as they are, and of the same in bf16, which has a product of its own: the outputs
/// side by side.
fn attend(
    cache: &Cache,
    q: ArrayView3<'_, f32>,
    batch: &[Queries<'_>],
    options: &Options,
) -> Attention<f32> {
    let own = cache.attend(0, q, batch, options).unwrap();
    let rounded = cache.attend(0, q.mapv(bf16::from_f32).view(), batch, options).unwrap();
    Attention {
        o: concatenate![Axis(2), own.o, rounded.o.mapv(bf16::to_f32)],
        lse: concatenate![Axis(1), own.lse, rounded.lse],
    }
}

fn assert_same_bits(got: &Attention<f32>, want: &Attention<f32>, what: &str) {
    let bits =
        |a: &Attention<f32>| a.o.iter().chain(&a.lse).map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(bits(got) == bits(want), "{what}");
}

/// Calls `check` for each storage and instruction set, with the result for the whole sequence.
fn for_each(storages: &[Storage], check: impl Fn(Storage, &Options, &Rows, &Attention<f32>)) {
    let rows = Rows::new(1);
    for &storage in storages {
        let (cache, seq) = whole(&config(storage, 64), &rows);
        for isa in isas() {
            let options = Options { isa: Some(isa), ..Options::default() };
            let want = attend(&cache, rows.q.view(), &[Queries::last(seq, QUERIES)], &options);
            check(storage, &options, &rows, &want);
        }
    }
}

#[test]
fn page_sizes_of_floats() {
    for_each(&[Storage::F32, Storage::Bf16, Storage::F16], |storage, options, rows, want| {
        for page_size in [1, 7, 16, 24, 32, 80, 128, 200, 2000] {
            let (cache, seq) = whole(&config(storage, page_size), rows);
            let got = attend(&cache, rows.q.view(), &[Queries::last(seq, QUERIES)], options);
            assert_same_bits(&got, want, &format!("{storage:?}, pages of {page_size}"));
        }
    });
}

/// Pages taken in turn with another sequence, from a list that frees have shuffled.
#[test]
fn physical_order_of_pages() {
    for_each(&Storage::ALL, |storage, options, rows, want| {
        let mut cache = Cache::new(&config(storage, 64)).unwrap();
        let other = Rows::new(2);
        let fillers = [1, 2, 3, 1, 2].map(|pages| {
            let seq = cache.create().unwrap();
            other.append(&mut cache, seq, 0, pages * 64);
            seq
        });
        for filler in [3, 0, 4, 2] {
            cache.free(fillers[filler]).unwrap();
        }
        let (seq, neighbour) = (cache.create().unwrap(), cache.create().unwrap());
        for start in (0..LEN).step_by(64) {
            let end = LEN.min(start + 64);
            rows.append(&mut cache, seq, start, end);
            other.append(&mut cache, neighbour, start, end);
        }
        let tables = cache.page_tables(&[seq]).unwrap();
        let ordered = tables.kv_indices.windows(2).filter(|pair| pair[0] + 1 == pair[1]).count();
        assert!(ordered < tables.kv_indices.len() / 2, "the pages are in order: {tables:?}");
        let got = attend(&cache, rows.q.view(), &[Queries::last(seq, QUERIES)], options);
        assert_same_bits(&got, want, &format!("{storage:?}"));
    });
}

/// A prompt appended and attended chunk by chunk has the bits of one that came whole.
#[test]
fn chunked_prefill() {
    for_each(&Storage::ALL, |storage, options, rows, want| {
        for chunk in [1, 3, 33, 64] {
            let mut cache = Cache::new(&config(storage, 64)).unwrap();
            let seq = cache.create().unwrap();
            let first = LEN - QUERIES;
            for start in (0..first).step_by(7 * chunk + 1) {
                rows.append(&mut cache, seq, start, first.min(start + 7 * chunk + 1));
            }
            let mut parts = Vec::new();
            for start in (first..LEN).step_by(chunk) {
                let end = LEN.min(start + chunk);
                rows.append(&mut cache, seq, start, end);
                let q = rows.q.slice(s![start - first..end - first, .., ..]);
                parts.push(attend(&cache, q, &[Queries::last(seq, end - start)], options));
            }
            let o: Vec<_> = parts.iter().map(|part| part.o.view()).collect();
            let lse: Vec<_> = parts.iter().map(|part| part.lse.view()).collect();
            let got = Attention {
                o: concatenate(Axis(0), &o).unwrap(),
                lse: concatenate(Axis(0), &lse).unwrap(),
            };
            assert_same_bits(&got, want, &format!("{storage:?}, chunks of {chunk}"));
        }
    });
}

/// Alone, among sequences of its own pages, among forks that share them, and on any number of threads.
#[test]
fn neighbours_and_threads() {
    for_each(&Storage::ALL, |storage, options, rows, want| {
        let (mut cache, seq) = whole(&config(storage, 64), rows);
        let other = Rows::new(3);
        let stranger = cache.create().unwrap();
        other.append(&mut cache, stranger, 0, 700);
        let forks = [(); 9].map(|()| cache.fork(seq).unwrap());
        other.append(&mut cache, forks[2], 700, 701);
        for neighbours in [&[][..], &[stranger], &forks, &[stranger, forks[2], forks[5]]] {
            for count in [1, QUERIES] {
                let mut batch: Vec<_> =
                    neighbours.iter().map(|&seq| Queries::last(seq, count)).collect();
                let place = batch.len() / 2;
                batch.insert(place, Queries::last(seq, count));
                let own = rows.q.slice(s![QUERIES - count.., .., ..]);
                let foreign = other.q.slice(s![..count, .., ..]);
                let q: Vec<_> =
                    (0..batch.len()).map(|i| if i == place { own } else { foreign }).collect();
                let q = concatenate(Axis(0), &q).unwrap();
                let want = Attention {
                    o: want.o.slice(s![QUERIES - count.., .., ..]).to_owned(),
                    lse: want.lse.slice(s![QUERIES - count.., ..]).to_owned(),
                };
                for threads in [1, 2, 3, 7] {
                    let got = in_pool(threads, || attend(&cache, q.view(), &batch, options));
                    let at = place * count;
                    let got = Attention {
                        o: got.o.slice(s![at..at + count, .., ..]).to_owned(),
                        lse: got.lse.slice(s![at..at + count, ..]).to_owned(),
                    };
                    let among = neighbours.len();
                    let what = format!(
                        "{storage:?}, {count} queries, {among} neighbours, {threads} threads"
                    );
                    assert_same_bits(&got, &want, &what);
                }
            }
        }
    });
}

/// A tree next to a sequence that has the same pages, whose rows are no tree: one batch, either order.
#[test]
fn a_tree_beside_a_sequence_on_the_same_pages() {
    beside(&config(Storage::F32, 64), LEN, &[-1, 0, 0, 1]);
    // The page at the end of the first chunk is quantised for the sequence and not for the tree, which begins
    // behind the chunk and before the page ends.
    let chain: Vec<i64> = (-1..19).collect();
    beside(&Config { residual: 0, ..config(Storage::Int8, 80) }, 1050, &chain);
}

fn beside(config: &Config, len: usize, parents: &[i64]) {
    let (rows, last) = (Rows::new(3), 3);
    let mut cache = Cache::new(config).unwrap();
    let seq = cache.create().unwrap();
    rows.append(&mut cache, seq, 0, len);
    let fork = cache.fork(seq).unwrap();
    let q = rows.q.slice(s![..parents.len() + last, .., ..]);
    let (of_tree, of_fork) = q.split_at(Axis(0), parents.len());
    let (tree, plain) = (Queries::tree(seq, parents), Queries::last(fork, last));
    let options = Options::default();
    let alone =
        [attend(&cache, of_tree, &[tree], &options), attend(&cache, of_fork, &[plain], &options)];
    let join = |a: &Attention<f32>, b: &Attention<f32>| Attention {
        o: concatenate![Axis(0), a.o, b.o],
        lse: concatenate![Axis(0), a.lse, b.lse],
    };
    let [a, b] = &alone;
    let together = attend(&cache, q, &[tree, plain], &options);
    assert_same_bits(&together, &join(a, b), "tree first");
    let q = concatenate![Axis(0), of_fork, of_tree];
    let together = attend(&cache, q.view(), &[plain, tree], &options);
    assert_same_bits(&together, &join(b, a), "sequence first");
}

/// Each node of a tree has the bits of its path decoded token by token.
#[test]
fn nodes_of_a_tree() {
    let parents = [-1, 0, 1, 1, 0, 4, -1, 6, 3, 8, 2, 10, 11, 9, 7];
    let rows = Rows::new(4);
    // The tree begins in the middle of a block, with a block and with a chunk.
    for base in [1000, 1024 + 64, 1024, 1010] {
        for storage in Storage::ALL {
            let start = LEN - parents.len();
            let mut cache = Cache::new(&config(storage, 64)).unwrap();
            let seq = cache.create().unwrap();
            rows.append(&mut cache, seq, 0, base);
            let prompt = cache.fork(seq).unwrap();
            rows.append(&mut cache, seq, start, LEN);
            let q = rows.q.slice(s![..parents.len(), .., ..]);
            for isa in isas() {
                let options = Options { isa: Some(isa), ..Options::default() };
                let tree = attend(&cache, q, &[Queries::tree(seq, &parents)], &options);
                for node in 0..parents.len() {
                    let mut path = vec![node];
                    while let Ok(parent) = usize::try_from(parents[path[path.len() - 1]]) {
                        path.push(parent);
                    }
                    let alone = cache.fork(prompt).unwrap();
                    for &node in path.iter().rev() {
                        rows.append(&mut cache, alone, start + node, start + node + 1);
                    }
                    let q = q.slice(s![node..=node, .., ..]);
                    let want = attend(&cache, q, &[Queries::last(alone, 1)], &options);
                    let got = Attention {
                        o: tree.o.slice(s![node..=node, .., ..]).to_owned(),
                        lse: tree.lse.slice(s![node..=node, ..]).to_owned(),
                    };
                    assert_same_bits(
                        &got,
                        &want,
                        &format!("{storage:?}, node {node} after {base}"),
                    );
                    cache.free(alone).unwrap();
                }
            }
        }
    }
}

/// Of quantised storage a sequence is cut off only where it goes on with the bits of one that never had the
/// rows; the error says from where on.
#[test]
fn cutting_off_is_exact_or_refused() {
    const ROWS: usize = 30;
    let rows = Rows::new(6);
    let window = |size, sinks| Some(Window { size, sinks });
    for (page_size, residual, window) in [
        (4, 6, None),
        (4, 0, None),
        (8, 1, None),
        (4, usize::MAX, None),
        (4, 1, window(2, 5)),
        (4, 9, window(2, 5)),
        (4, 0, window(6, 0)),
    ] {
        let config = Config { residual, window, ..config(Storage::Int4, page_size) };
        let decoded = |len| {
            let mut cache = Cache::new(&config).unwrap();
            let seq = cache.create().unwrap();
            (0..len).for_each(|row| rows.append(&mut cache, seq, row, row + 1));
            (cache, seq)
        };
        let (mut refused, mut exact) = (0, 0);
        for len in 0..ROWS {
            let (mut cut, seq) = decoded(ROWS);
            if let Err(error) = cut.truncate(seq, len) {
                let Error::Irreversible { exact_from, .. } = error else { panic!("{error}") };
                assert!((len + 1..ROWS).contains(&exact_from), "{len}: {error}");
                cut.truncate(seq, exact_from).unwrap();
                refused += 1;
                continue;
            }
            exact += 1;
            let (mut plain, other) = decoded(len);
            for row in len..ROWS {
                rows.append(&mut cut, seq, row, row + 1);
                rows.append(&mut plain, other, row, row + 1);
                let q = rows.q.slice(s![..1, .., ..]);
                let attend = |cache: &Cache, seq| {
                    attend(cache, q, &[Queries::last(seq, 1)], &Options::default())
                };
                let what = format!("pages of {page_size}, {len} rows, then row {row}");
                assert_same_bits(&attend(&cut, seq), &attend(&plain, other), &what);
            }
        }
        assert!(exact > 1 && (refused > 0 || residual == usize::MAX), "{exact} and {refused}");
    }
}

/// Sequences that are imported together have the bits of each imported alone, whatever they share; those
/// that share what a window has released as well.
#[test]
fn imported_together_or_alone() {
    let pages: [&[i32]; 5] =
        [&[0, 1, 2, 3, 4, 5, 6, 7], &[0, 1, 2, 3, 8], &[0, 9], &[0], &[0, 1, 2, 3]];
    let last = [3, 2, 1, 4, 4];
    let tables = |chosen: &[usize]| {
        let mut tables = PageTables { kv_indptr: vec![0], ..PageTables::default() };
        for &i in chosen {
            tables.kv_indices.extend(pages[i]);
            tables.kv_indptr.push(tables.kv_indices.len() as i32);
            tables.last_page_len.push(last[i]);
        }
        tables
    };
    let seeded = &mut Seeded::new(8);
    let foreign: Array4<f32> = seeded.normal((10, 4, KEY_HEADS, SIZE));
    let q: Array3<f32> = seeded.normal((4, HEADS, SIZE));
    let windows = [None, Some(Window { size: 6, sinks: 0 }), Some(Window { size: 6, sinks: 5 })];
    for (storage, residual) in [
        (Storage::F32, 0),
        (Storage::Int8, 5),
        (Storage::Int8, 3),
        (Storage::Int4, 1),
        (Storage::Int4, 0),
    ] {
        for window in windows {
            let config = Config { residual, window, ..config(storage, 4) };
            let import = |chosen: &[usize]| {
                let mut cache = Cache::new(&config).unwrap();
                let layers = [(foreign.view(), foreign.view())];
                let seqs = cache.import(&tables(chosen), &layers).unwrap();
                cache.check_invariants().unwrap();
                (cache, seqs)
            };
            let (together, seqs) = import(&[0, 1, 2, 3, 4]);
            assert!(window.is_some() || together.stats().shared > 0);
            for (i, &seq) in seqs.iter().enumerate() {
                let (alone, own) = import(&[i]);
                // All rows of the last append.
                for n in 1..=last[i] as usize {
                    let q = q.slice(s![..n, .., ..]);
                    let attend = |cache: &Cache, seq| {
                        attend(cache, q, &[Queries::last(seq, n)], &Options::default())
                    };
                    let what =
                        format!("{storage:?} {residual}, {window:?}, sequence {i}, last {n}");
                    assert_same_bits(&attend(&together, seq), &attend(&alone, own[0]), &what);
                }
            }
        }
    }
}
