//! [`Group`]: a child that leads a process group, and the group's end.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{
    Pid, Signal, WaitOptions, kill_process, kill_process_group, pidfd_send_signal, test_kill_process_group, waitpgid,
};
use tracing::warn;

use super::birth::Birth;
use super::census;
use super::exit_watch::ExitWatch;
use super::orphans::Children;
use super::spawn::Child;

/// How long a killed group may take to be gone. Only a process stuck in the kernel needs longer.
const DEATH_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the dead may take to be reaped by whoever inherits them, before it is asked whether they are no more than dead.
const PATIENCE_WITH_THE_DEAD: Duration = Duration::from_millis(32);

/// What a process has used, from its birth to its end, children that it waited for included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// CPU time, in user space and in the kernel.
    pub cpu: Duration,
    /// The most memory that it had resident at once, in bytes. The kernel counts from the fork: not less than the
    /// worker's own size.
    pub max_rss: u64,
}

/// The leader's status and what it used, if they could be had.
pub(super) type Ended = io::Result<(ExitStatus, Usage)>;

/// A process group whose leader has not been reaped, so that its number is its own. Dropped before, it is killed.
#[derive(Debug)]
pub(super) struct Group {
    leader: Pid,
    children: Children,
    exit: ExitWatch,
    birth: Arc<Birth>,
    reaped: bool,
}

impl Group {
    /// The group of a child that was started among `children` as a leader.
    pub(super) fn of(leader: Child, children: Children) -> Self {
        let Child { id, pidfd, birth } = leader;
        Self { leader: id, children, exit: ExitWatch::of(id, pidfd), birth, reaped: false }
    }

    /// The leader's process id, which is the group's too.
    pub(super) fn id(&self) -> Pid {
        self.leader
    }

    /// Signals the whole group. That nobody is left to hear it is no error.
    pub(super) fn signal(&self, signal: Signal) {
        let _ = kill_process_group(self.id(), signal);
    }

    /// Kills the whole group, and the leader wherever it has gone: a leader may leave its group.
    pub(super) fn kill(&self) {
        self.signal(Signal::KILL);
        self.signal_leader(Signal::KILL);
    }

    /// Signals the leader alone.
    fn signal_leader(&self, signal: Signal) {
        let _ = match self.exit.pidfd() {
            Some(pidfd) => pidfd_send_signal(pidfd, signal),
            None => kill_process(self.id(), signal),
        };
    }

    /// Signals the leader as soon as it is the program: before, a signal may be taken for one of the terminal's, and one that
    /// dumps core would take this process along under Linux before 5.16.
    pub(super) async fn signal_program(&self, signal: Signal) {
        self.birth.over().await;
        self.signal_leader(signal);
    }

    /// Waits until the leader has become its program.
    ///
    /// # Errors
    /// When the leader cannot: why.
    pub(super) async fn begun(&self) -> io::Result<()> {
        tokio::select! {
            biased;
            () = self.leader_exited() => {}
            () = self.birth.over() => {}
        }
        match self.birth.failure() {
            None => Ok(()),
            Some(error) => {
                // Reaping it then takes no time.
                self.leader_exited().await;
                Err(error)
            }
        }
    }

    /// Waits until the leader is a zombie.
    pub(super) async fn leader_exited(&self) {
        self.exit.exited().await;
    }

    /// Waits until the leader has exited and nobody else of the group lives.
    pub(super) async fn died_out(&self) {
        self.leader_exited().await;
        census::died_out(self.id()).await;
    }

    /// Kills what is left of the group, reaps the leader, which has exited, and sees the rest dead. The zombie keeps the
    /// group's number from being given to anyone else until the signal has been sent.
    ///
    /// # Errors
    /// When the leader never became its program: why it did not.
    pub(super) async fn end(mut self) -> io::Result<Ended> {
        let id = self.id();
        self.signal(Signal::KILL);
        let ended = reap(id);
        self.children.reaped(id);
        self.reaped = true;
        if tokio::time::timeout(DEATH_TIMEOUT, until_gone(id)).await.is_err() {
            warn!(group = id.as_raw_nonzero().get(), "killed processes of the job are still there");
        }
        self.birth.failure().map_or(Ok(ended), Err)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill();
            let _ = reap(self.leader);
            self.children.reaped(self.id());
        }
    }
}

/// One call that reaps and accounts; the safe wrappers of wait leave the accounts out.
#[expect(unsafe_code, reason = "wait4 is the only wait that tells what the child has used")]
fn reap(pid: Pid) -> Ended {
    let mut status = 0;
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    loop {
        // SAFETY: both pointers are to live memory of the right type, and all zeroes is a valid `rusage`.
        let reaped = unsafe { libc::wait4(pid.as_raw_nonzero().get(), &raw mut status, 0, usage.as_mut_ptr()) };
        let error = io::Error::last_os_error();
        if reaped > 0 {
            // SAFETY: see above; the call has filled it in.
            let usage = unsafe { usage.assume_init() };
            return Ok((ExitStatus::from_raw(status), Usage::from(usage)));
        }
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

impl From<libc::rusage> for Usage {
    fn from(usage: libc::rusage) -> Self {
        let seconds = |time: libc::timeval| {
            Duration::new(time.tv_sec.unsigned_abs(), 0) + Duration::from_micros(time.tv_usec.unsigned_abs())
        };
        Self { cpu: seconds(usage.ru_utime) + seconds(usage.ru_stime), max_rss: usage.ru_maxrss.unsigned_abs() * 1024 }
    }
}

/// Returns once no process of a killed group is left. Dying takes a moment; nobody tells when it is over.
async fn until_gone(group: Pid) {
    let mut pause = Duration::from_millis(1);
    while test_kill_process_group(group).is_ok() {
        // As process 1, this process is what orphans are handed to. Asked by group, no other job's status is taken, and this
        // job need not wait until somebody looks for all orphans.
        while let Ok(Some(_)) = waitpgid(group, WaitOptions::NOHANG) {}
        tokio::time::sleep(pause).await;
        pause *= 2;
        if pause > PATIENCE_WITH_THE_DEAD {
            // Whoever is process 1 may leave zombies where they are.
            return census::died_out(group).await;
        }
    }
}
