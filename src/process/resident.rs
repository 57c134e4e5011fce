//! [`Resident`]: a child that runs one task after another, until its owner ends it.

use std::fs;
use std::io;
use std::time::Duration;

use tokio::time::timeout;

use super::group::{Group, WaitResult};
use super::output::{SharedOutput, read_present};
use super::{Channel, OUTPUT_GRACE, Process, Signal, Start, Termination, clock, terminate};

/// A running process and the worker's ends of its output pipes. Dropping a `Resident` kills the process and its group.
#[derive(Debug)]
pub(crate) struct Resident {
    group: Group,
    /// Stdout and stderr. `None` if the worker does not read them.
    outputs: Option<[SharedOutput; 2]>,
}

impl Resident {
    /// Starts a program in its own process group, and does not wait for `execve`.
    pub(crate) fn spawn(start: Start<'_>) -> io::Result<Self> {
        let Process { group, stdout, stderr, .. } = Process::spawn(start)?;
        let outputs = stdout.zip(stderr).map(|(stdout, stderr)| {
            [SharedOutput::of(stdout, Channel::Stdout), SharedOutput::of(stderr, Channel::Stderr)]
        });
        Ok(Self { group, outputs })
    }

    pub(crate) fn id(&self) -> u32 {
        self.group.id().as_raw_nonzero().get().unsigned_abs()
    }

    /// Returns the CPU time of the leader so far, with its threads and without its children.
    pub(crate) fn cpu_time(&self) -> Option<Duration> {
        clock::cpu_time_of(self.group.id())
    }

    pub(crate) async fn exited(&self) {
        self.group.leader_exited().await;
    }

    /// Sends the leader a signal that does not ask it to end. The leader must have executed its program.
    pub(crate) fn tell(&self, signal: Signal) {
        self.group.signal_leader(signal);
    }

    /// Returns the resident memory of the leader, in bytes.
    pub(crate) fn resident_memory(&self) -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/{}/statm", self.id())).ok()?;
        let pages: u64 = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
        Some(pages * rustix::param::page_size() as u64)
    }

    /// Returns the peak of the leader's resident memory, in bytes.
    pub(crate) fn peak_memory(&self) -> Option<u64> {
        let text = fs::read(format!("/proc/{}/status", self.id())).ok()?;
        // The process's name in the first line need not be UTF-8.
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kibibytes * 1024)
    }

    /// Reads the output as it arrives, until end of file.
    pub(crate) async fn read_output(&self, on_line: impl Fn(Channel, &str)) {
        if let Some([stdout, stderr]) = &self.outputs {
            tokio::join!(stdout.read(&on_line), stderr.read(&on_line));
        }
    }

    /// Reads the output that is in the pipes now. A last line without a newline is passed to `on_line` too.
    pub(crate) fn read_present_output(&self, on_line: impl Fn(Channel, &str)) {
        if let Some(outputs) = &self.outputs {
            read_present(outputs, on_line);
        }
    }

    /// Sends the group SIGTERM, and kills the group if it has not ended after `grace` or when `skip_grace` completes. Stops
    /// waiting for a leader that outlives SIGKILL when `give_up` completes.
    pub(crate) async fn terminate(
        &self,
        grace: Duration,
        skip_grace: impl Future<Output = ()>,
        give_up: impl Future<Output = ()>,
    ) -> Termination {
        terminate(&self.group, grace, skip_grace, give_up).await
    }

    /// Kills the group, and waits for the leader's exit or for `give_up`.
    pub(crate) async fn kill(&self, give_up: impl Future<Output = ()>) -> Termination {
        self.group.kill(give_up).await
    }

    /// Kills the rest of the group, reads the rest of the output, and reaps the leader, which must have exited.
    ///
    /// # Errors
    /// When the leader never executed its program.
    pub(crate) async fn end(self, on_line: impl Fn(Channel, &str)) -> io::Result<WaitResult> {
        // Kill the rest of the group, which may hold the pipes open.
        self.group.signal(Signal::KILL);
        // After `OUTPUT_GRACE`, only a process that has left the group can still hold a pipe open. Its output is not waited for.
        let _ = timeout(OUTPUT_GRACE, self.read_output(on_line)).await;
        self.group.end().await
    }
}
