//! The take stream: sends jobs as they become ready, and a heartbeat after some time without jobs.
//!
//! The stream is pulled, not pushed: hyper asks for the next chunk only when the connection can buffer it. So the stream
//! needs no task and no channel of its own, and takes no job that the connection cannot accept. When the connection ends,
//! hyper drops the response's body, and with the body the [`Take`].

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, stream};
use hyper::body::Frame;
use tokio::sync::watch;

use super::format::StreamFormat;
use super::job::StoredJob;
use super::lease::LeaseId;
use super::store::Store;

/// The size in bytes at which a chunk is full. Small jobs share a chunk, because one chunk per job would cost one system
/// call per job.
const CHUNK_BYTES: usize = 64 * 1024;
/// The approximate size in bytes of a job without its payload. If only payloads counted, a chunk could hold almost any
/// number of jobs with small payloads.
const ENVELOPE_BYTES: usize = 256;

/// An open take stream. Dropping this value closes the stream in the store.
#[derive(Debug)]
struct Take {
    store: Store,
    lease: LeaseId,
    format: StreamFormat,
    look_again: watch::Receiver<()>,
    heartbeat_interval: Duration,
}

impl Take {
    /// Waits for jobs, but no longer than the heartbeat interval, and returns a chunk with the jobs or a heartbeat.
    async fn next_chunk(&mut self) -> Option<Bytes> {
        // The timer restarts with every chunk, so a busy stream sends no heartbeats.
        let silence = tokio::time::sleep(self.heartbeat_interval);
        tokio::pin!(silence);
        loop {
            // Mark the latest change as seen before the take, so that any later change ends the wait.
            self.look_again.borrow_and_update();
            let jobs = self.take_jobs();
            if !jobs.is_empty() {
                return Some(self.chunk(&jobs));
            }
            tokio::select! {
                biased;
                () = &mut silence => return Some(Bytes::from_static(self.format.heartbeat())),
                changed = self.look_again.changed() => changed.ok()?,
            }
        }
    }

    /// Takes jobs for the next chunk, until the chunk is full or there is no further job that this stream may take.
    fn take_jobs(&self) -> Vec<StoredJob> {
        let mut jobs = Vec::new();
        let mut size = 0;
        self.store.with(|all, now| {
            while size < CHUNK_BYTES
                && let Some(job) = all.take(now, self.lease)
            {
                size += ENVELOPE_BYTES + job.spec.payload.get().len();
                jobs.push(job);
            }
        });
        jobs
    }

    /// Serializes jobs into a chunk. The store is not locked.
    fn chunk(&self, jobs: &[StoredJob]) -> Bytes {
        let mut chunk = Vec::new();
        for job in jobs {
            self.format.write(job, &mut chunk);
        }
        chunk.into()
    }
}

impl Drop for Take {
    fn drop(&mut self) {
        self.store.with(|jobs, _| jobs.close(self.lease));
    }
}

/// Opens a take stream on the store. Dropping the stream requeues the jobs that it holds.
pub(super) fn frames(
    store: Store,
    prefetch: usize,
    queues: Vec<String>,
    format: StreamFormat,
) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + 'static {
    let take = Take {
        format,
        look_again: store.watch_for_takers(),
        heartbeat_interval: store.heartbeat_interval(),
        lease: store.with(|jobs, _| jobs.open(prefetch, queues)),
        store,
    };
    stream::unfold(take, async |mut take| {
        let chunk = take.next_chunk().await?;
        Some((Ok(Frame::data(chunk)), take))
    })
}
