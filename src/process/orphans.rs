//! [`Children`]: which processes somebody here waits for. As process 1 of a container without an init, this process is what
//! orphans are handed to, and they stay zombies until it reaps them; but to reap a child that somebody waits for would take
//! its exit status away.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use futures_util::StreamExt;
use rustix::process::{Pid, WaitOptions, getpid, waitpid};
use signal_hook::consts::SIGCHLD;
use signal_hook_tokio::Signals;
use tokio::time::sleep;

use super::census::zombies_of;

/// A zombie does no harm meanwhile, and every child that ends makes this process look.
const PAUSE: Duration = Duration::from_secs(1);

/// The children that are waited for; clones are of one list. Kept by process 1 alone.
#[derive(Debug, Clone)]
pub(crate) struct Children(Option<Arc<Waited>>);

#[derive(Debug, Default)]
struct Waited {
    /// Shared by those that start children, until these are on the list.
    starting: RwLock<()>,
    /// A number may be given anew before its last holder is off the list.
    pids: Mutex<HashMap<Pid, usize>>,
}

impl Children {
    /// Of this process.
    pub(crate) fn of_this_process() -> Self {
        Self((getpid() == Pid::INIT).then(Arc::default))
    }

    /// Starts a child that will be waited for.
    pub(super) fn start<C>(&self, spawn: impl FnOnce() -> io::Result<C>, id: impl Fn(&C) -> Pid) -> io::Result<C> {
        let Some(waited) = &self.0 else { return spawn() };
        let _starting = waited.starting.read().unwrap_or_else(PoisonError::into_inner);
        let child = spawn()?;
        *waited.pids().entry(id(&child)).or_default() += 1;
        Ok(child)
    }

    /// Notes that a child has been reaped by whoever waited for it.
    pub(super) fn reaped(&self, pid: Pid) {
        let Some(waited) = &self.0 else { return };
        let mut pids = waited.pids();
        if let Some(count) = pids.get_mut(&pid) {
            *count -= 1;
            if *count == 0 {
                pids.remove(&pid);
            }
        }
    }

    /// Reaps what is handed to this process, for as long as it is polled. Ends at once where nothing is.
    ///
    /// # Errors
    /// When the operating system refuses the signal handler.
    pub(crate) async fn reap_orphans(self) -> io::Result<()> {
        let Some(waited) = self.0 else { return Ok(()) };
        let mut deaths = Signals::new([SIGCHLD])?;
        loop {
            waited.reap_others();
            sleep(PAUSE).await;
            if deaths.next().await.is_none() {
                return Ok(());
            }
        }
    }
}

impl Waited {
    fn pids(&self) -> MutexGuard<'_, HashMap<Pid, usize>> {
        self.pids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reap_others(&self) {
        // Nobody is between its start and the list now.
        let _none_starts = self.starting.write().unwrap_or_else(PoisonError::into_inner);
        for pid in zombies_of(getpid()).filter(|pid| !self.pids().contains_key(pid)) {
            // Whoever knows the group may have been faster.
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> (Arc<Waited>, Children) {
        let waited = Arc::new(Waited::default());
        (Arc::clone(&waited), Children(Some(waited)))
    }

    #[test]
    fn no_orphan_is_looked_for_between_a_start_and_its_note() {
        let (waited, children) = kept();
        let start = || {
            assert!(waited.starting.try_write().is_err());
            Ok(Pid::INIT)
        };
        children.start(start, |pid| *pid).unwrap();
        assert!(waited.starting.try_write().is_ok() && waited.pids().contains_key(&Pid::INIT));
    }

    #[test]
    fn a_number_is_on_the_list_until_the_last_child_that_had_it_is_off() {
        let (waited, children) = kept();
        for _ in 0..2 {
            children.start(|| Ok(Pid::INIT), |pid| *pid).unwrap();
        }
        children.reaped(Pid::INIT);
        assert!(waited.pids().contains_key(&Pid::INIT));
        children.reaped(Pid::INIT);
        assert!(waited.pids().is_empty());
    }
}
