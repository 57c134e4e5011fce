//! [`ReadDelay`]: a short delay before the first read of a child's output. Children share timers.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::{FutureExt, Shared};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::lock::lock;

/// The minimum delay between the start of a child that has all its input and the first read of its output. Most children exit
/// within this time, so that one read returns their whole output. Even a command that takes one millisecond on an idle machine
/// takes several milliseconds on a busy one.
const LEAST: Duration = Duration::from_millis(5);

/// The maximum delay. Children that start within `MOST - LEAST` of each other share a timer, because a timer for each child would
/// cost more than the reads that the delay saves.
const MOST: Duration = Duration::from_millis(10);

/// The read delay of all children. Clones share the same timer.
#[derive(Debug, Clone, Default)]
pub(crate) struct ReadDelay(Arc<Mutex<Option<Latest>>>);

#[derive(Debug)]
struct Latest {
    end: Instant,
    over: Shared<Pin<Box<Sleep>>>,
}

impl ReadDelay {
    /// Returns a future that completes at the end of the read delay of a new child. The delay begins with this call.
    pub(super) fn for_new_child(&self) -> impl Future<Output = ()> + use<> {
        let now = Instant::now();
        let mut latest = lock(&self.0);
        match &*latest {
            Some(Latest { end, over }) if now + LEAST <= *end => over.clone(),
            _ => {
                let end = now + MOST;
                let over = Box::pin(sleep_until(end)).shared();
                *latest = Some(Latest { end, over: over.clone() });
                over
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_delay_is_five_to_ten_milliseconds() {
        let read_delay = ReadDelay::default();
        let mut passed = Vec::new();
        for number in 0..20 {
            let (start, over) = (Instant::now(), read_delay.for_new_child());
            let child = tokio::spawn(async move {
                over.await;
                start.elapsed()
            });
            match number {
                // Aborting one child does not stop the timer for the others.
                0 => child.abort(),
                _ => passed.push(child),
            }
            tokio::time::advance(Duration::from_micros(700)).await;
        }
        for child in passed {
            let passed = child.await.unwrap();
            // The runtime's timers have a resolution of a millisecond.
            assert!((LEAST..=MOST + Duration::from_millis(1)).contains(&passed), "{passed:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn children_that_are_started_together_share_a_timer() {
        let read_delay = ReadDelay::default();
        let ends: Vec<_> = (0..10)
            .map(|_| {
                drop(read_delay.for_new_child());
                read_delay.0.lock().unwrap().as_ref().unwrap().end
            })
            .collect();
        assert!(ends.iter().all(|end| *end == ends[0]));
    }
}
