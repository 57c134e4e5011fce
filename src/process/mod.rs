//! One child in its own process group: feed its stdin, keep its output's tail, wait for it, terminate it.
//! Knows neither jobs nor settings.
//!
//! A start goes through these states. `ChildSetup` and `Stack` are memory of this process.
//!
//! | state | begins with | `ChildSetup` and `Stack` belong to | the process number belongs to |
//! | --- | --- | --- | --- |
//! | made | `clone` | the child: this process keeps both alive, and only reads | the child |
//! | running its program | `execve`: the kernel sets `uses_our_memory` to 0 | this process | the child |
//! | zombie | the exit: the pidfd is readable, and the kernel has taken the memory away before | this process | the child |
//! | reaped | `wait4` | none: `ChildSetup` is dropped, `Stack` is kept for another child | the group, while that has members |
//!
//! Up to `wait4` a signal to the number, or to the group, reaches no other job. A child whose start fails goes from made to zombie,
//! and `ChildSetup::failure` says why. A child that has a copy of the memory (`Way::Copying`) tells both by a pipe.
//! A child whose job is dropped is killed, and the [`reaper`] keeps its `ChildSetup` and reaps it.

mod census;
mod child_setup;
mod children;
mod clock;
mod command;
mod cstrings;
mod exit_watch;
mod group;
mod memory;
mod open_files;
mod output;
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
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, Bytes};
use rustix::fs::{Mode, OFlags};
use rustix::io::{ioctl_fionbio, ioctl_fionread};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe::Sender;
use tokio::time::{sleep, timeout};

use child_setup::ChildSetup;
pub(crate) use children::Children;
pub(crate) use command::Command;
use group::Group;
pub use group::ResourceUsage;
pub(crate) use group::WaitResult;
pub(crate) use open_files::{OpenFiles, TooFewDescriptors, keep_exit_statuses};
pub(crate) use output::{Channel, Tail};
pub use program::Program;
pub(crate) use read_delay::ReadDelay;
pub(crate) use resident::Resident;
pub use rustix::process::Signal;
pub(crate) use signals::{is_ignored, without_signals};
pub(crate) use starter::{Starter, Trial};

/// How long output is still read after the leader has exited, when a process that lives on holds a pipe open.
const OUTPUT_GRACE: Duration = Duration::from_millis(100);

/// What comes on a child's stdin.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    /// These bytes, and then the end of file.
    Bytes(Bytes),
    /// The end of file.
    Nothing,
}

/// Where a child's output goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Output {
    /// It is read, line by line.
    #[default]
    Log,
    /// To this process's own stdout and stderr.
    Inherit,
    /// Nowhere.
    Null,
}

/// Everything that a start needs.
#[derive(Debug)]
pub(crate) struct Start<'a> {
    pub(crate) command: &'a Arc<Command>,
    /// Added to the command's environment.
    pub(crate) variables: &'a [(&'a str, Cow<'a, OsStr>)],
    pub(crate) input: Input,
    pub(crate) output: Output,
    pub(crate) starter: &'a Starter,
    pub(crate) read_delay: &'a ReadDelay,
    /// The children of this process.
    pub(crate) children: &'a Children,
}

/// When, and how, a running process is interfered with. Each future may never end.
#[derive(Debug)]
pub(crate) struct Stops<C, F, G, H> {
    /// Why to terminate it: SIGTERM to the group, and SIGKILL after `kill_grace`.
    pub(crate) terminate: C,
    pub(crate) kill_grace: Duration,
    /// When to cut that grace short.
    pub(crate) skip_grace: G,
    /// When to wait no longer for a leader that has outlived SIGKILL. Polled only then.
    pub(crate) give_up: H,
    /// A signal that only tells the leader something, and when it is sent.
    pub(crate) notify: Option<(Signal, F)>,
}

/// How a process has taken its termination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Termination {
    /// The process has ended, as far as can be known because of it.
    Stopped,
    /// The process has ended by itself: the system does not let this process signal it.
    Denied,
    /// The process lives on.
    GivenUp,
}

