//! A worker that is built on the official client, and handles jobs in its own process.

use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use zizq::{Client, Format, Job, Worker};

use crate::{Result, stamp, warm_handler};

pub(crate) const ROLE: &str = "contender:client";

/// Runs the worker. `words` are the url, the queue, the concurrency, and the handler's command. The command is not run. If the
/// command ends with `STAMP` and the path of a socket, the worker sends the current time to that socket for each job.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let [url, queue, at_once, handler @ ..] = words else { return Err("too few words".into()) };
    let stamps = match handler {
        [.., warm_handler::STAMP, socket] => Some(Arc::from(*socket)),
        _ => None,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(work(url, queue, at_once.parse()?, stamps))
}

async fn work(url: &str, queue: &str, at_once: usize, stamps: Option<Arc<str>>) -> Result<()> {
    let client = Client::builder().url(url).format(Format::Json).build()?;
    let worker = Worker::builder()
        .client(client)
        .queues([queue])
        .concurrency(at_once)
        .handler(move |job| std::future::ready(one(job, stamps.as_deref())))
        .build()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let told_to_end = async move {
        let _ = terminate.recv().await;
    };
    worker.run(told_to_end).await?;
    Ok(())
}

/// Handles a job. The client has already parsed the payload.
fn one(job: Job, stamps: Option<&str>) -> Result<()> {
    if let Some(socket) = stamps {
        stamp::send(socket, stamp::now())?;
    }
    std::hint::black_box(job.payload).map(drop).ok_or_else(|| "a job without a payload".into())
}
