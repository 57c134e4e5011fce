//! A child process in its own process group: start, stdin, output, signals and exit. This module knows neither jobs nor settings.
//!
//! A child goes through these states. `ChildSetup` and `Stack` are in this process's memory, which the child usually shares until
//! `execve`.
//!
//! | state | begins with | `ChildSetup` and `Stack` belong to | the process number belongs to |
//! | --- | --- | --- | --- |
//! | in setup | `clone` | the child: this process keeps both alive, and only reads | the child |
//! | running its program | `execve`: the kernel sets `uses_our_memory` to 0 | this process | the child |
//! | zombie | the exit: the kernel releases the memory, then the pidfd becomes readable | this process | the child |
//! | reaped | `wait4` | none: `ChildSetup` is dropped, `Stack` is kept for another child | the group, while it has members |
//!
//! Until `wait4`, the process number cannot be reused, so a signal to the process or to the group reaches no other job. A child
//! whose setup fails exits at once, and `ChildSetup::failure` returns the error. A child with a copy of the memory
//! (`StartMethod::Copying`) reports its `execve` or its error through a pipe. When a job is dropped, its child is killed, and the
//! [`reaper`] keeps the `ChildSetup` until the child is reaped.

mod census;
mod child_setup;
mod children;
mod clock;
mod command;
mod cstrings;
mod exit_watch;
mod group;
mod open_files;
mod output;
mod pipes;
mod program;
mod read_delay;
mod reaper;
mod resident;
mod signals;
mod spawn;
mod stack;
mod starter;

use std::borrow::Cow;
use std::ffi::OsStr;
use std::future::{pending, poll_fn};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use rustix::io::ioctl_fionread;
use tokio::net::unix::pipe::Sender;
use tokio::time::{sleep, timeout};

use child_setup::ChildSetup;
pub(crate) use children::Children;
pub(crate) use command::Command;
use group::Group;
pub use group::ResourceUsage;
pub(crate) use group::WaitResult;
pub(crate) use open_files::{OpenFiles, TOO_FEW_DESCRIPTORS, TooFewDescriptors};
pub(crate) use output::{Channel, Printer, Tail};
use pipes::{feed, open_output, open_stdin};
pub use program::Program;
pub(crate) use read_delay::ReadDelay;
pub(crate) use resident::Resident;
pub use rustix::process::Signal;
pub(crate) use signals::{is_ignored, keep_exit_statuses, without_signals};
pub(crate) use starter::{StartMethod, Starter, Trial};

/// The time for which output is still read after the leader's exit if another process holds a pipe open.
const OUTPUT_GRACE: Duration = Duration::from_millis(100);

/// The stdin of a child.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    /// The contained bytes, and then end of file.
    Bytes(Bytes),
    /// End of file.
    Nothing,
}

/// The destination of a child's output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Output {
    /// The log, line by line.
    #[default]
    Log,
    /// This process's own stdout and stderr.
    Inherit,
    /// `/dev/null`.
    Null,
}

/// The arguments for starting a process.
#[derive(Debug)]
pub(crate) struct Start<'a> {
    pub(crate) command: &'a Arc<Command>,
    /// The variables that are added to the command's environment.
    pub(crate) variables: &'a [(&'a str, Cow<'a, OsStr>)],
    pub(crate) input: Input,
    pub(crate) output: Output,
    pub(crate) starter: &'a Starter,
    pub(crate) read_delay: &'a ReadDelay,
    pub(crate) children: &'a Children,
}

/// The futures with which the caller controls a running process. A future that never completes has no effect.
#[derive(Debug)]
pub(crate) struct Stops<C, F, G, H> {
    /// Completes with a cause when the process is to be terminated: the group gets SIGTERM, and SIGKILL after `kill_grace`.
    pub(crate) terminate: C,
    pub(crate) kill_grace: Duration,
    /// Completes when SIGKILL is due before the end of `kill_grace`.
    pub(crate) skip_grace: G,
    /// Completes when the caller stops waiting for a leader that has outlived SIGKILL. Polled only while there is such a leader.
    pub(crate) give_up: H,
    /// A signal that does not ask the leader to end, and a future that completes when the signal is due.
    pub(crate) notify: Option<(Signal, F)>,
}

