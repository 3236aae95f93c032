//! `train`: trains a model, with a progress bar, checkpoints and a report.

mod bar;
mod run;
mod texts;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use ternary_train::formats::read_folder;
use ternary_train::{
    Config, Preset, Projection, Rule, Tokenizer, TrainOptions, Trainer, Weights, load_checkpoint,
    shell_line,
};

use super::values::{at_least_one, bpe, of_command_line, positive};
use run::{Progress, Run};
pub(super) use texts::Texts;

/// Train a model.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    start: Start,
    /// Where checkpoint, model and report go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Go on from the checkpoint in --out, with its texts and options
    #[arg(long)]
    resume: bool,
    /// Threads. Default: all
    #[arg(long)]
    threads: Option<usize>,
    /// No progress bar
    #[arg(long)]
    quiet: bool,
}

/// How a training starts. What goes on has all of this from its checkpoint.
#[derive(clap::Args)]
#[command(mut_args(|arg| arg.conflicts_with("resume")))]
struct Start {
    /// Texts to train on, UTF-8. Default: the documentation of this workspace
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Other texts to measure with. Default: the end of the training texts, held out
    #[arg(long, value_name = "FILE", num_args = 1..)]
    val: Vec<PathBuf>,
    /// Fraction of the texts that is held out if there is no --val
    #[arg(long, default_value_t = 0.1, conflicts_with = "val")]
    val_fraction: f64,
    /// Refuse a validation text that shares windows of this many bytes with the training text; 0: do
    /// not look
    #[arg(long, value_name = "BYTES", default_value_t = 100)]
    guard: usize,
    /// nano, small or path-b
    #[arg(long, default_value = "nano")]
    preset: Preset,
    /// Train the float twin: same seed, same order of the data
    #[arg(long)]
    float: bool,
    /// Start from the float weights of this folder instead of random ones, with its tokenizer if it has one
    #[arg(long, value_name = "DIR")]
    init: Option<PathBuf>,
    /// Tokens of a byte-level BPE learnt from the training text; 0: bytes. Default: 0
    #[arg(long, value_name = "TOKENS", value_parser = bpe)]
    bpe: Option<usize>,
    /// Give the head weights of its own instead of the embedding's
    #[arg(long, conflicts_with = "init")]
    untied: bool,
    /// Base of the rotary frequencies. Default: 50 nano, 100 others
    #[arg(long, conflicts_with = "init")]
    rope_theta: Option<f64>,
    /// Scale rule: absmean, twn or optimal
    #[arg(long, default_value = "absmean", conflicts_with = "float")]
    rule: Rule,
    /// Weights that share a scale: a multiple of 32 up to 256
    #[arg(long, default_value_t = 128, conflicts_with = "float")]
    group: usize,
    /// Steps. Default: 2000 nano, 3000 small, 1000 path-b
    #[arg(long, value_parser = at_least_one())]
    steps: Option<usize>,
    /// Sequences of a batch. Default: 12 nano, 32 small, 16 path-b
    #[arg(long, value_parser = at_least_one())]
    batch: Option<usize>,
    /// Tokens of a sequence. Default: 64 nano, 128 others
    #[arg(long, value_parser = at_least_one())]
    context: Option<usize>,
    /// Batches of one update
    #[arg(long, default_value_t = 1, value_parser = at_least_one())]
    accumulate: usize,
    /// Highest learning rate. Default: 2.5e-3 nano, 2e-3 small, 1.5e-3 path-b; 2e-3 float
    #[arg(long, value_parser = positive)]
    lr: Option<f64>,
    /// Factor of it for embedding and head. Default: 0.5, 1 float
    #[arg(long, value_parser = positive)]
    embedding_rate: Option<f64>,
    /// Factor of it for o and down, which add to the residual stream. Default: 0.35, 1 float
    #[arg(long, value_parser = positive)]
    residual_rate: Option<f64>,
    /// Factor of it for norms. Default: 1
    #[arg(long, value_parser = positive)]
    norm_rate: Option<f64>,
    /// Steps in which the learning rate rises. Default: 40 nano, 100 others
    #[arg(long)]
    warmup: Option<usize>,
    /// Fraction of the steps in which it falls at the end. Default: 0.5 nano, 0.3 others
    #[arg(long)]
    decay: Option<f64>,
    /// What it falls to, as a fraction. Default: 0.01 nano, 0.05 others
    #[arg(long)]
    final_rate: Option<f64>,
    /// Weight decay of the matrices. Default: 0.1
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Fraction of the steps after which there is none. Default: 2/3
    #[arg(long)]
    weight_decay_until: Option<f64>,
    /// AdamW's first beta. Default: 0.8
    #[arg(long)]
    beta1: Option<f64>,
    /// AdamW's second beta. Default: 0.95
    #[arg(long)]
    beta2: Option<f64>,
    /// Largest norm of the gradients. Default: 1
    #[arg(long, value_parser = positive)]
    clip: Option<f64>,
    /// Steps at the start that are trained as float; if all are, so is the model
    #[arg(long, default_value_t = 0, conflicts_with = "float")]
    float_steps: usize,
    /// Keep embedding and head float, to measure what they cost
    #[arg(long, conflicts_with = "float")]
    float_embedding: bool,
    /// Round the inputs of linear layers to 8 bits
    #[arg(long)]
    eight_bit: bool,
    /// Seed of the weights and of the order of the data
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Steps between validations
    #[arg(long, default_value_t = 250, value_parser = at_least_one())]
    eval_every: usize,
    /// Windows of a validation on the way; the last one takes five times as many
    #[arg(long, default_value_t = 300, value_parser = at_least_one())]
    eval_windows: usize,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 250, value_parser = at_least_one())]
    checkpoint_every: usize,
}

