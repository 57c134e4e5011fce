//! The take stream: sends jobs as they become ready, and a heartbeat after some time without jobs.
//!
//! The stream is pulled, not pushed: hyper asks for the next chunk only when the connection can buffer it. So the stream
//! needs no task and no channel of its own, and takes no job that the connection cannot accept. When the connection ends,
//! hyper drops the response's body, and with the body the lease.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, stream};
use hyper::body::Frame;
use tokio::sync::watch;

use super::format::StreamFormat;
use super::job::Job;
use super::lease::LeaseId;
use super::store::Store;

/// The size in bytes at which a chunk is full. Small jobs share a chunk, because one chunk per job would cost one system
/// call per job.
const CHUNK_BYTES: usize = 64 * 1024;
/// The approximate size in bytes of a job without its payload. If only payloads counted, a chunk could hold almost any
/// number of jobs with small payloads.
const ENVELOPE_BYTES: usize = 256;

/// The parameters of `GET /jobs/take`.
#[derive(Debug)]
pub(super) struct TakeRequest {
    /// The maximum number of unreported jobs that the stream may hold; 0 means no limit except the connection's buffers.
    pub(super) prefetch: usize,
    /// The queues to take jobs from; empty means all queues.
    pub(super) queues: BTreeSet<String>,
}

/// The lease of a stream on its jobs. Dropping the lease closes the stream in the store. When the connection ends, hyper
/// drops the response's body, and with the body the lease.
#[derive(Debug)]
struct Lease {
    store: Store,
    id: LeaseId,
}

impl Lease {
    fn open(store: Store, request: TakeRequest) -> Self {
        let queues = request.queues.into_iter().collect();
        let id = store.with(|state, _| state.open(request.prefetch, queues));
        Self { store, id }
    }

    /// Takes jobs for the next chunk, until the chunk is full or the state gives this stream no further job.
    fn take(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        let mut size = 0;
        self.store.with(|state, now| {
            while size < CHUNK_BYTES
                && let Some(job) = state.take(now, self.id)
            {
                size += ENVELOPE_BYTES + job.spec.payload.get().len();
                jobs.push(job);
            }
        });
        jobs
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.store.with(|state, _| state.close(self.id));
    }
}

/// The state of an open take stream.
#[derive(Debug)]
struct Take {
    lease: Lease,
    format: StreamFormat,
    look_again: watch::Receiver<()>,
    heartbeat_interval: Duration,
}

impl Take {
    /// Waits for jobs, but no longer than the heartbeat interval, and returns a chunk with the jobs or a heartbeat. hyper
    /// asks for a chunk only when the connection can buffer it, which limits the jobs in flight even if the prefetch is
    /// unlimited.
    async fn next_chunk(&mut self) -> Option<Bytes> {
        // The timer restarts with every chunk, so a busy stream sends no heartbeats.
        let silence = tokio::time::sleep(self.heartbeat_interval);
        tokio::pin!(silence);
        loop {
            // Mark the latest change as seen before the take, so that any later change ends the wait.
            self.look_again.borrow_and_update();
            let jobs = self.lease.take();
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

    /// Serializes jobs into a chunk. The store is not locked.
    fn chunk(&self, jobs: &[Job]) -> Bytes {
        let mut chunk = Vec::new();
        for job in jobs {
            self.format.write(job, &mut chunk);
        }
        chunk.into()
    }
}

/// Opens a take stream on the store. Dropping the stream requeues the jobs that it holds.
pub(super) fn frames(
    store: Store,
    request: TakeRequest,
    format: StreamFormat,
) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + 'static {
    let take = Take {
        format,
        look_again: store.watch_for_takers(),
        heartbeat_interval: store.heartbeat_interval(),
        lease: Lease::open(store, request),
    };
    stream::unfold(take, async |mut take| {
        let chunk = take.next_chunk().await?;
        Some((Ok(Frame::data(chunk)), take))
    })
}
