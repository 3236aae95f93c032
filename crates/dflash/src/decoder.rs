//! The loop: draft, verify in one pass, accept, compact the cache, go on.

use std::collections::BTreeMap;
use std::time::Instant;

use kvcache::{Cache, Rows, SeqId};
use ndarray::{Array2, ArrayView2, Axis};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use tensor_utils::try_array;

use crate::error::invalid;
use crate::greedy::check_tokens;
use crate::{
    Accepted, BoxError, DecodeOptions, Decoding, Draft, Drafter, Error, Pass, Random, Target,
    TokenTree, accept_drawn, accept_greedy, accept_matching, choose_budget,
};

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// With an end-of-sequence token, its last.
    Eos,
    /// With the last token that was allowed.
    Length,
    /// Before its end, by [`Decoder::release`].
    Released,
}

/// What has become of a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Generation {
    /// The new tokens.
    pub tokens: Vec<u32>,
    /// Why there will be no more; `None`: there will.
    pub finish: Option<Finish>,
    /// Passes of the target, without the prompt's.
    pub cycles: usize,
    /// Nodes that were verified.
    pub drafted: usize,
    /// Nodes that were accepted and kept.
    pub accepted: usize,
}

/// A sequence in the works. Between cycles the cache holds its text without the last token.
#[derive(Debug)]
struct Sequence {
    seq: SeqId,
    text: Vec<u32>,
    generation: Generation,
    random: Random<ChaCha8Rng>,
}

/// A sequence that has ended and still has its rows in the cache.
#[derive(Debug)]
struct Ended {
    seq: SeqId,
    generation: Generation,
}

/// Decodes a batch of sequences by draft and verification, over the pages of one cache.
///
/// Each [`step`](Self::step) verifies one tree for each unfinished sequence, all in one pass of the
/// model, and compacts the cache to the accepted paths in place. Between steps the cache is, to the
/// bit, that of plain decoding; `docs/derivation.md`, sections 2 and 7.
///
/// A step allocates the logits, `4 V` bytes a row with a row for each node and each sequence, at most 300
/// bytes a row besides, and what model and drafter do; nothing in proportion to the cache.
///
/// Nodes that are deeper than what may still be generated are not verified. So with a prompt of `P` tokens a
/// sequence needs room in the cache for at most `P + max_new_tokens + budget - 2` rows, and for
/// `P + max_new_tokens - 1`, as in plain decoding, if the trees are chains or the budget is 0.
///
/// With quantised storage, [`kvcache::Config::residual`] must be above the depth of the trees: rows
/// within it are read in full precision from the tree as in plain decoding. Without drafts, it may be 0.
///
/// A decoder may live as long as its model: time and memory of a step are those of the sequences that have not
/// ended, an ended one keeps what it has generated and its rows in the cache, and one that was
/// [released](Self::release) leaves nothing. [`into_generations`](Self::into_generations) ends all that there are.
/// A decoder that is dropped before leaves them in the cache and tells the drafter nothing: what a drafter that is
/// used again keeps of them stays until [`Drafter::finish`] is called with their numbers, or other sequences have
/// those.
#[derive(Debug)]
pub struct Decoder<'a, M> {
    model: &'a mut M,
    cache: &'a mut Cache,
    options: DecodeOptions<'a>,
    /// Sequences that were ever added: the number of the next one.
    added: usize,
    /// By number: what steps go over.
    live: BTreeMap<usize, Sequence>,
    /// By number: what has ended and was not released.
    ended: BTreeMap<usize, Ended>,
}

/// What one sequence contributes to a step.
struct Proposal {
    index: usize,
    seq: SeqId,
    base: usize,
    draft: Draft,
    parents: Vec<i64>,
}

