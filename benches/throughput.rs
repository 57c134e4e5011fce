//! How many jobs a second the worker runs, beside a bare loop that starts the same processes: whole runs, in turn, medians.

#![expect(clippy::disallowed_methods, reason = "a benchmark starts processes")]

use std::process::{Command, Stdio};
use std::time::Instant;

use tokio_util::sync::CancellationToken;
use zizq_worker::embedded::{EmbeddedServer, Options, Store};

/// Long enough for the start of the worker to be noise.
const JOBS: usize = 2000;

const ROUNDS: usize = 3;

const HANDLER: &str = "/bin/true";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    println!("{JOBS} jobs of {HANDLER}, jobs/s, median of {ROUNDS} rounds");
    for at_once in [1, 4, 8] {
        let (mut bare, mut worker) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            bare.push(bare_loop(at_once)?);
            worker.push(one_worker(at_once)?);
        }
        let (bare, worker) = (median(bare), median(worker));
        println!("{at_once} at once: bare loop {bare:.0}, worker {worker:.0}, ratio {:.2}", worker / bare);
    }
    Ok(())
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// The rate at which threads start and await processes with three pipes, and do nothing else.
fn bare_loop(at_once: usize) -> Result<f64> {
    let started = Instant::now();
    let threads: Vec<_> = (0..at_once)
        .map(|_| {
            std::thread::spawn(move || -> std::io::Result<()> {
                for _ in 0..JOBS / at_once {
                    Command::new(HANDLER)
                        .stdin(Stdio::piped())
                        .stdout(Stdio::piped())
                        .stderr(Stdio::piped())
                        .output()?;
                }
                Ok(())
            })
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_| "a thread of the bare loop panicked")??;
    }
    Ok(JOBS as f64 / started.elapsed().as_secs_f64())
}

/// The rate of the worker as a process of its own, from its start until the last job is acknowledged.
fn one_worker(at_once: usize) -> Result<f64> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let store = Store::new(Options::default());
    for number in 0..JOBS {
        store.enqueue_line(&format!(r#"{{"queue":"bench","type":"bench","payload":{number}}}"#))?;
    }
    let server = runtime.block_on(EmbeddedServer::bind("127.0.0.1:0", store.clone()))?;
    let url = format!("http://{}", server.local_addr());
    let stop = CancellationToken::new();
    let serving = runtime.spawn(server.run(stop.clone()));
    let mut command = Command::new(env!("CARGO_BIN_EXE_zizq-worker"));
    command.args(["--url", &url, "--threads", &at_once.to_string(), "--log-level", "error", "--exec", HANDLER]);
    let started = Instant::now();
    let mut worker = command.spawn()?;
    while store.counts().values().any(|count| *count > 0) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let rate = JOBS as f64 / started.elapsed().as_secs_f64();
    worker.kill()?;
    worker.wait()?;
    stop.cancel();
    runtime.block_on(serving)?;
    Ok(rate)
}
