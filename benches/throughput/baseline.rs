//! The baseline: a minimal worker built on the official client and `tokio::process`. The client's default prefetch equals the
//! concurrency, so a busy baseline receives a new job only after it has reported another. The default prefetch of zizq-worker
//! is twice the concurrency.

use std::io;
use std::process::Stdio;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use zizq::{Client, Format, Job, Worker};

use crate::Result;

pub(crate) const ROLE: &str = "contender:baseline";

/// Runs the worker. `words` are the url, the queue, the concurrency, and the handler's command.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let [url, queue, at_once, handler @ ..] = words else { return Err("too few words".into()) };
    let handler: Arc<[String]> = handler.iter().map(|word| (*word).to_owned()).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(work(url, queue, at_once.parse()?, handler))
}

async fn work(url: &str, queue: &str, at_once: usize, handler: Arc<[String]>) -> Result<()> {
    let client = Client::builder().url(url).format(Format::Json).build()?;
    let worker = Worker::builder()
        .client(client)
        .queues([queue])
        .concurrency(at_once)
        .handler(move |job| one(job, Arc::clone(&handler)))
        .build()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let told_to_end = async move {
        let _ = terminate.recv().await;
    };
    worker.run(told_to_end).await?;
    Ok(())
}

async fn one(job: Job, handler: Arc<[String]>) -> io::Result<()> {
    let payload = serde_json::to_vec(&job.payload)?;
    let mut command = Command::new(&handler[0]);
    command.args(&handler[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // Ignore the error, because a handler may exit without reading its input.
        let _ = stdin.write_all(&payload).await;
    }
    let output = child.wait_with_output().await?;
    if output.status.success() { Ok(()) } else { Err(io::Error::other(output.status.to_string())) }
}
