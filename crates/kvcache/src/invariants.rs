//! What is true of a cache between calls.

use crate::cache::Cache;
use crate::options::NO_PAGE;

impl Cache {
    /// Checks the bookkeeping: every page is free, live or reclaimable and only one of them, reference
    /// counts are the numbers of sequences that map a page, tables are as long as sequences need, and
    /// the rows that quantised storage must hold in full precision are there.
    ///
    /// For tests, and for whoever suspects a bug; time linear in the pages and sequences.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_invariants(&self) -> Result<(), String> {
        let page_size = self.config.page_size;
        let mut refs = vec![0_u32; self.pool.refs.len()];
        let mut raw_refs = vec![0_u32; self.raw.refs.len()];
        for (number, slot) in self.slots.iter().enumerate() {
            let sequence = &slot.sequence;
            let fail = |what: &str| Err(format!("slot {number}: {what}"));
            if !slot.live {
                if !sequence.pages.is_empty() || !sequence.raw.is_empty() || sequence.longest() > 0
                {
                    return fail("a freed sequence has pages");
                }
                continue;
            }
            if sequence.pages.len() != sequence.longest().div_ceil(page_size) {
                return fail("the page table does not fit the length");
            }
            if self.config.is_quantised() && sequence.raw.len() != sequence.pages.len() {
                return fail("the tables have different lengths");
            }
            for (index, &page) in sequence.pages.iter().enumerate() {
                if page == NO_PAGE {
                    if index >= sequence.window_start {
                        return fail("a page is missing");
                    }
                    continue;
                }
                match refs.get_mut(page as usize) {
                    Some(refs) => *refs += 1,
                    None => return fail("a page that does not exist"),
                }
            }
            for (index, &raw) in sequence.raw.iter().enumerate() {
                if raw == NO_PAGE {
                    if index >= sequence.raw_start.max(sequence.window_start) {
                        return fail("full precision is missing");
                    }
                    if (index + 1) * page_size > sequence.shortest() {
                        return fail("a page that is not full has no full precision");
                    }
                    continue;
                }
                match raw_refs.get_mut(raw as usize) {
                    Some(refs) => *refs += 1,
                    None => return fail("a page in full precision that does not exist"),
                }
            }
        }
        if refs != self.pool.refs {
            return Err(format!("reference counts {:?}, tables say {refs:?}", self.pool.refs));
        }
        if raw_refs != self.raw.refs {
            return Err(format!("residual counts {:?}, tables say {raw_refs:?}", self.raw.refs));
        }
        let unused: Vec<_> = self.raw.free.iter().chain(&self.raw.places).copied().collect();
        check_free("residual", &unused, &raw_refs)?;
        if self.is_paged() {
            self.check_pool(&refs)?;
        }
        if !self.index.is_consistent() {
            return Err("the prefix index contradicts itself".to_owned());
        }
        if let Some(page) = self.index.known_pages().find(|&page| self.pool.free.contains(&page)) {
            return Err(format!("page {page} is free and in the prefix index"));
        }
        Ok(())
    }

    fn check_pool(&self, refs: &[u32]) -> Result<(), String> {
        check_free("page", &self.pool.free, refs)?;
        let reclaimable: Vec<_> = self.pool.reclaimable.iter().collect();
        if reclaimable.len() != self.pool.reclaimable.len {
            return Err("the reclaimable list has another length than it says".to_owned());
        }
        for page in reclaimable.iter().copied() {
            if refs[page as usize] > 0 || !self.index.knows(page) {
                return Err(format!("page {page} is reclaimable, but live or unknown"));
            }
        }
        let live = refs.iter().filter(|&&refs| refs > 0).count();
        let counted = live + self.pool.free.len() + reclaimable.len();
        if counted != refs.len() {
            return Err(format!("{counted} pages are accounted for, there are {}", refs.len()));
        }
        Ok(())
    }
}

/// No page twice, none that is live.
fn check_free(what: &str, free: &[u32], refs: &[u32]) -> Result<(), String> {
    let mut seen = vec![false; refs.len()];
    for &page in free {
        let known = seen.get_mut(page as usize).ok_or(format!("{what} {page} does not exist"))?;
        if std::mem::replace(known, true) {
            return Err(format!("{what} {page} is free twice"));
        }
        if refs[page as usize] > 0 {
            return Err(format!("{what} {page} is free and live"));
        }
    }
    Ok(())
}
