//! [`Group`]: a child that leads a process group, and the signals, the exit and the cleanup of that group.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitOptions, getpgid, kill_process, kill_process_group, pidfd_send_signal, test_kill_process,
    test_kill_process_group, waitpgid,
};
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::Termination;
use super::census;
use super::child_setup::ChildSetup;
use super::children::Children;
use super::exit_watch::ExitWatch;
use super::poll_until;
use super::spawn::Child;

/// The time limit for a killed group to disappear. A process that is stuck in the kernel, or that belongs to another user, may
/// exceed this limit.
const DEATH_TIMEOUT: Duration = Duration::from_secs(5);

/// The pauses between checks of whether a killed group, including its zombies, has disappeared. After the last pause, only the
/// living processes in /proc count, because an init process that is slow to reap zombies must not delay the job.
const PAUSES: [Duration; 3] = [Duration::from_millis(1), Duration::from_millis(2), Duration::from_millis(4)];

/// The longest pause between two tries to reap a leader that has exited.
const LONGEST_REAP_PAUSE: Duration = Duration::from_millis(50);

/// The resources that a process has used from start to end, including children that it waited for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResourceUsage {
    /// CPU time, in user space and in the kernel.
    pub cpu: Duration,
    /// The peak of resident memory, in bytes. The kernel counts from the fork, when the process still has the worker's memory, so
    /// this is at least the size of the worker.
    pub max_rss: u64,
}

/// The exit status and resource usage of a leader, or the error of the wait.
pub(crate) type WaitResult = io::Result<(ExitStatus, ResourceUsage)>;

/// A process group whose leader is not reaped yet, so that no other process gets the group's number. Dropping a `Group` kills its
/// processes.
#[derive(Debug)]
pub(super) struct Group {
    leader: Pid,
    children: Children,
    exit: ExitWatch,
    setup: Arc<ChildSetup>,
    reaped: bool,
}

impl Group {
    /// Returns the group of a leader that is listed in `children`.
    pub(super) fn of(leader: Child, children: Children) -> Self {
        let Child { id, pidfd, setup } = leader;
        Self { leader: id, children, exit: ExitWatch::of(id, pidfd), setup, reaped: false }
    }

    /// Returns the process id of the leader, which is also the id of the group.
    pub(super) fn id(&self) -> Pid {
        self.leader
    }

    /// Signals the whole group, and also the leader if the leader has moved to another group.
    pub(super) fn signal(&self, signal: Signal) {
        let has_no_group = kill_process_group(self.id(), signal) == Err(Errno::SRCH);
        // A leader that is still in its group has received the signal already. A second signal would run the leader's signal
        // handler twice.
        if has_no_group || getpgid(Some(self.leader)).is_ok_and(|group| group != self.leader) {
            self.signal_leader(signal);
        }
    }

    pub(super) fn signal_leader(&self, signal: Signal) {
        let _ = match self.exit.pidfd() {
            Some(pidfd) => pidfd_send_signal(pidfd, signal),
            None => kill_process(self.id(), signal),
        };
    }

    /// Returns the `Termination` to report if a signal is sent now and the leader ends afterwards. The worker may have no
    /// permission to signal the leader, because the leader may have changed its user since its start.
    pub(super) fn end_by_signal(&self) -> Termination {
        if test_kill_process(self.leader) == Err(Errno::PERM) { Termination::Denied } else { Termination::Stopped }
    }

    /// Signals the leader once it has executed its program. A terminal signal such as SIGINT that arrives earlier is discarded by
    /// the child's setup. On Linux before 5.16, an earlier signal that dumps core would also kill the worker.
    pub(super) async fn signal_program(&self, signal: Signal) {
        self.setup.exec_done().await;
        self.signal_leader(signal);
    }

    /// Waits until the leader has executed its program.
    pub(super) async fn begun(&self) -> io::Result<()> {
        tokio::select! {
            biased;
            () = self.leader_exited() => {}
            () = self.setup.exec_done() => {}
        }
        match self.setup.failure() {
            None => Ok(()),
            Some(error) => {
                // Wait until the leader is a zombie, so that dropping the group reaps the leader at once.
                self.leader_exited().await;
                Err(error)
            }
        }
    }

