//! [`Waiting`]: the idle processes of a pool, and the line of jobs that wait for an idle process. At least one of the two is
//! empty.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::oneshot::{self, Receiver, Sender};
use tokio::time::Instant;

use super::Pool;
use super::member::Member;
use super::wire::Wire;

/// A connected process without a job.
#[derive(Debug)]
pub(in crate::dispatch) struct Idle {
    pub(super) member: Arc<Member>,
    pub(super) wire: Wire,
    pub(super) since: Instant,
}

/// The idle processes of a pool, or the jobs that wait for an idle process.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// The idle processes, the most recently used one last.
    pub(super) idle: Vec<Idle>,
    /// The waiting jobs, in the order of their arrival. The channel of a job that no longer waits is closed.
    line: VecDeque<Sender<Idle>>,
}

impl Waiting {
    /// Takes an idle process, or joins the line.
    pub(super) fn take(&mut self, pool: &Arc<Pool>) -> Result<Idle, InLine> {
        self.idle.pop().ok_or_else(|| {
            let (sender, receiver) = oneshot::channel();
            self.line.retain(|waiting| !waiting.is_closed());
            self.line.push_back(sender);
            InLine { pool: Arc::clone(pool), receiver }
        })
    }

    /// Sends an idle process to the first job in the line, so that a job that arrives later cannot take the process. If no job
    /// waits, adds the process to `idle`.
    pub(super) fn give(&mut self, mut idle: Idle) {
        while let Some(first) = self.line.pop_front() {
            match first.send(idle) {
                Ok(()) => return,
                Err(refused) => idle = refused,
            }
        }
        self.idle.push(idle);
    }
}

/// A job's position in the line. This future resolves to an idle process. If the future is dropped after a process has been sent
/// to it, the process goes to the next job.
#[derive(Debug)]
pub(in crate::dispatch) struct InLine {
    pool: Arc<Pool>,
    receiver: Receiver<Idle>,
}

impl Future for InLine {
    type Output = Idle;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Idle> {
        loop {
            // An error is impossible, because the pool keeps the sender until it sends a process.
            let Poll::Ready(Ok(idle)) = Pin::new(&mut self.receiver).poll(context) else { return Poll::Pending };
            if let Some(idle) = self.pool.usable(idle) {
                return Poll::Ready(idle);
            }
            match self.pool.take_idle() {
                Ok(idle) => return Poll::Ready(idle),
                Err(mut again) => std::mem::swap(&mut self.receiver, &mut again.receiver),
            }
        }
    }
}

impl Drop for InLine {
    fn drop(&mut self) {
        self.receiver.close();
        if let Ok(idle) = self.receiver.try_recv() {
            self.pool.waiting().give(idle);
        }
    }
}