/// The result of a termination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Termination {
    /// The process has ended, presumably because of the termination.
    Stopped,
    /// The process has ended by itself. The worker had no permission to signal it.
    Denied,
    /// The process has outlived SIGKILL, and its exit is no longer waited for.
    GivenUp,
}

/// The result of [`Process::supervise`].
#[derive(Debug)]
pub(crate) struct Exit<C> {
    pub(crate) ended: WaitResult,
    /// The cause and the result of the termination. `None` if the leader has exited by itself, even if a cause came at the same
    /// moment.
    pub(crate) terminated: Option<(C, Termination)>,
    /// Whether the signal of `Stops::notify` was sent.
    pub(crate) notified: bool,
    /// The beginning and the end of the output on stderr.
    pub(crate) stderr: Tail,
}

/// A running process and the worker's ends of its pipes. Dropping a `Process` kills the process and its group.
#[derive(Debug)]
pub(crate) struct Process {
    command: Arc<Command>,
    group: Group,
    stdin: Option<(Sender, Bytes)>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    read_delay: ReadDelay,
}

impl Process {
    /// Starts a program in its own process group, and does not wait for `execve`: see [`Process::begun`].
    pub(crate) fn spawn(start: Start<'_>) -> io::Result<Self> {
        let (stdin, unread) = open_stdin(start.input)?;
        let prints_much = start.command.prints_much.load(Ordering::Relaxed);
        let (stdout, their_stdout) = open_output(start.output, prints_much)?;
        let (stderr, their_stderr) = open_output(start.output, false)?;
        let stdio =
            [Some(stdin.as_fd()), their_stdout.as_ref().map(AsFd::as_fd), their_stderr.as_ref().map(AsFd::as_fd)];
        let setup = ChildSetup::of(start.starter, Arc::clone(start.command), start.variables, stdio)?;
        let leader = start.children.start(|| spawn::spawn(setup), |leader| leader.id)?;
        let group = Group::of(leader, start.children.clone());
        let (command, read_delay) = (Arc::clone(start.command), start.read_delay.clone());
        Ok(Self { command, group, stdin: unread, stdout, stderr, read_delay })
    }

    /// Returns the process id of the leader.
    pub(crate) fn id(&self) -> u32 {
        self.group.id().as_raw_nonzero().get().unsigned_abs()
    }

    /// Waits until the child has executed the program. Optional, because [`Process::supervise`] returns the same error.
    pub(crate) async fn begun(&self) -> io::Result<()> {
        self.group.begun().await
    }

    /// Serves the pipes and waits for the end of the process. When the leader exits by itself, the rest of the group is killed at
    /// once. When the group is terminated, all its processes have `kill_grace` to end.
    ///
    /// # Errors
    /// When the program could not be started.
    pub(crate) async fn supervise<C>(
        self,
        stops: Stops<
            impl Future<Output = C>,
            impl Future<Output = ()>,
            impl Future<Output = ()>,
            impl Future<Output = ()>,
        >,
        printer: &impl Printer,
    ) -> io::Result<Exit<C>> {
        let delays_reads = self.may_delay_reads();
        let Self { command, group, stdin, stdout, stderr, read_delay } = self;
        let Stops { terminate: cause, skip_grace, give_up, kill_grace, notify } = stops;
        let (mut tail, mut notified, read) = (Tail::default(), false, AtomicU64::new(0));
        let terminated = {
            let mut serving = pin!(serve_pipes(stdin, [&stdout, &stderr], &read, printer, &mut tail));
            let mut ending = pin!(async {
                let cause = until_exit_or_cause(&group, cause, notify, &mut notified).await?;
                Some((cause, terminate(&group, kill_grace, skip_grace, give_up).await))
            });
            // Serve all three pipes while waiting, because a child that blocks on any of them would never exit.
            tokio::select! {
                biased;
                terminated = &mut ending => {
                    read_the_rest(serving, &group, &read, [&stdout, &stderr]).await;
                    terminated
                }
                () = async {
                    if delays_reads {
                        read_delay.for_new_child().await;
                    }
                    serving.as_mut().await;
                } => ending.await,
            }
        };
        command.prints_much.store(read.into_inner() > output::READ_BYTES as u64, Ordering::Relaxed);
        let ended = if matches!(terminated, Some((_, Termination::GivenUp))) {
            Err(io::Error::new(io::ErrorKind::TimedOut, "the process lives on"))
        } else {
            group.end().await?
        };
        Ok(Exit { ended, terminated, notified, stderr: tail })
    }