    /// Waits until the leader is a zombie.
    pub(super) async fn leader_exited(&self) {
        self.exit.exited().await;
    }

    /// Waits until the leader has exited and every other process of the group has ended.
    pub(super) async fn died_out(&self) {
        self.leader_exited().await;
        census::died_out(self.id()).await;
    }

    /// Kills the group, and waits for the leader's exit or for `give_up`, which is polled only after [`DEATH_TIMEOUT`].
    pub(super) async fn kill(&self, give_up: impl Future<Output = ()>) -> Termination {
        let ended = self.end_by_signal();
        self.signal(Signal::KILL);
        if timeout(DEATH_TIMEOUT, self.leader_exited()).await.is_ok() {
            return ended;
        }
        warn_of_survivors(self.leader, test_kill_process(self.leader));
        tokio::select! {
            biased;
            () = self.leader_killed() => ended,
            () = give_up => Termination::GivenUp,
        }
    }

    /// Waits for the leader's exit, and sends the group SIGKILL again at intervals. A leader that ran as another user may meanwhile
    /// have changed back to a user whose processes the worker has permission to signal.
    async fn leader_killed(&self) {
        while timeout(DEATH_TIMEOUT, self.leader_exited()).await.is_err() {
            self.signal(Signal::KILL);
        }
    }

    /// Kills the rest of the group, reaps the leader, and waits up to [`DEATH_TIMEOUT`] until the rest is dead. The leader must
    /// have exited. Its zombie keeps the group's number from being reused before the signal is sent.
    ///
    /// # Errors
    /// When the leader never executed its program.
    pub(super) async fn end(mut self) -> io::Result<WaitResult> {
        let id = self.id();
        // The error is ignored. The group may be empty, or its processes may belong to another user.
        let _ = kill_process_group(id, Signal::KILL);
        let Ok(ended) = timeout(DEATH_TIMEOUT, reap(id)).await else {
            let late = io::Error::new(io::ErrorKind::TimedOut, "another process traces it");
            return self.setup.failure().map_or(Ok(Err(late)), Err);
        };
        self.children.reaped(id);
        self.reaped = true;
        if timeout(DEATH_TIMEOUT, until_gone(id)).await.is_err() {
            warn_of_survivors(id, test_kill_process_group(id));
        }
        self.setup.failure().map_or(Ok(ended), Err)
    }
}

/// Kills the group. A leader that does not exit at once is reaped in another thread, because this thread must not block.
impl Drop for Group {
    fn drop(&mut self) {
        if !self.reaped {
            self.signal(Signal::KILL);
            self.children.reap_killed(self.leader, Arc::clone(&self.setup) as _);
        }
    }
}

/// Logs that processes have outlived SIGKILL, and the error if the worker cannot signal them.
fn warn_of_survivors(group: Pid, signalled: Result<(), Errno>) {
    let error = signalled.err().map(|errno| io::Error::from(errno).to_string());
    warn!(group = group.as_raw_nonzero().get(), error, "killed processes of the job are still there");
}

/// Reaps a child that has exited. Retries, because the kernel hides the exit of a traced child until the debugger has waited for
/// the child.
async fn reap(pid: Pid) -> WaitResult {
    poll_until(LONGEST_REAP_PAUSE, || try_reap(pid).transpose()).await
}

/// Reaps a child and reads its resource usage in one call, without waiting. The safe wrappers of wait do not return the usage.
#[expect(unsafe_code, reason = "wait4 is the only wait that tells what the child has used")]
fn try_reap(pid: Pid) -> io::Result<Option<(ExitStatus, ResourceUsage)>> {
    let mut status = 0;
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `status` and `usage` are valid memory of the right types, and an `rusage` of all zeroes is valid.
    let reaped = unsafe { libc::wait4(pid.as_raw_nonzero().get(), &raw mut status, libc::WNOHANG, usage.as_mut_ptr()) };
    match reaped {
        0 => Ok(None),
        // SAFETY: `wait4` has initialised `usage`.
        1.. => Ok(Some((ExitStatus::from_raw(status), ResourceUsage::from(unsafe { usage.assume_init() })))),
        ..0 => Err(io::Error::last_os_error()),
    }
}

