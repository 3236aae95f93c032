//! The report as a page.

use std::fmt::Write;

use super::TrainReport;

impl TrainReport {
    /// The report in Markdown.
    pub fn markdown(&self) -> String {
        let mut page = String::from("# Training report\n\n| | |\n| --- | --- |\n");
        let mut row = |name: &str, value: String| {
            // Writing to a string does not fail.
            let _ = writeln!(page, "| {name} | {value} |");
        };
        let options = &self.options;
        row("model", self.preset.clone().unwrap_or_else(|| "own configuration".to_owned()));
        row("weights", self.weights.clone());
        row("parameters", self.parameters.to_string());
        row("tokenizer", self.tokenizer.clone());
        row("training text", format!("{} tokens", self.text_tokens));
        let (steps, per_step) = (options.steps, options.tokens_per_step());
        row("trained on", format!("{} tokens: {steps} steps of {per_step}", self.tokens));
        row("seed", options.seed.to_string());
        row(
            "training loss",
            format!("{:.4} nats a token, last tenth of the steps", self.train_loss),
        );
        if let Some(validation) = self.validation {
            row("validation loss", format!("{:.4} nats a token", validation.loss));
            let name = &self.tokenizer;
            row("perplexity", format!("{:.2} ({name} tokens)", validation.perplexity));
            row("bits per byte", format!("{:.4}", validation.bits_per_byte));
            row("validated on", format!("{} tokens", validation.tokens));
        }
        if let Some(zeros) = self.zeros {
            row("zeros", format!("{:.1} % of the ternary weights", zeros * 100.0));
        }
        row("clipped", format!("{:.1} % of the steps", self.clip_rate * 100.0));
        row("speed", format!("{:.0} tokens/s", self.tokens_per_second()));
        row("peak memory", format!("{:.0} MB", self.peak_bytes as f64 / 1e6));
        let leakage = &self.leakage;
        let found = format!("{} of {} windows", leakage.shared, leakage.windows);
        row(
            "shared with validation",
            match leakage.length {
                0 => "not looked for".to_owned(),
                length => format!("{found} of {length} bytes"),
            },
        );
        page.push_str("\n![loss](curve.svg)\n\n");
        page.push_str("| step | training loss | validation loss | zeros | codes flipped a step | clipped | learning rate |\n");
        page.push_str("| --- | --- | --- | --- | --- | --- | --- |\n");
        let optional = |value: Option<f64>, decimals: usize| {
            value.map_or(String::new(), |value| format!("{value:.decimals$}"))
        };
        for point in &self.curve {
            let _ = writeln!(
                page,
                "| {} | {:.4} | {} | {} | {} | {:.2} | {:.2e} |",
                point.step,
                point.train_loss,
                optional(point.validation_loss, 4),
                optional(point.zeros, 4),
                optional(point.flipped, 0),
                point.clip_rate,
                point.learning_rate,
            );
        }
        let _ = write!(page, "\nRepeat it with\n\n```sh\n{}\n```\n", self.command);
        page
    }
}
