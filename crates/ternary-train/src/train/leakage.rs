//! Passages that the text to train on shares with the text to measure with.

use std::collections::{HashMap, hash_map::Entry};

/// A shared passage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leak {
    /// Windows of the validation text that the training text has too.
    pub shared: usize,
    /// Windows of the validation text.
    pub windows: usize,
    /// The longest passage of the validation text that is made of them.
    pub longest: String,
}

/// Base of the rolling hash, odd.
const BASE: u64 = 0x9E37_79B9_7F4A_7C15;

/// Looks for windows of `length` bytes that both texts have; `None` if there are none.
///
/// Every window of both texts is compared, at any offset, by a rolling hash (Karp and Rabin, 1987)
/// and then byte by byte. `length` 0 finds nothing. Memory: 16 to 32 bytes for each byte of
/// `validation`.
pub fn find_leak(train: &str, validation: &str, length: usize) -> Option<Leak> {
    let (train, bytes) = (train.as_bytes(), validation.as_bytes());
    if length == 0 || train.len() < length || bytes.len() < length {
        return None;
    }
    let windows = bytes.len() - length + 1;
    // Windows of equal hash form a chain through `earlier`, so that equal windows are all found.
    let mut latest = HashMap::new();
    let mut earlier = vec![u32::MAX; windows];
    for (at, hash) in hashes(bytes, length).enumerate() {
        match latest.entry(hash) {
            Entry::Occupied(mut entry) => earlier[at] = entry.insert(at as u32),
            Entry::Vacant(entry) => {
                entry.insert(at as u32);
            }
        }
    }
    let mut shared = vec![false; windows];
    for (at, hash) in hashes(train, length).enumerate() {
        let mut next = latest.get(&hash).copied().unwrap_or(u32::MAX);
        while next != u32::MAX && !shared[next as usize] {
            let found = next as usize;
            shared[found] = bytes[found..][..length] == train[at..][..length];
            next = earlier[found];
        }
    }
    let count = shared.iter().filter(|&&shared| shared).count();
    if count == 0 {
        return None;
    }
    let (mut longest, mut run) = (0..0, 0..0);
    for (at, &shared) in shared.iter().enumerate() {
        run = if shared { run.start..at + 1 } else { at + 1..at + 1 };
        if run.len() > longest.len() {
            longest = run.clone();
        }
    }
    let passage = &bytes[longest.start..longest.end - 1 + length];
    let longest = String::from_utf8_lossy(passage).into_owned();
    Some(Leak { shared: count, windows, longest })
}

/// The hash of every window.
fn hashes(bytes: &[u8], length: usize) -> impl Iterator<Item = u64> + '_ {
    let top = (0..length).fold(1_u64, |power, _| power.wrapping_mul(BASE));
    let add = |hash: u64, byte: u8| hash.wrapping_mul(BASE).wrapping_add(u64::from(byte) + 1);
    let mut hash = bytes[..length].iter().fold(0, |hash, &byte| add(hash, byte));
    let first = std::iter::once(hash);
    first.chain(bytes[length..].iter().zip(bytes).map(move |(&new, &old)| {
        hash = add(hash, new).wrapping_sub(top.wrapping_mul(u64::from(old) + 1));
        hash
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_passages_are_found_at_any_offset() {
        let train = "It was the best of times, it was the worst of times.";
        let validation = "She said: it was the worst of days. Yes: it was the worst of days.";
        let leak = find_leak(train, validation, 10).unwrap();
        // " it was the worst of " is 21 bytes long and stands there twice.
        assert_eq!((leak.shared, leak.windows), (2 * 12, validation.len() - 9));
        assert_eq!(leak.longest, " it was the worst of ");
        assert_eq!(find_leak(train, validation, 22), None);
        assert_eq!(find_leak(train, validation, 0), None);
        assert_eq!(find_leak("short", validation, 10), None);
    }

    #[test]
    fn agrees_with_a_plain_search() {
        let text = |seed: u32, len: usize| -> String {
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ['a', 'b'][(state >> 30) as usize % 2]
            };
            (0..len).map(|_| next()).collect()
        };
        for seed in 0..20 {
            let (train, validation) = (text(seed, 60), text(seed + 100, 50));
            for length in [1, 5, 8, 12] {
                let windows = validation.len() - length + 1;
                let plain =
                    (0..windows).filter(|&at| train.contains(&validation[at..at + length])).count();
                let found = find_leak(&train, &validation, length).map_or(0, |leak| leak.shared);
                assert_eq!(found, plain);
            }
        }
    }
}