impl<'a, M: Target> Decoder<'a, M> {
    /// Without sequences yet.
    ///
    /// # Errors
    /// [`Error::Option`] or [`Error::Token`] for options out of range.
    pub fn new(
        model: &'a mut M,
        cache: &'a mut Cache,
        options: DecodeOptions<'a>,
    ) -> Result<Self, Error> {
        options.check(model.vocabulary())?;
        let (live, ended) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { model, cache, options, added: 0, live, ended })
    }

    /// Runs the model over a prompt and returns the number of its sequence, counted from 0. A number is never
    /// given again, not even when its sequence was released.
    ///
    /// # Errors
    /// [`Error::Option`] for an empty prompt, [`Error::Token`], [`Error::Callback`] from the model and
    /// [`Error::Cache`]; nothing is added then.
    pub fn add(&mut self, prompt: &[u32]) -> Result<usize, Error> {
        let seq = self.cache.create()?;
        self.add_cached(seq, prompt).inspect_err(|_| {
            // The error that led here is the one to report.
            let _ = self.cache.free(seq);
        })
    }

    /// [`add`](Self::add) for a sequence of the cache that holds the first rows of the prompt already: a fork,
    /// or what [`Cache::match_prefix`] has found. The model runs over the others, and the decoder owns
    /// the sequence from then on. With quantised storage what was matched is read quantised, so the bits may be
    /// others than those of a prompt that is added whole.
    ///
    /// # Errors
    /// As [`add`](Self::add), and [`Error::Option`] if the sequence holds all of the prompt or more: its last token
    /// must not be cached. The sequence stays the caller's then, as it was.
    pub fn add_cached(&mut self, seq: SeqId, prompt: &[u32]) -> Result<usize, Error> {
        let held = self.cache.len(seq)?;
        if self.holds(seq) {
            return Err(invalid(
                "seq",
                "a sequence that the decoder does not have yet",
                format!("{seq:?}"),
            ));
        }
        let mut longest = held;
        for layer in 0..self.cache.config().layers {
            longest = longest.max(self.cache.layer_len(layer, seq)?);
        }
        if longest > held {
            let uneven = kvcache::Error::UnevenLayers { sequence: seq, shortest: held, longest };
            return Err(uneven.into());
        }
        let Some((_, known)) = prompt.split_last() else {
            return Err(invalid("prompt", "at least one token", "none"));
        };
        check_tokens("prompt", prompt, self.model.vocabulary())?;
        if held > known.len() {
            let expected = format!("more tokens than the {held} rows that its sequence holds");
            return Err(invalid("prompt", expected, format!("{} tokens", prompt.len())));
        }
        if held < known.len() {
            let pass = Pass {
                seq,
                tokens: known[held..].to_vec(),
                positions: (held..known.len()).collect(),
                rows: Rows::Last(known.len() - held),
            };
            let done = self.model.forward(self.cache, &[pass], None).map_err(target_failed);
            if let Err(error) = done.and_then(|()| expect_rows(self.cache, seq, known.len())) {
                let _ = self.cache.truncate(seq, held);
                return Err(error);
            }
        }
        let index = self.added;
        let seed =
            if let Decoding::Sampled { seed, .. } = self.options.decoding { seed } else { 0 };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index as u64);
        let (text, generation) = (prompt.to_vec(), Generation::default());
        self.live.insert(index, Sequence { seq, text, generation, random: Random(rng) });
        self.added += 1;
        Ok(index)
    }

    /// One cycle for every sequence that is not finished; says whether there is one left.
    ///
    /// # Errors
    /// [`Error::Callback`] from drafter and model, [`Error::Option`] for a tree above the budget or too
    /// deep for a quantised cache, [`Error::Token`], [`Error::Sequence`] for logits from which no token can
    /// be chosen, [`Error::Cache`]. Cache and sequences are then as before the step, but for random numbers that
    /// were drawn.
    pub fn step(&mut self, drafter: &mut impl Drafter) -> Result<bool, Error> {
        let proposals = self.proposals(drafter)?;
        if proposals.is_empty() {
            return Ok(false);
        }
        let accepted = self.verify(&proposals);
        let accepted = accepted.inspect_err(|_| {
            for proposal in &proposals {
                // The error that led here is the one to report.
                let _ = self.cache.truncate(proposal.seq, proposal.base);
            }
        })?;
        for (proposal, (accepted, finish)) in proposals.iter().zip(accepted) {
            self.keep(proposal, &accepted, finish)?;
            if finish.is_some() {
                drafter.finish(proposal.index);
            }
        }
        Ok(!self.live.is_empty())
    }

    fn proposals(&mut self, drafter: &mut impl Drafter) -> Result<Vec<Proposal>, Error> {
        let mut proposals = Vec::new();
        for (&index, sequence) in &self.live {
            let draft = self.draft(drafter, index, sequence)?;
            let tree = draft.tree();
            let config = self.cache.config();
            let quantised = config.keys.is_quantised() || config.values.is_quantised();
            // Without nodes nothing is moved.
            if quantised && !tree.is_empty() && tree.max_depth() >= config.residual {
                let expected = format!("above {}, the depth of the tree", tree.max_depth());
                return Err(invalid("residual", expected, config.residual));
            }
            let parents = tree.pass_parents();
            let seq = sequence.seq;
            let base = self.cache.len(seq)?;
            proposals.push(Proposal { index, seq, base, draft, parents });
        }
        Ok(proposals)
    }

    /// What is to be verified: nothing for the last token, and no node too deep to be kept.
    fn draft(
        &self,
        drafter: &mut impl Drafter,
        index: usize,
        sequence: &Sequence,
    ) -> Result<Draft, Error> {
        let DecodeOptions { budget, max_new_tokens, cost, .. } = self.options;
        let deepest = max_new_tokens - sequence.generation.tokens.len() - 1;
        if budget == 0 || deepest == 0 {
            return Ok(Draft::Tree(TokenTree::empty()));
        }
        let start = Instant::now();
        let draft = drafter
            .draft(index, &sequence.text, budget)
            .map_err(|source| Error::Callback { who: "drafter", source })?;
        let seconds = start.elapsed().as_secs_f64();
        let tree = draft.tree();
        if tree.len() > budget {
            return Err(invalid("draft", format!("at most {budget} nodes"), tree.len()));
        }
        check_tokens("draft", tree.tokens(), self.model.vocabulary())?;
        match (draft.up_to(deepest)?, cost) {
            (Draft::Scored(scored), Some(curve)) => {
                let nodes = choose_budget(&scored, curve, seconds)?.nodes;
                Ok(Draft::Scored(scored.prefix(nodes)?))
            }
            (draft, _) => Ok(draft),
        }
    }

    /// Runs the pass and accepts; appends to the cache, changes nothing else but random numbers. There is a
    /// proposal for each live sequence, in order.
    fn verify(&mut self, proposals: &[Proposal]) -> Result<Vec<(Accepted, Option<Finish>)>, Error> {
        let batch: Vec<Pass<'_>> = proposals
            .iter()
            .zip(self.live.values())
            .map(|(Proposal { seq, base, draft, parents, .. }, Sequence { text, .. })| {
                let last = text.last().copied().unwrap_or_default();
                Pass::of_tree(*seq, *base, last, draft.tree(), parents)
            })
            .collect();
        let rows: usize = batch.iter().map(|pass| pass.tokens.len()).sum();
        let mut logits: Array2<f32> = try_array("logits", (rows, self.model.vocabulary()))?;
        self.model.forward(self.cache, &batch, Some(logits.view_mut())).map_err(target_failed)?;
        for (pass, proposal) in batch.iter().zip(proposals) {
            expect_rows(self.cache, pass.seq, proposal.base + pass.tokens.len())?;
        }
        let mut accepted = Vec::with_capacity(proposals.len());
        let mut first = 0;
        for (Proposal { index, draft, .. }, sequence) in
            proposals.iter().zip(self.live.values_mut())
        {
            let rows = first..first + draft.tree().rows();
            first = rows.end;
            let own = logits.slice_axis(Axis(0), rows.into());
            let mut path = accept(draft, own, &self.options.decoding, &mut sequence.random)
                .map_err(|source| Error::Sequence { sequence: *index, source: Box::new(source) })?;
            let limit = self.options.max_new_tokens - sequence.generation.tokens.len();
            let ended = path.truncate(self.options.eos, limit);
            let at_eos = path.tokens.last().is_some_and(|token| self.options.eos.contains(token));
            let finish = ended.then_some(if at_eos { Finish::Eos } else { Finish::Length });
            accepted.push((path, finish));
        }
        Ok(accepted)
    }

    /// Compacts the cache to the accepted path and appends its tokens to the text.
    fn keep(
        &mut self,
        proposal: &Proposal,
        accepted: &Accepted,
        finish: Option<Finish>,
    ) -> Result<(), Error> {
        let Some(sequence) = self.live.get_mut(&proposal.index) else { return Ok(()) };
        let nodes = accepted.nodes.iter().map(|&node| TokenTree::row_of(node));
        let kept: Vec<usize> = std::iter::once(0).chain(nodes).collect();
        self.cache.compact(sequence.seq, proposal.base, &kept)?;
        sequence.text.extend(&accepted.tokens);
        let generation = &mut sequence.generation;
        generation.tokens.extend(&accepted.tokens);
        generation.cycles += 1;
        generation.drafted += proposal.draft.tree().len();
        generation.accepted += accepted.nodes.len();
        if let Some(finish) = finish {
            self.end(proposal.index, finish);
        }
        Ok(())
    }

    /// Puts a live sequence among those that have ended; `false` if there is none.
    fn end(&mut self, index: usize, finish: Finish) -> bool {
        let Some(Sequence { seq, mut generation, .. }) = self.live.remove(&index) else {
            return false;
        };
        generation.finish = Some(finish);
        self.ended.insert(index, Ended { seq, generation });
        true
    }

    /// What has become of sequence `index`; `None` if there is no such sequence, or it was
    /// [released](Self::release).
    pub fn generation(&self, index: usize) -> Option<&Generation> {
        let live = self.live.get(&index).map(|sequence| &sequence.generation);
        live.or_else(|| self.ended.get(&index).map(|ended| &ended.generation))
    }

    /// The sequence in the cache; it stays there when the decoder goes. `None` if there is no such
    /// sequence, or it was [released](Self::release).
    pub fn seq(&self, index: usize) -> Option<SeqId> {
        let live = self.live.get(&index).map(|sequence| sequence.seq);
        live.or_else(|| self.ended.get(&index).map(|ended| ended.seq))
    }

    /// Frees what a sequence takes of the cache, ended or not, and forgets it: steps go on without it. Returns what
    /// it has generated; `None` if it was released before, or there is no such sequence.
    ///
    /// # Errors
    /// [`Error::Cache`] if it was freed behind the decoder's back; it is forgotten nevertheless.
    pub fn release(
        &mut self,
        index: usize,
        drafter: &mut impl Drafter,
    ) -> Result<Option<Generation>, Error> {
        if self.end(index, Finish::Released) {
            drafter.finish(index);
        }
        let Some(Ended { seq, generation }) = self.ended.remove(&index) else { return Ok(None) };
        self.cache.free(seq)?;
        Ok(Some(generation))
    }

    /// Whether a sequence of the cache is one of its own: all of these have their rows there, so they are not many.
    fn holds(&self, seq: SeqId) -> bool {
        let live = self.live.values().map(|sequence| sequence.seq);
        live.chain(self.ended.values().map(|ended| ended.seq)).any(|own| own == seq)
    }

    /// The model, between steps.
    pub fn model_mut(&mut self) -> &mut M {
        self.model
    }

    /// The cache, for a look.
    pub fn cache(&self) -> &Cache {
        self.cache
    }

    /// Frees all sequences in the cache, tells the drafter that those which have not ended
    /// [go no further](Drafter::finish), and returns what has become of each, by number. What was
    /// [released](Self::release) is not among them.
    ///
    /// # Errors
    /// [`Error::Cache`] if one was freed behind the decoder's back; the others are freed nevertheless.
    pub fn into_generations(
        self,
        drafter: &mut impl Drafter,
    ) -> Result<BTreeMap<usize, Generation>, Error> {
        let mut generations = BTreeMap::new();
        let mut freed = Ok(());
        let live = self.live.into_iter().map(|(index, Sequence { seq, generation, .. })| {
            drafter.finish(index);
            (index, Ended { seq, generation })
        });
        for (index, Ended { seq, generation }) in live.chain(self.ended) {
            freed = freed.and(self.cache.free(seq));
            generations.insert(index, generation);
        }
        freed?;
        Ok(generations)
    }
}

