//! [`FileThreads`]: threads for file operations that may hang, for example on a network file system.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::Builder;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::lock::lock;

/// The maximum number of tasks that wait for a thread.
const MAX_WAITING: usize = 1024;

type FileTask = Box<dyn FnOnce() + Send>;

/// A set of threads that run tasks. A thread is started for a new task, and ends when no task waits. Clones share one set.
#[derive(Debug, Clone)]
pub(super) struct FileThreads {
    max_threads: usize,
    queue: Arc<Mutex<Queue>>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<FileTask>,
    threads: usize,
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("waiting", &self.waiting.len()).field("threads", &self.threads).finish()
    }
}

impl FileThreads {
    /// Returns a set that runs up to `max_threads` tasks at once.
    pub(super) fn with_threads(max_threads: usize) -> Self {
        Self { max_threads, queue: Arc::default() }
    }

    /// Queues a task. Returns false if too many tasks are waiting, or if there is no thread and none can be started.
    pub(super) fn run(&self, task: impl FnOnce() + Send + 'static) -> bool {
        let mut queue = self.queue();
        if queue.waiting.len() >= MAX_WAITING {
            return false;
        }
        if queue.threads < self.max_threads {
            let threads = self.clone();
            let started = Builder::new().name("files".to_owned()).spawn(move || threads.work());
            queue.threads += usize::from(started.is_ok());
        }
        if queue.threads > 0 {
            queue.waiting.push_back(Box::new(task));
        }
        queue.threads > 0
    }

    /// Runs `question` in a thread, and waits up to `patience` for the answer. Returns `None` if no answer arrives within
    /// `patience`, or if the task cannot be queued or panics.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        patience: Duration,
        question: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let (tell, answer) = oneshot::channel();
        let is_asked = self.run(move || {
            if !tell.is_closed() {
                // The send fails if `patience` has elapsed, because the receiver is then dropped.
                let _ = tell.send(question());
            }
        });
        if !is_asked {
            return None;
        }
        timeout(patience, answer).await.ok()?.ok()
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }

    /// Runs queued tasks until the queue is empty.
    fn work(&self) {
        while let Some(task) = self.next() {
            // Catch any panic, because a panic would end the thread, but `threads` would still count the thread.
            let _ = catch_unwind(AssertUnwindSafe(task));
        }
    }

    /// Takes the next task. If there is none, decrements the number of threads, because the calling thread then ends.
    fn next(&self) -> Option<FileTask> {
        let mut queue = self.queue();
        let next = queue.waiting.pop_front();
        queue.threads -= usize::from(next.is_none());
        next
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_hanging_task_costs_patience_and_one_thread() {
        let (threads, (go, gone)) = (FileThreads::with_threads(2), mpsc::channel::<()>());
        let hung = threads.ask(Duration::from_millis(10), move || gone.recv());
        assert!(hung.await.is_none());
        assert_eq!(threads.ask(LONG, || 7).await, Some(7));
        drop(go);
    }

    #[tokio::test]
    async fn tasks_wait_for_a_thread_up_to_a_limit() {
        let (threads, (go, gone)) = (FileThreads::with_threads(1), mpsc::channel::<()>());
        let (begin, begun) = mpsc::channel();
        assert!(threads.run(move || {
            begin.send(()).unwrap();
            let _ = gone.recv();
        }));
        begun.recv_timeout(LONG).unwrap();
        assert!((0..MAX_WAITING).all(|_| threads.run(|| {})));
        assert!(!threads.run(|| {}));
        assert_eq!(threads.queue().threads, 1);
        drop(go);
        while threads.queue().threads > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(threads.ask(LONG, || 7).await, Some(7));
    }

    #[tokio::test]
    async fn a_task_that_panics_ends_no_thread() {
        let threads = FileThreads::with_threads(1);
        assert_eq!(threads.ask(LONG, || panic!("on purpose")).await, None::<()>);
        assert_eq!(threads.ask(LONG, || 7).await, Some(7));
    }
}
