//! Reuse of equal prefixes.

use crate::cache::Cache;
use crate::error::invalid;
use crate::options::NO_PAGE;
use crate::prefix::root;
use crate::{Error, SeqId};

impl Cache {
    /// Tells the cache which tokens the rows of a sequence belong to, so that later sequences with the
    /// same beginning can share its full pages. They stay findable after the sequence is freed, until
    /// their pages are needed. `namespace` keeps apart what equal tokens do not make equal (another
    /// adapter, an image).
    ///
    /// Returns the number of pages that can now be found. A page that a window has released, and that nobody
    /// knows, ends them: what comes after it could not be found without it.
    ///
    /// # Errors
    /// [`Error::NeedsPages`] for the contiguous layout, [`Error::Option`] if `tokens` is not one for
    /// each row, [`Error::UnevenLayers`], [`Error::UnknownSequence`].
    pub fn register_prefix(
        &mut self,
        seq: SeqId,
        namespace: u64,
        tokens: &[u32],
    ) -> Result<usize, Error> {
        if !self.is_paged() {
            return Err(Error::NeedsPages { operation: "prefix reuse" });
        }
        let len = self.even(seq)?.shortest();
        if tokens.len() != len {
            let expected = format!("{len}, one for each row");
            return Err(invalid("tokens.len()", expected, tokens.len()));
        }
        let mut parent = root(namespace);
        let full = tokens.chunks_exact(self.config.page_size);
        let mut registered = 0;
        let Self { slots, index, pool, .. } = self;
        let sequence = &slots[seq.slot as usize].sequence;
        for (&page, tokens) in sequence.pages.iter().zip(full) {
            // An equal page that is known already stays the one that is found, also if the window has released
            // the sequence's own.
            let canonical = match index.find(parent, tokens) {
                Some(known) => known,
                None if page == NO_PAGE || index.knows(page) => break,
                None => {
                    index.insert(parent, tokens, page);
                    page
                }
            };
            parent = (canonical, pool.stamps[canonical as usize]);
            registered += 1;
        }
        Ok(registered)
    }

    /// A new sequence that begins with the longest known prefix of `tokens`, and the number of its
    /// rows: a multiple of the page size, and less than `tokens.len()`, since the last token has to be
    /// computed for its logits.
    ///
    /// With quantised storage the shared pages have no full precision any more, so they are read
    /// quantised also within [`residual`](crate::Config::residual) rows of a query; with a residual
    /// of at most 1 the bits are those of a sequence that was computed afresh.
    ///
    /// # Errors
    /// [`Error::NeedsPages`] for the contiguous layout.
    pub fn match_prefix(
        &mut self,
        namespace: u64,
        tokens: &[u32],
    ) -> Result<(SeqId, usize), Error> {
        if !self.is_paged() {
            return Err(Error::NeedsPages { operation: "prefix reuse" });
        }
        let seq = self.create()?;
        let page_size = self.config.page_size;
        let mut parent = root(namespace);
        let reusable = tokens.len().saturating_sub(1);
        for tokens in tokens[..reusable].chunks_exact(page_size) {
            let Some(page) = self.index.find(parent, tokens) else { break };
            self.pool.share(page);
            let sequence = &mut self.slots[seq.slot as usize].sequence;
            sequence.pages.push(page);
            if self.config.is_quantised() {
                sequence.raw.push(NO_PAGE);
                sequence.raw_start += 1;
                sequence.adopted += 1;
            }
            parent = (page, self.pool.stamps[page as usize]);
        }
        let sequence = &mut self.slots[seq.slot as usize].sequence;
        let rows = sequence.pages.len() * page_size;
        sequence.lens.fill(rows);
        Ok((seq, rows))
    }
}