/// Continues each prompt until all are finished, and frees what it took of the cache.
///
/// # Errors
/// [`Error::Sequence`] for a prompt that cannot be [added](Decoder::add), with its number; otherwise those of
/// [`Decoder::new`] and [`Decoder::step`]. What was generated until then is lost; a [`Decoder`] keeps it.
pub fn generate<M: Target>(
    model: &mut M,
    cache: &mut Cache,
    drafter: &mut impl Drafter,
    prompts: &[&[u32]],
    options: DecodeOptions<'_>,
) -> Result<Vec<Generation>, Error> {
    let mut decoder = Decoder::new(model, cache, options)?;
    let added = prompts.iter().enumerate().try_for_each(|(sequence, prompt)| {
        let added = decoder.add(prompt).map(drop);
        added.map_err(|source| Error::Sequence { sequence, source: Box::new(source) })
    });
    let done = added.and_then(|()| {
        while decoder.step(drafter)? {}
        Ok(())
    });
    let generations = decoder.into_generations(drafter)?;
    done.map(|()| generations.into_values().collect())
}

fn accept(
    draft: &Draft,
    logits: ArrayView2<'_, f32>,
    decoding: &Decoding,
    random: &mut Random<ChaCha8Rng>,
) -> Result<Accepted, Error> {
    match (decoding, draft) {
        (Decoding::Greedy, draft) => accept_greedy(draft.tree(), logits),
        (Decoding::Sampled { sampling, .. }, Draft::Drawn(drawn)) => {
            accept_drawn(drawn, logits, sampling, random)
        }
        (Decoding::Sampled { sampling, .. }, draft) => {
            accept_matching(draft.tree(), logits, sampling, random)
        }
    }
}

/// Checks that the model appended what it should have.
fn expect_rows(cache: &Cache, seq: SeqId, rows: usize) -> Result<(), Error> {
    for layer in 0..cache.config().layers {
        let got = cache.layer_len(layer, seq)?;
        if got != rows {
            let expected = format!("{rows} in layer {layer}");
            return Err(invalid("rows of the sequence after the model's pass", expected, got));
        }
    }
    Ok(())
}

fn target_failed(source: BoxError) -> Error {
    Error::Callback { who: "target model", source }
}