/// What a checkpoint says about the run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Note {
    pub(super) command: String,
    pub(super) preset: Option<String>,
    pub(super) texts: Texts,
    pub(super) eval_every: usize,
    pub(super) eval_windows: usize,
    pub(super) checkpoint_every: usize,
    pub(super) progress: Progress,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(threads) = args.threads {
        ensure!((1..=1024).contains(&threads), "--threads is {threads}, expected 1 to 1024");
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let checkpoint = args.out.join("checkpoint.safetensors");
    if !args.resume && checkpoint.exists() {
        bail!(
            "{} is of a run before: continue it with --resume, choose another --out, or delete that file",
            checkpoint.display(),
        );
    }
    if args.resume {
        let (trainer, note) = load_checkpoint(&checkpoint)?;
        let note: Note =
            serde_json::from_str(&note).context("the checkpoint is of another kind")?;
        make_writable(&args.out)?;
        let data = note.texts.load_again(&args.out)?;
        note.texts.check(&data, trainer.options().length)?;
        return Run { out: &args.out, quiet: args.quiet, note, data, trainer }.run();
    }
    let start = &args.start;
    let init = start.read_init()?;
    let bpe = start.bpe.unwrap_or(0);
    let mut texts = Texts::new(&start.text, &start.val, start.val_fraction, start.guard, bpe)?;
    let data = texts.load(start.own_tokenizer())?;
    let options = start.options();
    texts.check(&data, options.length)?;
    let mut config = start.preset.config(data.tokenizer.vocab_size());
    let weights = match init {
        Some((own, weights)) => {
            config = Config { ternary: None, ..own };
            ensure!(
                config.vocab_size >= data.tokenizer.vocab_size(),
                "--init has a vocabulary of {}, the tokenizer one of {}",
                config.vocab_size,
                data.tokenizer.vocab_size(),
            );
            Some(weights)
        }
        None => None,
    };
    if start.untied {
        config.tie_word_embeddings = false;
    }
    if let Some(theta) = start.rope_theta {
        config.rope_theta = theta;
    }
    if !start.float {
        let projection = Projection { rule: start.rule, group: start.group };
        projection.check().map_err(of_command_line)?;
        config.ternary = Some(projection);
    }
    let weights = match weights {
        Some(weights) => weights,
        None => Weights::random(&config, start.seed)?,
    };
    let trainer = Trainer::new(&config, &options, &weights).map_err(of_command_line)?;
    make_writable(&args.out)?;
    data.tokenizer.write(&args.out)?;
    texts.note_tokenizer(&args.out)?;
    let note = Note {
        command: command(),
        preset: start.init.is_none().then(|| start.preset.name().to_owned()),
        texts,
        eval_every: start.eval_every,
        eval_windows: start.eval_windows,
        checkpoint_every: start.checkpoint_every,
        progress: Progress::default(),
    };
    Run { out: &args.out, quiet: args.quiet, note, data, trainer }.run()
}

/// The command that was given, as a shell takes it apart; for people, so what is not UTF-8 in it is replaced.
fn command() -> String {
    let words: Vec<_> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    shell_line(&words)
}

/// Makes the folder if it is not there, and sees that it can be written.
fn make_writable(out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("--out {}", out.display()))?;
    tempfile::tempfile_in(out)
        .with_context(|| format!("--out {} cannot be written", out.display()))?;
    Ok(())
}

impl Start {
    /// The folder of `--init`, if it has a tokenizer.
    fn own_tokenizer(&self) -> Option<&Path> {
        self.init.as_deref().filter(|folder| folder.join(Tokenizer::FILE).exists())
    }

    /// The model of `--init`.
    fn read_init(&self) -> Result<Option<(Config, Weights)>> {
        let Some(folder) = &self.init else { return Ok(None) };
        if self.bpe.is_some() && self.own_tokenizer().is_some() {
            bail!(
                "--bpe: the model of --init has a tokenizer of its own, and its weights are for that"
            );
        }
        let (config, weights) = read_folder(folder)?;
        if config.ternary.is_some() && !self.float {
            bail!(
                "--init: the model is ternary already; projecting it again would change its scales. \
                 Start from a float model, or go on with --float"
            );
        }
        Ok(Some((config, weights)))
    }

    /// The recipe of the preset, with what was asked for.
    fn options(&self) -> TrainOptions {
        let default = self.preset.options(self.float);
        TrainOptions {
            steps: self.steps.unwrap_or(default.steps),
            sequences: self.batch.unwrap_or(default.sequences),
            length: self.context.unwrap_or(default.length),
            accumulate: self.accumulate,
            learning_rate: self.lr.unwrap_or(default.learning_rate),
            warmup: self.warmup.unwrap_or(default.warmup),
            decay: self.decay.unwrap_or(default.decay),
            final_rate: self.final_rate.unwrap_or(default.final_rate),
            weight_decay: self.weight_decay.unwrap_or(default.weight_decay),
            weight_decay_until: self.weight_decay_until.unwrap_or(default.weight_decay_until),
            embedding_rate: self.embedding_rate.unwrap_or(default.embedding_rate),
            residual_rate: self.residual_rate.unwrap_or(default.residual_rate),
            norm_rate: self.norm_rate.unwrap_or(default.norm_rate),
            beta1: self.beta1.unwrap_or(default.beta1),
            beta2: self.beta2.unwrap_or(default.beta2),
            clip: self.clip.unwrap_or(default.clip),
            float_steps: self.float_steps,
            float_embedding: self.float_embedding,
            eight_bit_activations: self.eight_bit,
            seed: self.seed,
            ..default
        }
    }
}
