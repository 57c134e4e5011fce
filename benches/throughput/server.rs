//! [`Server`]: starts the embedded server in a separate process, or uses the server at `ZIZQ_URL`, and enqueues jobs.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::RequestBuilder;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use zizq_worker::embedded::{EmbeddedServer, Options, Store};

use crate::Result;

pub(crate) const ROLE: &str = "server";

/// The polling intervals of `wait_until_done`: long at first, so that polling does not disturb the run, and short for the
/// last `NEAR_THE_END` jobs, so that the end is measured exactly.
const LOOK_EVERY: Duration = Duration::from_millis(30);
const LOOK_CLOSELY_EVERY: Duration = Duration::from_millis(2);
const NEAR_THE_END: u64 = 100;

/// The time limit of a single run. A run that takes longer is stuck.
const PATIENCE: Duration = Duration::from_secs(300);

/// The limits of a bulk request, so that the server reads each request quickly.
const MAX_BULK_BYTES: usize = 4_000_000;
const MAX_BULK_JOBS: usize = 500;

/// Runs the embedded server until stdin is closed.
pub(crate) fn run() -> Result<()> {
    // Use one thread, so that on a machine with two cores the server leaves one core to the contenders. A remote server would
    // leave both cores.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let server = runtime.block_on(EmbeddedServer::bind("127.0.0.1:0", Store::new(Options::default())))?;
    println!("http://{}", server.local_addr());
    runtime.spawn(server.run(CancellationToken::new()));
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Returns a JSON string of `bytes` bytes, quotes included.
pub(crate) fn payload(bytes: usize) -> String {
    format!("\"{}\"", "x".repeat(bytes.saturating_sub(2)))
}

pub(crate) struct Server {
    pub(crate) url: String,
    /// The name of a queue that only this benchmark uses.
    pub(crate) queue: String,
    runtime: Runtime,
    http: reqwest::Client,
    process: Option<Child>,
}

impl Server {
    pub(crate) fn start(exe: &str) -> Result<Self> {
        let (url, process) = match std::env::var("ZIZQ_URL").ok().filter(|url| !url.is_empty()) {
            Some(url) => (url, None),
            None => embedded(exe).map(|(url, process)| (url, Some(process)))?,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let queue = format!("bench-{}", std::process::id());
        Ok(Self { url, queue, runtime, http: reqwest::Client::new(), process })
    }

    pub(crate) fn is_embedded(&self) -> bool {
        self.process.is_some()
    }

    pub(crate) fn enqueue(&self, count: usize, payload: &str) -> Result<()> {
        let bulk = (MAX_BULK_BYTES / payload.len()).clamp(1, MAX_BULK_JOBS);
        for first in (0..count).step_by(bulk) {
            let jobs = vec![self.job(payload); bulk.min(count - first)].join(",");
            self.send(self.post("/jobs/bulk", format!("{{\"jobs\":[{jobs}]}}")))?;
        }
        Ok(())
    }

    pub(crate) fn enqueue_one(&self, payload: &str) -> Result<()> {
        self.send(self.post("/jobs", self.job(payload))).map(drop)
    }

    /// Returns the number of unfinished jobs in the queue.
    pub(crate) fn pending(&self) -> Result<u64> {
        let answer = self.send(self.http.get(format!("{}/jobs/count?queue={}", self.url, self.queue)))?;
        answer["count"].as_u64().ok_or_else(|| format!("no count in {answer}").into())
    }

    pub(crate) fn wait_until_done(&self) -> Result<()> {
        let started = Instant::now();
        loop {
            match self.pending()? {
                0 => return Ok(()),
                _ if started.elapsed() > PATIENCE => return Err("the jobs are not done after minutes".into()),
                1..=NEAR_THE_END => std::thread::sleep(LOOK_CLOSELY_EVERY),
                _ => std::thread::sleep(LOOK_EVERY),
            }
        }
    }

    pub(crate) fn clear(&self) -> Result<()> {
        self.send(self.http.delete(format!("{}/jobs?queue={}", self.url, self.queue))).map(drop)
    }

    fn job(&self, payload: &str) -> String {
        format!("{{\"queue\":{},\"type\":\"bench\",\"payload\":{payload}}}", json!(self.queue))
    }

    fn post(&self, path: &str, body: String) -> RequestBuilder {
        self.http.post(format!("{}{path}", self.url)).header("content-type", "application/json").body(body)
    }

    fn send(&self, request: RequestBuilder) -> Result<Value> {
        self.runtime.block_on(async { Ok(request.send().await?.error_for_status()?.json().await?) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            drop(process.stdin.take());
            // Ignore an error of the wait, because the closed stdin ends the server in any case.
            let _ = process.wait();
        }
    }
}

fn embedded(exe: &str) -> Result<(String, Child)> {
    let mut process = Command::new(exe).arg(ROLE).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut url = String::new();
    BufReader::new(process.stdout.take().ok_or("the server has no stdout")?).read_line(&mut url)?;
    Ok((url.trim().to_owned(), process))
}