impl From<libc::rusage> for ResourceUsage {
    fn from(usage: libc::rusage) -> Self {
        let seconds = |time: libc::timeval| {
            Duration::new(time.tv_sec.unsigned_abs(), 0) + Duration::from_micros(time.tv_usec.unsigned_abs())
        };
        Self { cpu: seconds(usage.ru_utime) + seconds(usage.ru_stime), max_rss: usage.ru_maxrss.unsigned_abs() * 1024 }
    }
}

/// Waits until no process of a killed group is alive. Polls, because no event signals the end of a group.
async fn until_gone(group: Pid) {
    for pause in PAUSES {
        if is_gone(group) || (reap_orphans_of(group) && is_gone(group)) {
            return;
        }
        sleep(pause).await;
    }
    census::died_out(group).await;
    reap_orphans_of(group);
}

/// Reports whether the group has no process, not even a zombie. Processes that the worker has no permission to signal count as
/// present.
fn is_gone(group: Pid) -> bool {
    test_kill_process_group(group) == Err(Errno::SRCH)
}

/// Reaps the group's zombies, if this process inherited them as process 1 or as a subreaper. `waitpgid` is limited to the group,
/// so no other job loses an exit status. Returns whether any zombie was reaped.
fn reap_orphans_of(group: Pid) -> bool {
    let mut count = 0;
    while let Ok(Some(_)) = waitpgid(group, WaitOptions::NOHANG) {
        count += 1;
    }
    count > 0
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Child as Debugger, Command as StdCommand, Stdio};
    use std::time::Instant;

    use super::*;
    use crate::process::StartMethod;
    use crate::process::spawn::{spawn, tests::setup_of};

    fn sleeping_group() -> Group {
        let child = spawn(setup_of(StartMethod::Sharing, "sleep", None)).unwrap();
        Group::of(child, Children::of_this_process())
    }

    /// Starts a process that traces `id` and never waits for it, so that the tracee's parent cannot reap the tracee.
    #[expect(clippy::disallowed_methods, reason = "a debugger is a process of its own")]
    fn debugger_of(id: Pid) -> Option<Debugger> {
        let (seize, ptrace) = (libc::PTRACE_SEIZE, libc::SYS_ptrace);
        let script =
            format!("$| = 1; print syscall({ptrace}, {seize}, {}, 0, 0) . qq(\\n); sleep 1000", id.as_raw_nonzero());
        let mut debugger = StdCommand::new("perl").args(["-e", &script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(debugger.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if line != "0\n" {
            println!("skipped: this process may not trace its child");
            let_go(debugger);
            return None;
        }
        Some(debugger)
    }

    fn let_go(mut debugger: Debugger) {
        debugger.kill().unwrap();
        debugger.wait().unwrap();
    }

    #[tokio::test]
    async fn a_dropped_group_does_not_hold_up_the_thread() {
        let group = sleeping_group();
        let (id, setup) = (group.id(), Arc::clone(&group.setup));
        setup.exec_done().await;
        let Some(debugger) = debugger_of(id) else { return };
        drop(group);
        assert!(Arc::strong_count(&setup) > 1, "the child is still there");
        let_go(debugger);
        let begun = Instant::now();
        while Arc::strong_count(&setup) > 1 {
            assert!(begun.elapsed() < Duration::from_secs(60));
            sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn a_debugger_of_a_dead_leader_delays_its_job_alone() {
        let group = sleeping_group();
        group.setup.exec_done().await;
        let Some(debugger) = debugger_of(group.id()) else { return };
        // Any signal but SIGKILL would stop the traced leader instead of ending it.
        group.signal(Signal::KILL);
        group.leader_exited().await;
        let let_go = async {
            sleep(Duration::from_millis(20)).await;
            let_go(debugger);
        };
        let (ended, ()) = tokio::join!(group.end(), let_go);
        assert_eq!(ended.unwrap().unwrap().0.signal(), Some(Signal::KILL.as_raw()));
    }
}
