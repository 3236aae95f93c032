//! Full pages by the tokens they hold and all before them, so that a new sequence can begin with the
//! pages of an old one.
//!
//! The key of a page is its own tokens and the page before it, so equal keys mean equal prefixes:
//! the hash only finds the entry, the tokens decide (no collision can hand out wrong rows).

use std::collections::HashMap;
use std::sync::Arc;

use crate::options::NO_PAGE;

/// Names the content of a page.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// The page before, and the stamp of its content; [`root`] for the first.
    parent: (u32, u64),
    tokens: Arc<[u32]>,
}

/// The parent of the first page of a prefix, for each namespace.
pub(crate) fn root(namespace: u64) -> (u32, u64) {
    (NO_PAGE, namespace)
}

/// Which page holds which tokens.
#[derive(Debug, Default)]
pub(crate) struct PrefixIndex {
    pages: HashMap<Key, u32>,
    keys: HashMap<u32, Key>,
}

impl PrefixIndex {
    pub(crate) fn find(&self, parent: (u32, u64), tokens: &[u32]) -> Option<u32> {
        self.pages.get(&Key { parent, tokens: tokens.into() }).copied()
    }

    pub(crate) fn insert(&mut self, parent: (u32, u64), tokens: &[u32], page: u32) {
        let key = Key { parent, tokens: tokens.into() };
        self.pages.insert(key.clone(), page);
        self.keys.insert(page, key);
    }

    pub(crate) fn knows(&self, page: u32) -> bool {
        !self.keys.is_empty() && self.keys.contains_key(&page)
    }

    pub(crate) fn forget(&mut self, page: u32) {
        if let Some(key) = self.keys.remove(&page) {
            self.pages.remove(&key);
        }
    }

    /// Whether both maps say the same.
    pub(crate) fn is_consistent(&self) -> bool {
        self.keys.len() == self.pages.len()
            && self.keys.iter().all(|(page, key)| self.pages.get(key) == Some(page))
    }

    pub(crate) fn known_pages(&self) -> impl Iterator<Item = u32> {
        self.keys.keys().copied()
    }
}
