//! [`Contender`]: a program to compare. [`Contest`]: the jobs that each contender runs.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use serde::Deserialize;

use crate::bench::Bench;
use crate::meter::{Process, reap};
use crate::sample::{Sample, millis};
use crate::{Result, bare, baseline, client, protocol, server};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Contender {
    Bare,
    Xargs,
    Baseline,
    /// zizq-worker as a library, with a dispatcher that starts no process.
    Protocol,
    /// A build of zizq-worker, with additional command-line options.
    Worker {
        name: &'static str,
        path: PathBuf,
        options: &'static [&'static str],
    },
    /// A worker that is built on the official client and starts no process.
    Client,
}

/// The jobs of one run: their handler, concurrency, number, and payload size.
#[derive(Debug, Clone)]
pub(crate) struct Contest {
    pub(crate) handler: Vec<String>,
    pub(crate) at_once: usize,
    pub(crate) jobs: usize,
    pub(crate) payload_bytes: usize,
}

/// The figures that the bare loop prints as JSON.
#[derive(Deserialize)]
struct Told {
    seconds: f64,
    own_cpu: f64,
    peak_memory: u64,
}

impl Contender {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Bare => "bare loop",
            Self::Xargs => "xargs -P",
            Self::Baseline => "baseline",
            Self::Protocol => "protocol alone",
            Self::Worker { name, .. } => name,
            Self::Client => "client in process",
        }
    }

    /// Measures one run. A worker is timed from its start to its last report, and `xargs` from its start to its exit. The bare
    /// loop times itself.
    pub(crate) fn run(&self, bench: &Bench, contest: &Contest) -> Result<Sample> {
        match self {
            Self::Bare => run_bare(bench, contest),
            Self::Xargs => run_xargs(contest),
            _ => self.run_worker(bench, contest),
        }
    }

    fn run_worker(&self, bench: &Bench, contest: &Contest) -> Result<Sample> {
        bench.server.enqueue(contest.jobs, &server::payload(contest.payload_bytes))?;
        let started = Instant::now();
        let running = self.start(bench, contest.at_once, &contest.handler, &[])?;
        bench.server.wait_until_done()?;
        let seconds = started.elapsed().as_secs_f64();
        let (own_cpu, peak_memory) = (running.process().own_cpu()?, running.process().peak_memory()?);
        let jobs = contest.jobs as f64;
        Ok(Sample {
            jobs_per_second: jobs / seconds,
            cpu: millis(running.stop()?) / jobs,
            own_cpu: Some(millis(own_cpu) / jobs),
            peak_memory: Some(peak_memory),
        })
    }

    /// Starts a worker on the benchmark's server and queue. Contenders other than zizq-worker ignore `options`.
    pub(crate) fn start(&self, bench: &Bench, at_once: usize, handler: &[String], options: &[&str]) -> Result<Running> {
        self.start_at(&bench.server.url, bench, at_once, handler, options)
    }

    /// Starts a worker that connects to `url`, which can be a proxy in front of the benchmark's server.
    pub(crate) fn start_at(
        &self,
        url: &str,
        bench: &Bench,
        at_once: usize,
        handler: &[String],
        options: &[&str],
    ) -> Result<Running> {
        let (queue, at_once) = (&bench.server.queue, at_once.to_string());
        let mut command = match self {
            Self::Worker { path, options: own, .. } => {
                let mut command = Command::new(path);
                // Do not log the handlers' output, because the baseline does not log it either.
                command.args(["--url", url, "--queues", queue, "--threads", &at_once, "--log-level", "error"]);
                command.args(*own).args(options).arg("--");
                command
            }
            _ => {
                let role = match self {
                    Self::Baseline => baseline::ROLE,
                    Self::Client => client::ROLE,
                    _ => protocol::ROLE,
                };
                let mut command = Command::new(&bench.exe);
                command.args([role, url, queue, &at_once]);
                command
            }
        };
        if *self != Self::Protocol {
            command.args(handler);
        }
        Ok(Running(Some(command.stdin(Stdio::null()).spawn()?)))
    }
}

fn run_bare(bench: &Bench, contest: &Contest) -> Result<Sample> {
    let numbers = [contest.at_once, contest.jobs, contest.payload_bytes].map(|number| number.to_string());
    let mut command = Command::new(&bench.exe);
    let child = command.arg(bare::ROLE).args(numbers).args(&contest.handler).stdout(Stdio::piped()).spawn()?;
    let mut running = Running(Some(child));
    let stdout = running.0.as_mut().and_then(|child| child.stdout.take()).ok_or("the bare loop has no stdout")?;
    let told: Told = serde_json::from_str(&std::io::read_to_string(stdout)?)?;
    let jobs = contest.jobs as f64;
    Ok(Sample {
        jobs_per_second: jobs / told.seconds,
        cpu: millis(running.reap()?) / jobs,
        own_cpu: Some(told.own_cpu * 1000.0 / jobs),
        peak_memory: Some(told.peak_memory),
    })
}

/// Runs the jobs with `xargs`, which gives handlers no input and does not read their output. The speed of `xargs` is an upper bound
/// for the speed of a worker.
fn run_xargs(contest: &Contest) -> Result<Sample> {
    let started = Instant::now();
    let (reader, mut writer) = std::io::pipe()?;
    let mut command = Command::new("xargs");
    command.args(["-n", "1", "-P", &contest.at_once.to_string()]).args(&contest.handler);
    let child = command.stdin(reader).stdout(Stdio::null()).spawn()?;
    // Close the read end that `command` still holds. Otherwise the write below could block forever if `xargs` exits early.
    drop(command);
    let mut running = Running(Some(child));
    let words: String = (1..=contest.jobs).map(|number| format!("{number}\n")).collect();
    std::io::Write::write_all(&mut writer, words.as_bytes())?;
    drop(writer);
    let own_cpu = running.own_cpu_at_its_end()?;
    let (seconds, jobs) = (started.elapsed().as_secs_f64(), contest.jobs as f64);
    Ok(Sample {
        jobs_per_second: jobs / seconds,
        cpu: millis(running.reap()?) / jobs,
        own_cpu: Some(millis(own_cpu) / jobs),
        peak_memory: None,
    })
}

/// A running process, which is killed on drop.
pub(crate) struct Running(Option<Child>);

impl Running {
    pub(crate) fn process(&self) -> Process {
        Process(self.0.as_ref().map_or(0, Child::id))
    }

    fn pid(&self) -> Result<Pid> {
        Ok(self.0.as_ref().map(Pid::from_child).ok_or("it has been waited for")?)
    }

    /// Sends SIGTERM, and waits for the exit. Returns the CPU time of the process and its children.
    pub(crate) fn stop(mut self) -> Result<std::time::Duration> {
        kill_process(self.pid()?, Signal::TERM)?;
        self.reap()
    }

    fn reap(&mut self) -> Result<std::time::Duration> {
        let (status, cpu) = reap(self.process())?;
        self.0 = None;
        if status == 0 { Ok(cpu) } else { Err(format!("a contender ended with the wait status {status}").into()) }
    }

    /// Waits for the exit, and returns the CPU time of the process. Does not reap the process, because the CPU time of a reaped
    /// process cannot be read. The time of threads that ended before the process is not included.
    fn own_cpu_at_its_end(&self) -> Result<std::time::Duration> {
        waitid(WaitId::Pid(self.pid()?), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)?;
        self.process().own_cpu()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
