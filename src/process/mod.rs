//! One child in its own process group: feed its stdin, keep its output's tail, wait for it, terminate it.
//! Knows neither jobs nor settings.

mod output;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use bytes::{Buf, Bytes};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::time::Instant;

pub(crate) use output::{Channel, Tail};

/// How long output is still read after the leader has exited, when a process that lives on holds a pipe open.
const OUTPUT_GRACE: Duration = Duration::from_millis(100);

/// An executable file and its fixed arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// What the process calls itself: the name as it was given.
    name: OsString,
    /// The file that is run.
    path: PathBuf,
    args: Vec<OsString>,
}

impl Program {
    /// Finds `name` as a shell would: on the search path `path_list`, or as a path if it has a slash.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it, and what to do.
    pub fn find(name: OsString, args: Vec<OsString>, path_list: Option<&OsString>) -> Result<Self, String> {
        let shown = Path::new(&name).display();
        let path = Path::new(&name);
        let is_path = name.as_encoded_bytes().contains(&b'/');
        match which::which_in(&name, path_list, ".") {
            Ok(found) => {
                let path = std::path::absolute(&found).map_err(|error| format!("{shown}: {error}"))?;
                Ok(Self { path, name, args })
            }
            Err(_) if is_path && path.is_dir() => Err(format!("{shown} is a directory; name an executable file")),
            Err(_) if is_path && path.exists() => Err(format!("{shown} is not executable; try chmod +x {shown}")),
            Err(_) if is_path => Err(format!("{shown} does not exist")),
            Err(_) if path.exists() => {
                Err(format!("{shown} is not on PATH; if you mean the file here, write ./{shown}"))
            }
            Err(_) => Err(format!("{shown} is not on PATH")),
        }
    }

    /// The last part of its path, for messages.
    pub fn file_name(&self) -> String {
        let name = self.path.file_name().unwrap_or(self.name.as_os_str());
        name.to_string_lossy().into_owned()
    }
}

/// How a process ended.
#[derive(Debug)]
pub(crate) struct Exit<C> {
    /// The leader's status, if it could be had.
    pub(crate) status: io::Result<ExitStatus>,
    /// Why it was terminated, if it was; its own end comes first when both happen at once.
    pub(crate) stopped: Option<C>,
    /// The beginning and the end of its stderr.
    pub(crate) stderr: Tail,
}

/// A running process and our ends of its pipes. Dropped before its end, it is killed with its group.
#[derive(Debug)]
pub(crate) struct Process {
    leader: Leader,
    pidfd: AsyncFd<OwnedFd>,
    stdin: Option<(Sender, Bytes)>,
    stdout: Receiver,
    stderr: Receiver,
}

impl Process {
    /// Starts `program` in a process group of its own, with `env` on top of this process's environment.
    /// `input` comes on its stdin, followed by the end of file.
    #[expect(clippy::disallowed_methods, reason = "this is the room that starts processes")]
    pub(crate) fn spawn(program: &Program, env: &[(&str, &str)], mut input: Bytes) -> io::Result<Self> {
        let (stdin, feed) = pipe_with(PipeFlags::CLOEXEC)?;
        // What fits into the pipe needs no reactor, and for most jobs that is everything.
        rustix::io::ioctl_fionbio(&feed, true)?;
        fill(feed.as_fd(), &mut input)?;
        let stdin_rest = if input.is_empty() { None } else { Some((Sender::from_owned_fd(feed)?, input)) };
        let mut child = std::process::Command::new(&program.path)
            .arg0(&program.name)
            .args(&program.args)
            .envs(env.iter().copied())
            .process_group(0)
            .stdin(Stdio::from(stdin))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let leader = Leader::of(child);
        let pidfd = pidfd_open(leader.pid(), PidfdFlags::NONBLOCK)?;
        Ok(Self {
            pidfd: watch(pidfd)?,
            stdin: stdin_rest,
            stdout: receiver(stdout.map(OwnedFd::from))?,
            stderr: receiver(stderr.map(OwnedFd::from))?,
            leader,
        })
    }

