//! GGUF: any small model is written or refused by name, and what is written is whole.

#![no_main]

use std::fs;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ternary_train::formats::write_gguf;
use ternary_train::{Config, Preset, Projection, Rule, Tokenizer, Weights};

fuzz_target!(|bytes: &[u8]| {
    let _ = run(&mut Unstructured::new(bytes));
});

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let size = |u: &mut Unstructured<'_>| {
        if u.ratio(1, 2)? { Ok(64 * u.int_in_range(1..=3)?) } else { u.int_in_range(0..=70) }
    };
    let projection = Projection {
        rule: *u.choose(&Rule::ALL)?,
        group: if u.ratio(3, 4)? { 64 } else { u.int_in_range(0..=200)? },
    };
    let heads = u.int_in_range(0..=3)?;
    let config = Config {
        vocab_size: if u.ratio(3, 4)? { 256 } else { u.int_in_range(0..=300)? },
        hidden_size: size(u)?,
        intermediate_size: size(u)?,
        num_hidden_layers: u.int_in_range(0..=2)?,
        num_attention_heads: heads * u.int_in_range(1..=2)?,
        num_key_value_heads: heads,
        head_dim: 2 * u.int_in_range(0..=33)?,
        max_position_embeddings: u.arbitrary()?,
        rms_norm_eps: u.arbitrary()?,
        rope_theta: u.arbitrary()?,
        tie_word_embeddings: u.arbitrary()?,
        eos_token_ids: u.arbitrary()?,
        ternary: if u.arbitrary()? { Some(projection) } else { None },
    };
    let Ok(mut weights) = Weights::random(&config, u.arbitrary()?) else { return Ok(()) };
    if u.ratio(7, 8)? {
        let _ = weights.project(projection);
    }
    if u.ratio(1, 4)? {
        weights.norm[0] = u.arbitrary()?;
        weights.layers[0].up[[0, 0]] = u.arbitrary()?;
    }
    let path = fuzz::folder().join("model.gguf");
    if write_gguf(&path, &config, &weights, &Tokenizer::bytes()).is_ok() {
        check(&fs::read(&path).expect("the file that was written"));
    }
    Ok(())
}

/// Walks through the file: every length fits, and the tensors fill it to the end.
fn check(bytes: &[u8]) {
    let mut rest = bytes;
    assert_eq!(take(&mut rest, 4), b"GGUF");
    assert_eq!(u32(&mut rest), 3);
    let (tensors, values) = (u64(&mut rest), u64(&mut rest));
    for _ in 0..values {
        string(&mut rest);
        let kind = u32(&mut rest);
        skip(&mut rest, kind);
    }
    let mut end = 0;
    for _ in 0..tensors {
        string(&mut rest);
        let axes = u32(&mut rest);
        let elements: u64 = (0..axes).map(|_| u64(&mut rest)).product();
        let (kind, offset) = (u32(&mut rest), u64(&mut rest));
        assert_eq!(offset, end, "tensors follow each other");
        let size = if kind == 0 { 4 * elements } else { elements / 64 * 18 };
        end = (offset + size).next_multiple_of(32);
    }
    let start = (bytes.len() - rest.len()).next_multiple_of(32);
    let data = bytes.len() - start;
    assert!(data as u64 <= end && data as u64 + 32 > end, "{data} bytes of data, {end} expected");
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (head, tail) = rest.split_at(count);
    *rest = tail;
    head
}

fn u32(rest: &mut &[u8]) -> u32 {
    u32::from_le_bytes(take(rest, 4).try_into().expect("four bytes"))
}

fn u64(rest: &mut &[u8]) -> u64 {
    u64::from_le_bytes(take(rest, 8).try_into().expect("eight bytes"))
}

fn string(rest: &mut &[u8]) {
    let length = u64(rest) as usize;
    std::str::from_utf8(take(rest, length)).expect("text");
}

/// Skips a value of metadata.
fn skip(rest: &mut &[u8], kind: u32) {
    match kind {
        4..=6 => drop(take(rest, 4)),
        7 => drop(take(rest, 1)),
        8 => string(rest),
        9 => {
            let (kind, length) = (u32(rest), u64(rest));
            (0..length).for_each(|_| skip(rest, kind));
        }
        other => panic!("unknown type {other}"),
    }
}