/// How a process ended.
#[derive(Debug)]
pub(crate) struct Exit<C> {
    /// The leader's status and what it used, if they could be had.
    pub(crate) ended: WaitResult,
    /// Why it was terminated, if it was, and how it took that; its own end comes first when both happen at once.
    pub(crate) terminated: Option<(C, Termination)>,
    /// Whether the notification was sent.
    pub(crate) notified: bool,
    /// The beginning and the end of its stderr.
    pub(crate) stderr: Tail,
}

/// A running process and our ends of its pipes. Dropped before its end, it is killed with its group.
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
    /// Starts a program in a process group of its own, and does not wait until it runs: see [`Process::begun`].
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

    /// Waits until the program runs. Most callers need not: [`Process::supervise`] has the same error.
    ///
    /// # Errors
    /// When it has turned out that the program could not be started: the system's word for why.
    pub(crate) async fn begun(&self) -> io::Result<()> {
        self.group.begun().await
    }

    /// Sees the process through to its end. Whatever is left of its group when the leader exits by itself is killed; when
    /// the group is terminated, it has the grace too.
    ///
    /// # Errors
    /// When it has turned out that the program could not be started: the system's word for why.
    pub(crate) async fn supervise<C>(
        self,
        stops: Stops<
            impl Future<Output = C>,
            impl Future<Output = ()>,
            impl Future<Output = ()>,
            impl Future<Output = ()>,
        >,
        on_line: impl Fn(Channel, &str),
    ) -> io::Result<Exit<C>> {
        let Self { command, group, stdin, stdout, stderr, read_delay } = self;
        let Stops { terminate: cause, skip_grace, give_up, kill_grace, notify } = stops;
        let (mut tail, mut notified, read) = (Tail::default(), false, AtomicU64::new(0));
        let may_be_read_later =
            stdin.is_none() && (stdout.is_some() || stderr.is_some()) && !command.prints_much.load(Ordering::Relaxed);
        let terminated = {
            let mut io = pin!(async {
                let out = output::read_lines(stdout.as_ref(), &read, |line| on_line(Channel::Stdout, line), None);
                let err =
                    output::read_lines(stderr.as_ref(), &read, |line| on_line(Channel::Stderr, line), Some(&mut tail));
                tokio::join!(feed(stdin), out, err);
            });
            let mut end = pin!(async {
                let cause = until_told_to_end(&group, cause, notify, &mut notified).await?;
                Some((cause, terminate(&group, kill_grace, skip_grace, give_up).await))
            });
            // All three pipes are served while waiting: a child blocked on any of them would never exit.
            tokio::select! {
                biased;
                terminated = &mut end => {
                    read_the_rest(io, &group, &read, [&stdout, &stderr]).await;
                    terminated
                }
                () = async {
                    if may_be_read_later {
                        read_delay.from_now().await;
                    }
                    io.as_mut().await;
                } => end.await,
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
}

/// Reads what is in the pipes, and nothing later than the grace: that would be of a process that lives on. Only a worker
/// too busy to have read what was there takes longer.
async fn read_the_rest(
    mut io: Pin<&mut impl Future<Output = ()>>,
    group: &Group,
    read: &AtomicU64,
    pipes: [&Option<OwnedFd>; 2],
) {
    // Most often nobody holds them any more, and that is all.
    if poll_fn(|context| Poll::Ready(io.as_mut().poll(context).is_ready())).await {
        return;
    }
    // What is left of the group holds the pipes no longer then. What has left the group may.
    group.signal(Signal::KILL);
    let there = pipes.into_iter().flatten().map(|pipe| ioctl_fionread(pipe).unwrap_or_default());
    let all = read.load(Ordering::Relaxed) + there.sum::<u64>();
    loop {
        let before = read.load(Ordering::Relaxed);
        let ended = timeout(OUTPUT_GRACE, &mut io).await.is_ok();
        let now = read.load(Ordering::Relaxed);
        if ended || now >= all || now == before {
            return;
        }
    }
}

/// Waits until the leader has exited by itself (`None`), or there is cause to terminate it.
async fn until_told_to_end<C>(
    group: &Group,
    terminate: impl Future<Output = C>,
    notify: Option<(Signal, impl Future<Output = ()>)>,
    notified: &mut bool,
) -> Option<C> {
    let mut terminate = pin!(terminate);
    if let Some((signal, when)) = notify {
        tokio::select! {
            biased;
            () = group.leader_exited() => return None,
            cause = &mut terminate => return Some(cause),
            () = async {
                when.await;
                group.signal_program(signal).await;
            } => {}
        }
        *notified = true;
    }
    tokio::select! {
        biased;
        () = group.leader_exited() => None,
        cause = terminate => Some(cause),
    }
}

/// Tells the group to end, gives it the grace, and kills it then. Not only the leader has that time: a shell dies of SIGTERM
/// before the command that it runs.
async fn terminate(
    group: &Group,
    kill_grace: Duration,
    skip_grace: impl Future<Output = ()>,
    give_up: impl Future<Output = ()>,
) -> Termination {
    let ended = |may_signal| if may_signal { Termination::Stopped } else { Termination::Denied };
    let may_signal = group.may_signal_leader();
    group.signal(Signal::TERM);
    // A stopped process would not see SIGTERM until it is continued.
    group.signal(Signal::CONT);
    tokio::select! {
        biased;
        () = group.died_out() => return ended(may_signal),
        () = skip_grace => {}
        () = sleep(kill_grace) => {}
    }
    let may_signal = group.may_signal_leader();
    if group.kill(give_up).await { ended(may_signal) } else { Termination::GivenUp }
}

/// What a pipe takes at once that is not made smaller or larger (pipe(7)).
const USUAL_PIPE: usize = 64 * 1024;

/// What a pipe takes at once for large payloads and outputs. Beyond 64 MiB of pipes, a user without privileges is given tiny
/// ones (`/proc/sys/fs/pipe-user-pages-soft`).
const LARGE_PIPE: usize = 256 * 1024;

/// What every pipe takes at once: the kernel makes small ones for a user who has many.
const SMALLEST_PIPE: usize = 4096;

/// What a child reads from, and what is still to be written to it. What fits into the pipe is written before there is a
/// child: it needs no reactor, and for most jobs that is everything.
fn open_stdin(input: Input) -> io::Result<(OwnedFd, Option<(Sender, Bytes)>)> {
    let Input::Bytes(mut input) = input else {
        return Ok((open_null(OFlags::RDONLY)?, None));
    };
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
    if input.len() > USUAL_PIPE {
        enlarge(&write_end);
    }
    if input.len() > SMALLEST_PIPE {
        ioctl_fionbio(&write_end, true)?;
    }
    fill(&write_end, &mut input)?;
    let unread = if input.is_empty() { None } else { Some((Sender::from_owned_fd_unchecked(write_end)?, input)) };
    Ok((read_end, unread))
}

/// Lets a pipe take more at once, so that both sides wait for each other less often. A user who has many pipes keeps small ones.
fn enlarge(pipe: &OwnedFd) {
    let _ = fcntl_setpipe_size(pipe, LARGE_PIPE);
}

/// Our end of an output, if it is read, and what the child writes to, if that is not what this process writes to.
fn open_output(output: Output, is_large: bool) -> io::Result<(Option<OwnedFd>, Option<OwnedFd>)> {
    match output {
        Output::Log => {
            let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
            if is_large {
                enlarge(&write_end);
            }
            ioctl_fionbio(&read_end, true)?;
            Ok((Some(read_end), Some(write_end)))
        }
        Output::Inherit => Ok((None, None)),
        Output::Null => Ok((None, Some(open_null(OFlags::WRONLY)?))),
    }
}

fn open_null(flags: OFlags) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/null", flags | OFlags::CLOEXEC, Mode::empty())?)
}

/// Writes what the pipe takes at once.
fn fill(pipe: &OwnedFd, input: &mut Bytes) -> io::Result<()> {
    while !input.is_empty() {
        match rustix::io::write(pipe.as_fd(), input) {
            Ok(written) => input.advance(written),
            Err(rustix::io::Errno::AGAIN) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes the rest of the input. A child that does not read it is within its rights: that error is none.
async fn feed(stdin: Option<(Sender, Bytes)>) {
    if let Some((mut pipe, mut input)) = stdin {
        let _ = pipe.write_all_buf(&mut input).await;
    }
}
