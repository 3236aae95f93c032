//! Operations on a cache: valid ones beside a plain model of it, or any ones with any arguments.

#![no_main]

use arbitrary::{Arbitrary, Result, Unstructured};
use kvcache::{Cache, Config, Layout, Options, PageTables, Queries, SeqId, Storage, Window};
use libfuzzer_sys::fuzz_target;
use ndarray::{Array3, Array4};

#[path = "../../crates/kvcache/tests/common/mod.rs"]
#[allow(unused_imports)]
mod common;

use common::{Op, Pair};

fuzz_target!(|bytes: &[u8]| {
    let _ = run(&mut Unstructured::new(bytes));
});

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let config = config(u)?;
    if u.arbitrary()? { beside_a_model(u, &config) } else { wild(u, &config) }
}

/// What `tests/properties.rs` does, with operations that the fuzzer chooses.
fn beside_a_model(u: &mut Unstructured<'_>, config: &Config) -> Result<()> {
    let mut pair = Pair::new(config, 1);
    for _ in 0..60 {
        if u.is_empty() {
            break;
        }
        pair.apply(&op(u)?);
        pair.check();
    }
    pair.check_attention(&Options::default());
    Ok(())
}

/// Calls with any arguments: an error or not, the cache stays whole.
fn wild(u: &mut Unstructured<'_>, config: &Config) -> Result<()> {
    let mut cache = Cache::new(config).expect("a small cache");
    let mut other = Cache::new(config).expect("a small cache");
    let mut seqs: Vec<SeqId> = other.create().into_iter().collect();
    for _ in 0..60 {
        if u.is_empty() {
            break;
        }
        let seq = if seqs.is_empty() { None } else { Some(*u.choose(&seqs)?) };
        let kind = u.int_in_range(0..=11)?;
        match (kind, seq) {
            (0 | 1, _) => seqs.extend(cache.create()),
            (2, Some(seq)) => seqs.extend(cache.fork(seq)),
            (3, Some(seq)) => drop(cache.free(seq)),
            (4, Some(seq)) => drop(cache.truncate(seq, size(u)?)),
            (5, Some(seq)) => drop(cache.compact(seq, size(u)?, &sizes(u)?)),
            (6, Some(seq)) => {
                let rows = rows(u, config, config.value_size)?;
                let values = if u.ratio(7, 8)? {
                    let shape = (rows.dim().0, config.key_heads, config.value_size);
                    Array3::from_elem(shape, f32::arbitrary(u)?)
                } else {
                    rows.clone()
                };
                drop(cache.append(layer(u)?, seq, rows.view(), values.view()));
            }
            (7, Some(_)) => {
                let batch = [*u.choose(&seqs)?, *u.choose(&seqs)?];
                let counts = sizes(u)?;
                let rows = rows(u, config, config.head_size)?;
                drop(cache.append_batch(layer(u)?, &batch, &counts, rows.view(), rows.view()));
            }
            (8, Some(seq)) => {
                let tokens: Vec<u32> = u.arbitrary()?;
                drop(cache.register_prefix(seq, u.arbitrary()?, &tokens));
            }
            (9, _) => {
                let tokens: Vec<u32> = u.arbitrary()?;
                seqs.extend(cache.match_prefix(u.arbitrary()?, &tokens).map(|(seq, _)| seq));
            }
            (10, Some(seq)) => attend(u, &cache, seq)?,
            (11, _) => {
                let tables = PageTables {
                    kv_indptr: smalls(u)?,
                    kv_indices: smalls(u)?,
                    last_page_len: smalls(u)?,
                };
                let (pages, c) = (u.int_in_range(0..=4_usize)?, config);
                let k = Array4::<f32>::zeros((pages, c.page_size, c.key_heads, c.head_size));
                let v = Array4::<f32>::zeros((pages, c.page_size, c.key_heads, c.value_size));
                let layers = vec![(k.view(), v.view()); u.int_in_range(0..=3)?];
                seqs.extend(cache.import(&tables, &layers).into_iter().flatten());
            }
            _ => {}
        }
        if let Some(seq) = seq {
            let _ = cache.read(layer(u)?, seq, size(u)?, size(u)?);
            let _ = cache.page_tables(&[seq, seq]);
        }
        cache.check_invariants().expect("the cache is whole");
    }
    Ok(())
}

