//! The score of a sequence, and the best one that a beam can still reach.
//!
//! Equations in `docs/derivation.md`.

/// `logprob / length^alpha`, eq. (1).
///
/// 0 for a `logprob` of 0, whatever the power is; the power may overflow to infinity (the score is -0)
/// or underflow to 0 (it is -inf).
pub(crate) fn normalised(logprob: f64, length: usize, alpha: f64) -> f64 {
    if logprob == 0.0 || logprob == f64::NEG_INFINITY {
        return logprob;
    }
    logprob / (length as f64).powf(alpha)
}

/// No sequence that begins with a beam of `logprob` and has `least..=most` tokens scores above this,
/// eq. (4).
///
/// Log-probabilities are at most 0, so the sum cannot grow; and of all lengths the longest is best where
/// `alpha > 0`, the shortest where `alpha < 0`. The factor makes up for the rounding of powers and
/// quotients.
pub(crate) fn best_reachable(logprob: f64, least: usize, most: usize, alpha: f64) -> f64 {
    let length = if alpha > 0.0 { most } else { least };
    normalised(logprob, length, alpha) * (1.0 - 4.0 * f64::EPSILON)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_larger_alpha_favours_longer_sequences() {
        // The figures of docs/derivation.md.
        assert_eq!(normalised(-2.5, 50, 2.0), -0.001);
        assert!((normalised(-0.5, 5, 2.0) + 0.02).abs() < 1e-15);
        assert!(normalised(-2.5, 50, 0.0) < normalised(-0.5, 5, 0.0));
    }

    #[test]
    fn scores_are_never_nan() {
        for alpha in [-1e308, -2.0, 0.0, 2.0, 1e308] {
            for logprob in [0.0, -0.0, -1e-300, -1.0, -1e300, f64::NEG_INFINITY] {
                for length in [1, 2, 1000] {
                    assert!(!normalised(logprob, length, alpha).is_nan());
                    assert!(!best_reachable(logprob, length, length + 5, alpha).is_nan());
                }
            }
        }
    }

    #[test]
    fn the_bound_holds_for_every_length() {
        for alpha in [-1.5, -1e-17, 0.0, 1e-17, 0.6, 1.0, 3.0] {
            let bound = best_reachable(-7.3, 4, 40, alpha);
            for length in 4..=40 {
                assert!(normalised(-7.3, length, alpha) <= bound, "{alpha} {length}");
            }
        }
    }
}
