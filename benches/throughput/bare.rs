//! The bare loop: for each job, a thread starts a process with three pipes, writes the input, reads both outputs and waits for the
//! exit. The loop uses `std::process`, which calls `posix_spawn`. For each job, the kernel does the same work as for a worker.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::json;

use crate::{Result, meter, server};

pub(crate) const ROLE: &str = "contender:bare";

/// Runs the loop. `words` are the concurrency, the number of jobs, the size of the payload, and the handler's command.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let [at_once, jobs, bytes, handler @ ..] = words else { return Err("too few words".into()) };
    let (at_once, jobs): (usize, usize) = (at_once.parse()?, jobs.parse()?);
    let payload = server::payload(bytes.parse()?);
    let started = Instant::now();
    std::thread::scope(|scope| {
        let shares = (0..at_once).map(|thread| jobs / at_once + usize::from(thread < jobs % at_once));
        let payload = &payload;
        let threads: Vec<_> = shares.map(|jobs| scope.spawn(move || loop_of(jobs, payload, handler))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
    })?;
    let seconds = started.elapsed().as_secs_f64();
    let (own_cpu, peak) = (meter::own_cpu_so_far(), meter::Process::this().peak_memory()?);
    println!("{}", json!({ "seconds": seconds, "own_cpu": own_cpu.as_secs_f64(), "peak_memory": peak }));
    Ok(())
}

fn loop_of(jobs: usize, payload: &str, handler: &[&str]) -> Result<()> {
    (0..jobs).try_for_each(|_| one(payload, handler))
}

pub(crate) fn one(payload: &str, handler: &[&str]) -> Result<()> {
    let [program, arguments @ ..] = handler else { return Err("no handler".into()) };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // Ignore the error, because a handler may exit without reading its input.
        let _ = stdin.write_all(payload.as_bytes());
    }
    let output = child.wait_with_output()?;
    if output.status.success() { Ok(()) } else { Err(format!("{program}: {}", output.status).into()) }
}