fn attend(u: &mut Unstructured<'_>, cache: &Cache, seq: SeqId) -> Result<()> {
    let parents: Vec<i64> = smalls(u)?.into_iter().map(i64::from).collect();
    let queries =
        if u.arbitrary()? { Queries::tree(seq, &parents) } else { Queries::last(seq, size(u)?) };
    let rows = if u.ratio(7, 8)? { queries.len().min(64) } else { u.int_in_range(0..=9)? };
    let heads = u.int_in_range(0..=5)?;
    let q = Array3::from_elem((rows, heads, cache.config().head_size), f32::arbitrary(u)?);
    let options = Options {
        scale: u.arbitrary()?,
        softcap: u.arbitrary()?,
        window: window(u)?,
        ..Options::default()
    };
    let _ = cache.attend(layer(u)?, q.view(), &[queries], &options);
    Ok(())
}

fn config(u: &mut Unstructured<'_>) -> Result<Config> {
    let paged = u.ratio(3, 4)?;
    let layout = if paged {
        Layout::Paged { pages: u.int_in_range(1..=23)? }
    } else {
        Layout::Contiguous { sequences: u.int_in_range(1..=4)?, capacity: u.int_in_range(1..=60)? }
    };
    let new = Config::new(u.int_in_range(1..=2)?, u.int_in_range(1..=2)?, u.int_in_range(1..=6)?);
    Ok(Config {
        value_size: u.int_in_range(1..=5)?,
        keys: *u.choose(&Storage::ALL)?,
        values: *u.choose(&Storage::ALL)?,
        layout,
        page_size: *u.choose(&[1, 2, 3, 4, 8, 16])?,
        residual: u.int_in_range(0..=9)?,
        window: window(u)?.filter(|window| window.size > 0),
        ..new
    })
}

fn window(u: &mut Unstructured<'_>) -> Result<Option<Window>> {
    Ok(match u.int_in_range(0..=7)? {
        0 => Some(Window { size: u.arbitrary()?, sinks: u.arbitrary()? }),
        1 | 2 => Some(Window { size: u.int_in_range(0..=19)?, sinks: u.int_in_range(0..=5)? }),
        _ => None,
    })
}

fn op(u: &mut Unstructured<'_>) -> Result<Op> {
    let kind = u.int_in_range(0..=12)?;
    let seq = u.int_in_range(0..=7)?;
    Ok(match kind {
        0 => Op::Create,
        1..=3 => Op::Append { seq, rows: u.int_in_range(0..=19)? },
        4 => {
            let second = u.int_in_range(0..=7)?;
            Op::AppendBatch { first: seq, second, rows: u.int_in_range(1..=2)? }
        }
        5 => Op::Fork { seq },
        6 => Op::Truncate { seq, back: u.int_in_range(0..=23)? },
        7 => Op::Compact { seq, tail: u.int_in_range(0..=11)?, keep: u.arbitrary()? },
        8 => Op::Free { seq },
        9 => Op::Register { seq },
        10 => Op::Match { seq, tokens: u.int_in_range(0..=39)? },
        11 => Op::Reimport { seq },
        _ => Op::Stale,
    })
}

/// Mostly small.
fn size(u: &mut Unstructured<'_>) -> Result<usize> {
    if u.ratio(15, 16)? { u.int_in_range(0..=24) } else { u.arbitrary() }
}

fn sizes(u: &mut Unstructured<'_>) -> Result<Vec<usize>> {
    (0..u.int_in_range(0..=4)?).map(|_| size(u)).collect()
}

fn smalls(u: &mut Unstructured<'_>) -> Result<Vec<i32>> {
    let small = |u: &mut Unstructured<'_>| {
        if u.ratio(15, 16)? { u.int_in_range(-1..=6) } else { u.arbitrary() }
    };
    (0..u.int_in_range(0..=6)?).map(|_| small(u)).collect()
}

fn layer(u: &mut Unstructured<'_>) -> Result<usize> {
    if u.ratio(15, 16)? { u.int_in_range(0..=1) } else { u.arbitrary() }
}

fn rows(u: &mut Unstructured<'_>, config: &Config, size: usize) -> Result<Array3<f32>> {
    let heads = if u.ratio(15, 16)? { config.key_heads } else { u.int_in_range(0..=3)? };
    let size = if u.ratio(7, 8)? { config.head_size } else { size };
    Ok(Array3::from_elem((u.int_in_range(0..=20)?, heads, size), f32::arbitrary(u)?))
}
