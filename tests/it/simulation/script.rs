//! [`Script`]: the duration and result of each attempt of a job. The script is the job's payload.

use std::time::Duration;

use fastrand::Rng;
use serde::{Deserialize, Serialize};

use super::draw::{chance, millis};

/// A list with one step per attempt. The last step also applies to all later attempts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script(pub Vec<Step>);

/// The duration and result of one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The duration of the run in milliseconds.
    pub ms: u64,
    /// The result of the run.
    pub end: End,
}

/// The result of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// A success.
    Good,
    /// A failure. The server decides when to retry.
    Bad,
    /// A failure with a retry after this many milliseconds.
    Snooze(u64),
    /// A failure without a retry.
    Kill,
}

impl Step {
    /// Returns the duration of the run.
    pub fn lasts(self) -> Duration {
        Duration::from_millis(self.ms)
    }
}

impl Script {
    /// Returns a script that succeeds after this many milliseconds.
    pub fn good(ms: u64) -> Self {
        Self(vec![Step { ms, end: End::Good }])
    }

    /// Returns a script whose first attempt fails immediately, and whose later attempts succeed immediately.
    pub fn bad_then_good() -> Self {
        Self(vec![Step { ms: 0, end: End::Bad }, Step { ms: 0, end: End::Good }])
    }

    /// Draws a random script.
    pub fn draw(rng: &mut Rng) -> Self {
        let step = |rng: &mut Rng, end| Step { ms: lasting(rng), end };
        let (end, times) = match rng.u8(0..20) {
            0..14 => (End::Good, 0),
            14 | 15 => (End::Bad, rng.usize(1..3)),
            16 => (End::Bad, usize::MAX),
            17 | 18 => (End::Snooze(rng.u64(0..8000)), rng.usize(1..4)),
            _ => (End::Kill, 0),
        };
        match times {
            usize::MAX => Self(vec![step(rng, end)]),
            0 => Self(vec![step(rng, end)]),
            times => {
                let mut steps: Vec<Step> = (0..times).map(|_| step(rng, end)).collect();
                steps.push(step(rng, End::Good));
                Self(steps)
            }
        }
    }

    /// Returns the step for the attempt that follows this many failed attempts.
    pub fn step(&self, attempts: u32) -> Step {
        let at = usize::try_from(attempts).unwrap_or(usize::MAX).min(self.0.len() - 1);
        self.0[at]
    }
}

/// Draws the duration of a run in milliseconds. Most runs are short. A few are very long, like a handler that hangs until
/// its timeout.
fn lasting(rng: &mut Rng) -> u64 {
    let range = match rng.u8(0..100) {
        0..30 => return 0,
        30..70 => 1..300,
        70..90 => 300..2000,
        90..98 => 2000..10_000,
        _ => 20_000..100_000,
    };
    u64::try_from(millis(rng, range).as_millis()).unwrap_or(0) + u64::from(chance(rng, 0.5))
}
