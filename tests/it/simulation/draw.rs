//! Helpers that draw random values from a generator.

use std::ops::Range;
use std::time::Duration;

use fastrand::Rng;

/// Returns true with this probability.
pub fn chance(rng: &mut Rng, probability: f64) -> bool {
    rng.f64() < probability
}

/// Draws a duration from a range of milliseconds.
pub fn millis(rng: &mut Rng, range: Range<u64>) -> Duration {
    Duration::from_millis(rng.u64(range))
}

/// Draws one of the items.
pub fn one_of<T: Copy>(rng: &mut Rng, some: &[T]) -> T {
    some[rng.usize(..some.len())]
}
