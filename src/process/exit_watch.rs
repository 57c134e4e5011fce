//! [`ExitWatch`]: waits for the exit of a child, but does not reap the child.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::poll_until;

/// The longest pause between two polls of a child.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// The source of the exit event of a child.
#[derive(Debug)]
pub(super) enum ExitWatch {
    /// The reactor: a pidfd becomes readable at the exit of its process.
    Reactor(AsyncFd<OwnedFd>),
    /// Polling at intervals, if there is no pidfd or its registration with epoll has failed.
    Intervals { child: Pid, pidfd: Option<OwnedFd> },
}

impl ExitWatch {
    /// Returns a watch for a child of this process. No other code may reap the child while the watch is in use.
    #[expect(unsafe_code, reason = "the reactor has no safe way in for a pidfd")]
    pub(super) fn of(child: Pid, pidfd: Option<OwnedFd>) -> Self {
        let Some(pidfd) = pidfd else { return Self::Intervals { child, pidfd: None } };
        // SAFETY: an `OwnedFd` stays open, under the same number, for as long as the `AsyncFd` owns it.
        match unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) } {
            Ok(pidfd) => Self::Reactor(pidfd),
            // The child is already running, so poll instead of failing its job.
            Err(refused) => Self::Intervals { child, pidfd: Some(refused.into_parts().0) },
        }
    }

    pub(super) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Reactor(pidfd) => Some(pidfd.get_ref().as_fd()),
            Self::Intervals { pidfd, .. } => pidfd.as_ref().map(AsFd::as_fd),
        }
    }

    /// Waits until the child is a zombie.
    pub(super) async fn exited(&self) {
        match self {
            // `readable` fails only when the runtime shuts down, which drops this task too.
            Self::Reactor(pidfd) => drop(pidfd.readable().await),
            Self::Intervals { child, .. } => poll_until(LONGEST_PAUSE, || has_exited(*child).then_some(())).await,
        }
    }
}

/// Reports whether a child is a zombie, or has been reaped by other code of this process.
fn has_exited(child: Pid) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    match waitid(WaitId::Pid(child), options) {
        Ok(status) => status.is_some(),
        Err(errno) => errno != rustix::io::Errno::INTR,
    }
}