    /// Sees the process through to its end. When `stop` comes first, the group is terminated: SIGTERM, and SIGKILL after
    /// `kill_grace`. Whatever is left of the group when its leader exits by itself is killed at once. All that happens
    /// before the leader is reaped, while the zombie still keeps the number from being given to anyone else.
    pub(crate) async fn supervise<C>(
        self,
        stop: impl Future<Output = C>,
        kill_grace: Duration,
        on_line: impl Fn(Channel, &str),
    ) -> Exit<C> {
        let Self { leader, pidfd, stdin, stdout, stderr } = self;
        let mut tail = Tail::default();
        let stopped = {
            let mut end = pin!(until_exit(&leader, &pidfd, stop, kill_grace));
            let mut io = pin!(async {
                let out = output::read_lines(stdout, |line| on_line(Channel::Stdout, line), None);
                let err = output::read_lines(stderr, |line| on_line(Channel::Stderr, line), Some(&mut tail));
                tokio::join!(feed(stdin), out, err);
            });
            // All three pipes are served while waiting: a child blocked on any of them would never exit.
            let (stopped, mut io_ended) = tokio::select! {
                biased;
                stopped = &mut end => (stopped, false),
                () = &mut io => (end.await, true),
            };
            // A shell dies of SIGTERM before the command that it runs: whoever still holds a pipe has the grace, too.
            if let Some(Stopped { kill_at, .. }) = stopped
                && !io_ended
            {
                io_ended = tokio::time::timeout_at(kill_at, &mut io).await.is_ok();
            }
            leader.signal(Signal::KILL);
            if !io_ended {
                let _ = tokio::time::timeout(OUTPUT_GRACE, io).await;
            }
            stopped.map(|stopped| stopped.cause)
        };
        Exit { status: leader.reap(), stopped, stderr: tail }
    }
}

/// A process that was told to end.
struct Stopped<C> {
    cause: C,
    /// When what is left of its group is killed.
    kill_at: Instant,
}

/// Waits until the leader has exited, by itself or because `stop` said so.
async fn until_exit<C>(
    leader: &Leader,
    pidfd: &AsyncFd<OwnedFd>,
    stop: impl Future<Output = C>,
    kill_grace: Duration,
) -> Option<Stopped<C>> {
    let cause = tokio::select! {
        biased;
        () = exited(pidfd) => return None,
        cause = stop => cause,
    };
    let kill_at = Instant::now() + kill_grace;
    // A stopped process would not see SIGTERM until it is continued.
    leader.signal(Signal::TERM);
    leader.signal(Signal::CONT);
    if tokio::time::timeout_at(kill_at, exited(pidfd)).await.is_err() {
        leader.signal(Signal::KILL);
        exited(pidfd).await;
    }
    Some(Stopped { cause, kill_at })
}

#[expect(unsafe_code, reason = "the reactor has no safe way in for a pidfd")]
fn watch(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` stays open, under the same number, for as long as the `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?)
}

/// A pidfd is readable once its process is a zombie.
async fn exited(pidfd: &AsyncFd<OwnedFd>) {
    // It fails only when the reactor is gone, and this task with it.
    let _ = pidfd.readable().await;
}

/// Writes what the pipe takes at once.
fn fill(pipe: impl AsFd, input: &mut Bytes) -> io::Result<()> {
    while !input.is_empty() {
        match rustix::io::write(&pipe, input) {
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

fn receiver(pipe: Option<OwnedFd>) -> io::Result<Receiver> {
    Receiver::from_owned_fd(pipe.ok_or(io::ErrorKind::BrokenPipe)?)
}

/// A child that leads a process group and has not been reaped, so that its number is its own.
#[derive(Debug)]
struct Leader(std::process::Child);

impl Leader {
    fn of(child: std::process::Child) -> Self {
        Self(child)
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    /// Signals the whole group. That nobody is left to hear it is no error.
    fn signal(&self, signal: Signal) {
        let _ = kill_process_group(self.pid(), signal);
    }

    /// Reaps the leader, which has exited.
    fn reap(mut self) -> io::Result<ExitStatus> {
        self.0.wait()
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        // Reaped already: the number may belong to somebody else.
        if matches!(self.0.try_wait(), Ok(None)) {
            self.signal(Signal::KILL);
            let _ = self.0.wait();
        }
    }
}
