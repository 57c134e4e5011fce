//! [`Children`]: the list of child processes that jobs wait for. A scan for orphans skips these children.
//!
//! The kernel gives orphans to process 1 of a container, or to a subreaper (`PR_SET_CHILD_SUBREAPER`). If this process is one of
//! these, orphans stay zombies until this process reaps them. But the scan must not reap a child that a job waits for, because
//! the job would lose the child's exit status.

use std::any::Any;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use futures_util::StreamExt;
use rustix::process::{Pid, WaitOptions, child_subreaper, getpid, waitpid};
use signal_hook::consts::SIGCHLD;
use signal_hook_tokio::Signals;
use tokio::time::sleep;

use super::census::zombies_of;
use super::reaper::{Killed, Reaper};
use crate::lock::lock;

/// The minimum pause between two scans for orphans. A SIGCHLD during or after the pause triggers the next scan. Until the scan, a
/// zombie does no harm.
const PAUSE: Duration = Duration::from_secs(1);

/// The children of this process. Clones share one list.
#[derive(Debug, Clone)]
pub(crate) struct Children {
    /// The children that jobs wait for, which a scan for orphans must not reap. `None` if this process does not inherit orphans.
    waited: Option<Arc<Waited>>,
    reaper: Reaper,
}

#[derive(Debug, Default)]
struct Waited {
    /// The lock that is held for reading while a child is started, until the child is in `pids`.
    starting: RwLock<()>,
    /// The number of listed children by process id. An id can be reused before the previous child with that id is removed.
    pids: Mutex<HashMap<Pid, usize>>,
}

impl Children {
    /// Returns an empty list for this process.
    pub(crate) fn of_this_process() -> Self {
        Self { waited: inherits_orphans().then(Arc::default), reaper: Reaper::default() }
    }

    /// Starts a child that a job waits for, and adds the child to the list.
    pub(super) fn start<C>(&self, spawn: impl FnOnce() -> io::Result<C>, id: impl Fn(&C) -> Pid) -> io::Result<C> {
        let Some(waited) = &self.waited else { return spawn() };
        let _starting = waited.starting.read().unwrap_or_else(PoisonError::into_inner);
        let child = spawn()?;
        *lock(&waited.pids).entry(id(&child)).or_default() += 1;
        Ok(child)
    }

    /// Reaps a killed child that no job waits for, without blocking. `memory` is kept until the child has ended.
    pub(super) fn reap_killed(&self, id: Pid, memory: Arc<dyn Any + Send + Sync>) {
        self.reaper.take(Killed { id, _memory: memory, children: self.clone() });
    }

    /// Removes a reaped child from the list.
    pub(super) fn reaped(&self, pid: Pid) {
        let Some(waited) = &self.waited else { return };
        let mut pids = lock(&waited.pids);
        if let Some(count) = pids.get_mut(&pid) {
            *count -= 1;
            if *count == 0 {
                pids.remove(&pid);
            }
        }
    }

    /// Reaps inherited orphans for as long as the future is polled. Returns at once if this process does not inherit orphans.
    pub(crate) async fn reap_orphans(self) -> io::Result<()> {
        let Some(waited) = self.waited else { return Ok(()) };
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

/// Reports whether this process inherits orphans: as process 1, or as a subreaper. A program that ran in this process earlier may
/// have made the process a subreaper, because the attribute survives `execve`.
fn inherits_orphans() -> bool {
    getpid() == Pid::INIT || child_subreaper().is_ok_and(|subreaper| subreaper.is_some())
}

impl Waited {
    fn reap_others(&self) {
        // While this lock is held, every started child is in `pids`, so any other zombie is an orphan.
        let _none_starts = self.starting.write().unwrap_or_else(PoisonError::into_inner);
        for pid in zombies_of(getpid()).filter(|pid| !lock(&self.pids).contains_key(pid)) {
            // The error is ignored, because the job of the orphan's group may have reaped the orphan first.
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> (Arc<Waited>, Children) {
        let waited = Arc::new(Waited::default());
        (Arc::clone(&waited), Children { waited: Some(waited), reaper: Reaper::default() })
    }

    #[test]
    fn no_orphan_is_reaped_between_a_start_and_its_note() {
        let (waited, children) = kept();
        let start = || {
            assert!(waited.starting.try_write().is_err());
            Ok(Pid::INIT)
        };
        children.start(start, |pid| *pid).unwrap();
        assert!(waited.starting.try_write().is_ok() && lock(&waited.pids).contains_key(&Pid::INIT));
    }

    #[test]
    fn a_reused_id_stays_listed_until_its_last_child_is_reaped() {
        let (waited, children) = kept();
        for _ in 0..2 {
            children.start(|| Ok(Pid::INIT), |pid| *pid).unwrap();
        }
        children.reaped(Pid::INIT);
        assert!(lock(&waited.pids).contains_key(&Pid::INIT));
        children.reaped(Pid::INIT);
        assert!(lock(&waited.pids).is_empty());
    }
}
