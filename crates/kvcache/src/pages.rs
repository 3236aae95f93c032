//! Who holds which page: reference counts, the free list, and the pages that only the prefix index
//! still knows.

use tensor_utils::{ShapeError, try_vec};

use crate::options::NO_PAGE;
use crate::prefix::PrefixIndex;

/// The pages of a cache. A page is *free* (in the list), *live* (some sequence maps it), or
/// *reclaimable* (nobody maps it, but the prefix index can still find it).
#[derive(Debug)]
pub(crate) struct Pool {
    /// Sequences that map each page.
    pub(crate) refs: Vec<u32>,
    /// Free pages; the last is taken first.
    pub(crate) free: Vec<u32>,
    /// Reclaimable pages, the one unused for longest first.
    pub(crate) reclaimable: List,
    /// Which content a page holds: counts up whenever it changes hands, so that a key of the prefix
    /// index that names an old content is never found again.
    pub(crate) stamps: Vec<u64>,
}

impl Pool {
    pub(crate) fn new(pages: usize) -> Result<Self, ShapeError> {
        let mut free = try_vec("layout", &[pages])?;
        for (page, free) in free.iter_mut().rev().enumerate() {
            *free = page as u32;
        }
        Ok(Self {
            refs: try_vec("layout", &[pages])?,
            free,
            reclaimable: List::new(pages)?,
            stamps: try_vec("layout", &[pages])?,
        })
    }

    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.reclaimable.len
    }

    /// A page of one's own, if there is one.
    pub(crate) fn take(&mut self, index: &mut PrefixIndex) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => {
                let page = self.reclaimable.pop_front()?;
                index.forget(page);
                page
            }
        };
        self.refs[page as usize] = 1;
        self.stamps[page as usize] += 1;
        Some(page)
    }

    /// Takes this very page, which must be free (contiguous layout).
    pub(crate) fn take_exact(&mut self, page: u32) {
        self.refs[page as usize] = 1;
        self.stamps[page as usize] += 1;
    }

    /// One more sequence maps the page.
    pub(crate) fn share(&mut self, page: u32) {
        if self.refs[page as usize] == 0 {
            self.reclaimable.remove(page);
        }
        self.refs[page as usize] += 1;
    }

    /// One sequence less maps the page.
    pub(crate) fn release(&mut self, page: u32, index: &PrefixIndex) {
        let refs = &mut self.refs[page as usize];
        *refs -= 1;
        if *refs == 0 {
            if index.knows(page) {
                self.reclaimable.push_back(page);
            } else {
                self.free.push(page);
            }
        }
    }

    /// The content of a page of one's own is about to change.
    pub(crate) fn touch(&mut self, page: u32, index: &mut PrefixIndex) {
        if index.knows(page) {
            index.forget(page);
            self.stamps[page as usize] += 1;
        }
    }
}

/// A doubly linked list of pages: all operations in constant time, without allocating.
#[derive(Debug)]
pub(crate) struct List {
    links: Vec<(u32, u32)>,
    ends: (u32, u32),
    pub(crate) len: usize,
}

impl List {
    fn new(pages: usize) -> Result<Self, ShapeError> {
        let mut links = try_vec("layout", &[pages])?;
        links.fill((NO_PAGE, NO_PAGE));
        Ok(Self { links, ends: (NO_PAGE, NO_PAGE), len: 0 })
    }

    pub(crate) fn push_back(&mut self, page: u32) {
        let last = self.ends.1;
        self.links[page as usize] = (last, NO_PAGE);
        match last {
            NO_PAGE => self.ends.0 = page,
            last => self.links[last as usize].1 = page,
        }
        self.ends.1 = page;
        self.len += 1;
    }

    pub(crate) fn pop_front(&mut self) -> Option<u32> {
        let first = self.ends.0;
        (first != NO_PAGE).then(|| {
            self.remove(first);
            first
        })
    }

    pub(crate) fn remove(&mut self, page: u32) {
        let (before, after) = self.links[page as usize];
        match before {
            NO_PAGE => self.ends.0 = after,
            before => self.links[before as usize].1 = after,
        }
        match after {
            NO_PAGE => self.ends.1 = before,
            after => self.links[after as usize].0 = before,
        }
        self.links[page as usize] = (NO_PAGE, NO_PAGE);
        self.len -= 1;
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        let mut next = self.ends.0;
        std::iter::from_fn(move || {
            let page = next;
            (page != NO_PAGE).then(|| {
                next = self.links[page as usize].1;
                page
            })
        })
    }
}
