//! What three scale rules make of a Gaussian matrix: share of zeros and share of the variance lost.

use ternary_train::{Config, Error, Preset, Projection, Rule, Weights};

fn main() -> Result<(), Error> {
    let config = Config { num_hidden_layers: 1, ..Preset::PathB.config(256) };
    let weights = Weights::random(&config, 1)?;
    let w = &weights.layers[0].gate;
    for rule in Rule::ALL {
        let projection = Projection { rule, ..Projection::default() };
        let mut out = w.clone();
        let counts = projection.project_into(&mut out, w)?;
        let lost = (w - &out).mapv(|d| d * d).sum() / w.mapv(|x| x * x).sum();
        let zeros = counts.zeros as f64 / counts.weights as f64;
        println!("{:8} zeros {zeros:.3}, variance lost {lost:.3}", rule.name());
    }
    Ok(())
}
