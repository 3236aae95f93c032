//! Learning rate and weight decay of each step.

use super::TrainOptions;

impl TrainOptions {
    /// The learning rate of a step (from 0): a linear rise over `warmup` steps, a plateau, and a
    /// linear fall to `final_rate` of it, which the last step reaches.
    pub fn learning_rate_at(&self, step: usize) -> f64 {
        let rise = if self.warmup == 0 { 1.0 } else { (step + 1) as f64 / self.warmup as f64 };
        let falling = self.decay * self.steps as f64;
        let left = (self.steps - 1).saturating_sub(step) as f64;
        let fall = if falling < 1.0 { 1.0 } else { (left / falling).min(1.0) };
        self.learning_rate * rise.min(1.0) * (self.final_rate + (1.0 - self.final_rate) * fall)
    }

    /// The weight decay of a step.
    pub fn weight_decay_at(&self, step: usize) -> f64 {
        let on = (step as f64) < self.weight_decay_until * self.steps as f64;
        if on { self.weight_decay } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_holds_falls() {
        let options =
            TrainOptions { steps: 100, warmup: 10, learning_rate: 1.0, ..Default::default() };
        let rates: Vec<f64> = (0..100).map(|step| options.learning_rate_at(step)).collect();
        assert!((rates[0] - 0.1).abs() < 1e-12 && (rates[4] - 0.5).abs() < 1e-12);
        assert!(rates[9..=69].iter().all(|&rate| rate == 1.0));
        assert!(rates[70..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!((rates[99] - 0.05).abs() < 1e-12);
        // After the last step it stays where it is.
        assert_eq!(options.learning_rate_at(1000), rates[99]);
        assert_eq!([65, 66, 67].map(|step| options.weight_decay_at(step)), [0.1, 0.1, 0.0]);
    }
}