    /// Reports whether the first read of the output can be delayed. This requires that the child already has all its input, and
    /// that its output probably fits into the pipes.
    fn may_delay_reads(&self) -> bool {
        let has_output = self.stdout.is_some() || self.stderr.is_some();
        self.stdin.is_none() && has_output && !self.command.prints_much.load(Ordering::Relaxed)
    }
}

/// Feeds stdin, and reads stdout and stderr to their ends.
async fn serve_pipes(
    stdin: Option<(Sender, Bytes)>,
    [stdout, stderr]: [&Option<OwnedFd>; 2],
    read: &AtomicU64,
    printer: &impl Printer,
    tail: &mut Tail,
) {
    let out = output::read_lines(stdout.as_ref(), read, (printer, Channel::Stdout), None);
    let err = output::read_lines(stderr.as_ref(), read, (printer, Channel::Stderr), Some(tail));
    tokio::join!(feed(stdin), out, err);
}

/// Reads the rest of the output after the leader's exit, until end of file or for `OUTPUT_GRACE`. After `OUTPUT_GRACE`, continues
/// only while bytes that were in the pipes at the exit are still being read. Bytes that are written later come from a process that
/// has left the group, and are not waited for.
async fn read_the_rest(
    mut io: Pin<&mut impl Future<Output = ()>>,
    group: &Group,
    read: &AtomicU64,
    pipes: [&Option<OwnedFd>; 2],
) {
    // In most cases, a single poll reaches end of file.
    if poll_fn(|context| Poll::Ready(io.as_mut().poll(context).is_ready())).await {
        return;
    }
    // Kill the rest of the group, which may hold the pipes open. A process that has left the group can still hold them open.
    group.signal(Signal::KILL);
    let unread = pipes.into_iter().flatten().map(|pipe| ioctl_fionread(pipe).unwrap_or_default());
    let all = read.load(Ordering::Relaxed) + unread.sum::<u64>();
    loop {
        let before = read.load(Ordering::Relaxed);
        let ended = timeout(OUTPUT_GRACE, &mut io).await.is_ok();
        let now = read.load(Ordering::Relaxed);
        if ended || now >= all || now == before {
            return;
        }
    }
}

/// Returns `None` when the leader exits by itself, or the cause when `terminate` completes. While waiting, sends the signal of
/// `notify` when that signal is due, and sets `notified`.
async fn until_exit_or_cause<C>(
    group: &Group,
    terminate: impl Future<Output = C>,
    notify: Option<(Signal, impl Future<Output = ()>)>,
    notified: &mut bool,
) -> Option<C> {
    let notifying = async {
        if let Some((signal, when)) = notify {
            when.await;
            group.signal_program(signal).await;
            *notified = true;
        }
        pending().await
    };
    tokio::select! {
        biased;
        () = group.leader_exited() => None,
        cause = terminate => Some(cause),
        never = notifying => never,
    }
}

/// Sends the group SIGTERM, and kills the group if it has not ended after `kill_grace` or when `skip_grace` completes. Waits for
/// the whole group, because a shell dies of SIGTERM before the command that it runs.
async fn terminate(
    group: &Group,
    kill_grace: Duration,
    skip_grace: impl Future<Output = ()>,
    give_up: impl Future<Output = ()>,
) -> Termination {
    let ended = group.end_by_signal();
    group.signal(Signal::TERM);
    // A stopped process would not see SIGTERM until it is continued.
    group.signal(Signal::CONT);
    tokio::select! {
        biased;
        () = group.died_out() => return ended,
        () = skip_grace => {}
        () = sleep(kill_grace) => {}
    }
    group.kill(give_up).await
}

/// Calls `check` until it returns a value. The pause between two calls starts at one millisecond, and doubles up to `longest`.
async fn poll_until<T>(longest: Duration, mut check: impl FnMut() -> Option<T>) -> T {
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(value) = check() {
            return value;
        }
        sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
}
