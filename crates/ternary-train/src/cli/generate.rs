//! `generate`: text from a model.

use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::json;
use ternary_train::Tokenizer;
use ternary_train::generate::{
    Choice, GenerateOptions, Sampling, generate, generate_beams, generate_speculatively,
};
use ternary_train::infer::Model;

use super::folder::{Arithmetic, open_model};
use super::values::temperature;
use crate::cli::{note, say};

/// Continues prompts: greedily, unless told otherwise.
#[derive(Args)]
pub(crate) struct Generate {
    /// Folder of the model.
    #[arg(long)]
    model: PathBuf,
    /// Text to continue; may be given more than once.
    #[arg(long, required = true)]
    prompt: Vec<String>,
    /// New tokens, at most.
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
    /// Draw tokens at random, with this temperature.
    #[arg(long, value_parser = temperature)]
    temperature: Option<f64>,
    /// Of a random token: only the so many likeliest.
    #[arg(long, requires = "temperature")]
    top_k: Option<usize>,
    /// Of a random token: only the likeliest that together reach this probability.
    #[arg(long, requires = "temperature", default_value_t = 1.0)]
    top_p: f64,
    /// Of a random token: only those at least this times as likely as the likeliest.
    #[arg(long, requires = "temperature", default_value_t = 0.0)]
    min_p: f64,
    /// Seed of random tokens.
    #[arg(long, requires = "temperature", default_value_t = 0)]
    seed: u64,
    /// Search with this many beams instead.
    #[arg(long, conflicts_with_all = ["speculative", "temperature", "top_k", "top_p", "min_p", "seed"])]
    beams: Option<usize>,
    /// Verify drafts of up to this many tokens, looked up in the text so far.
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p", "seed"])]
    speculative: Option<usize>,
    /// Compute in f32 even if the weights are ternary.
    #[arg(long)]
    float: bool,
    /// Compute as llama.cpp does with the exported file (its AVX-512 order of operations, keys and values
    /// in f32), to check the file: the same tokens, slowly.
    #[arg(long, conflicts_with = "float")]
    like_llama_cpp: bool,
    /// Print a JSON list with the tokens of each prompt and of its continuation, and no text.
    #[arg(long)]
    json: bool,
}

/// Continuations, and what there is to say of them.
struct Texts {
    tokens: Vec<Vec<u32>>,
    note: String,
    /// Whether they were printed token by token.
    streamed: bool,
}

impl Generate {
    pub(crate) fn run(self) -> Result<()> {
        let arithmetic = match (self.float, self.like_llama_cpp) {
            (true, _) => Arithmetic::Float,
            (_, true) => Arithmetic::LlamaCpp,
            _ => Arithmetic::OfTheModel,
        };
        let (model, tokenizer) = open_model(&self.model, arithmetic)?;
        let prompts = self
            .prompt
            .iter()
            .map(|prompt| tokenizer.encode(prompt))
            .collect::<Result<Vec<_>, _>>()?;
        ensure!(prompts.iter().all(|prompt| !prompt.is_empty()), "a prompt must not be empty");
        let start = Instant::now();
        let texts = self.texts(&model, &tokenizer, &prompts)?;
        let seconds = start.elapsed().as_secs_f64();
        if self.json {
            let pairs = prompts.iter().zip(&texts.tokens);
            let list = pairs.map(|(prompt, tokens)| json!({"prompt": prompt, "tokens": tokens}));
            say(list.collect::<serde_json::Value>());
            return Ok(());
        }
        if texts.streamed {
            say("");
        } else {
            for (prompt, tokens) in self.prompt.iter().zip(&texts.tokens) {
                say(format_args!("{prompt}{}\n", tokenizer.decode(tokens)));
            }
        }
        let count: usize = texts.tokens.iter().map(Vec::len).sum();
        let speed = count as f64 / seconds;
        note(format_args!("{count} tokens, {speed:.1} tokens/s{}", texts.note));
        Ok(())
    }

    fn texts(&self, model: &Model, tokenizer: &Tokenizer, prompts: &[Vec<u32>]) -> Result<Texts> {
        let eos = &model.config().eos_token_ids;
        let max_new_tokens = self.max_tokens;
        if max_new_tokens == 0 {
            let tokens = vec![Vec::new(); prompts.len()];
            return Ok(Texts { tokens, note: String::new(), streamed: false });
        }
        if let Some(num_beams) = self.beams {
            let options = beam::Options { num_beams, max_new_tokens, eos, ..Default::default() };
            let items = generate_beams(model, prompts, &options)?.items;
            let scores: Vec<_> =
                items.iter().map(|item| format!("{:.3}", item.hypotheses[0].score)).collect();
            let note = format!(", mean log-probability a token {}", scores.join(", "));
            let best = items.into_iter().map(|mut item| item.hypotheses.swap_remove(0).tokens);
            return Ok(Texts { tokens: best.collect(), note, streamed: false });
        }
        if let Some(budget) = self.speculative {
            let options =
                dflash::DecodeOptions { max_new_tokens, eos, budget, ..Default::default() };
            let texts = generate_speculatively(model, prompts, &options)?;
            let passes: usize = texts.iter().map(|text| text.cycles).sum();
            let accepted: usize = texts.iter().map(|text| text.accepted).sum();
            let note = format!(", {passes} passes, {accepted} drafted tokens accepted");
            let tokens = texts.into_iter().map(|text| text.tokens).collect();
            return Ok(Texts { tokens, note, streamed: false });
        }
        let choice = self.temperature.map_or(Choice::Greedy, |temperature| {
            let Self { top_k, top_p, min_p, seed, .. } = *self;
            Choice::Sampled(Sampling { temperature, top_k, top_p, min_p, seed })
        });
        let options = GenerateOptions { max_new_tokens, eos: eos.clone(), choice };
        let streamed = prompts.len() == 1 && !self.json;
        let mut out = std::io::stdout().lock();
        // The prompt comes with the first token, when nothing can be wrong with the options any more.
        let mut begin = self.prompt[0].as_bytes();
        let mut written = Ok(());
        let tokens = generate(model, prompts, &options, |_, token| {
            if streamed && written.is_ok() {
                let bytes = tokenizer.token_bytes(token);
                let prompt = out.write_all(std::mem::take(&mut begin));
                written = prompt.and_then(|()| out.write_all(&bytes)).and_then(|()| out.flush());
            }
        })?;
        // There may have been no token. That the reader has gone is no failure.
        written = written.and_then(|()| if streamed { out.write_all(begin) } else { Ok(()) });
        written.or_else(|error| match error.kind() {
            ErrorKind::BrokenPipe => Ok(()),
            _ => Err(error),
        })?;
        Ok(Texts { tokens, note: String::new(), streamed })
    }
}
