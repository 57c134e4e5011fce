//! [`Script`]: how the runs of a job go, attempt by attempt. It is the job's payload.

use std::time::Duration;

use fastrand::Rng;
use serde::{Deserialize, Serialize};

use super::draw::{chance, millis};

/// One step for each attempt; the last is for all further ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script(pub Vec<Step>);

/// How one run goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// How long it takes.
    pub ms: u64,
    /// How it ends.
    pub end: End,
}

/// How a run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The work is done.
    Good,
    /// The work failed; the server decides when it is tried again.
    Bad,
    /// The work is to be tried again after so many milliseconds.
    Snooze(u64),
    /// The work is not to be tried again.
    Kill,
}

impl Step {
    /// How long it takes.
    pub fn lasts(self) -> Duration {
        Duration::from_millis(self.ms)
    }
}

impl Script {
    /// Succeeds after so many milliseconds.
    pub fn good(ms: u64) -> Self {
        Self(vec![Step { ms, end: End::Good }])
    }

    /// Draws one.
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

    /// The step of the attempt after so many failed ones.
    pub fn step(&self, attempts: u32) -> Step {
        let at = usize::try_from(attempts).unwrap_or(usize::MAX).min(self.0.len() - 1);
        self.0[at]
    }
}

/// Most jobs are short, and some hang until their handler's time limit.
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
