//! [`Reaper`]: reaps killed children that no job waits for. Its thread runs only while there are such children.

use std::any::Any;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use rustix::process::{Pid, WaitOptions, waitpid};

use super::children::Children;
use crate::lock::lock;

/// The first pause between two polls of the killed children.
const FIRST_PAUSE: Duration = Duration::from_millis(1);

/// The longest pause between two polls of the killed children.
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// A child that has been killed and is not reaped yet.
#[derive(Debug)]
pub(super) struct Killed {
    pub(super) id: Pid,
    /// The memory that the child may use until it ends, kept alive until the child is reaped.
    pub(super) _memory: Arc<dyn Any + Send + Sync>,
    /// The list that contains the child until the child is reaped.
    pub(super) children: Children,
}

/// The list of killed children that are not reaped yet. Clones share the list.
#[derive(Debug, Clone, Default)]
pub(super) struct Reaper(Arc<ReaperShared>);

#[derive(Debug, Default)]
struct ReaperShared {
    state: Mutex<ReaperState>,
    added: Condvar,
}

#[derive(Debug, Default)]
struct ReaperState {
    killed: Vec<Killed>,
    has_thread: bool,
}

impl Reaper {
    /// Reaps the child now if it has ended, otherwise later in the reaper's thread. Never blocks.
    pub(super) fn take(&self, killed: Killed) {
        if killed.is_reaped() {
            return;
        }
        let mut state = lock(&self.0.state);
        state.killed.push(killed);
        if !state.has_thread {
            let reaper = self.clone();
            // If the thread cannot be started, a later call to `take` tries again.
            state.has_thread = Builder::new().name("reaper".to_owned()).spawn(move || reaper.run()).is_ok();
        }
        self.0.added.notify_one();
    }

    /// Polls the killed children until all are reaped.
    fn run(&self) {
        let mut pause = FIRST_PAUSE;
        let mut state = lock(&self.0.state);
        loop {
            state.killed.retain(|killed| !killed.is_reaped());
            if state.killed.is_empty() {
                state.has_thread = false;
                return;
            }
            let (woken, waited) = self.0.added.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            pause = if waited.timed_out() { (pause * 2).min(LONGEST_PAUSE) } else { FIRST_PAUSE };
        }
    }
}

impl Killed {
    /// Reaps the child if it has ended. Returns false if the child is still alive.
    fn is_reaped(&self) -> bool {
        if matches!(waitpid(Some(self.id), WaitOptions::NOHANG), Ok(None)) {
            return false;
        }
        self.children.reaped(self.id);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Instant;

    use rustix::process::{Signal, kill_process};

    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "any child will do, and nothing else runs in this thread")]
    fn a_killed_child_is_reaped_in_another_thread() {
        let (reaper, memory) = (Reaper::default(), Arc::new(()));
        let children = Children::of_this_process();
        let ids = [(); 3].map(|()| Pid::from_child(&Command::new("sleep").arg("1000").spawn().unwrap()));
        for id in ids {
            // The children are still alive, so the test would hang here if `take` waited for them.
            let _memory = Arc::clone(&memory) as _;
            reaper.take(Killed { id, _memory, children: children.clone() });
        }
        assert_eq!(Arc::strong_count(&memory), 4);
        for id in ids {
            kill_process(id, Signal::KILL).unwrap();
        }
        let begun = Instant::now();
        while Arc::strong_count(&memory) > 1 || lock(&reaper.0.state).has_thread {
            assert!(begun.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(ids.iter().all(|id| waitpid(Some(*id), WaitOptions::NOHANG).is_err()));
    }
}
