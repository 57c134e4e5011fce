//! [`Processes`]: all warm processes of one dispatcher, across its pools.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio_util::task::TaskTracker;

use super::Pool;
use super::member::{Member, StopRequest};
use crate::dispatch::{HandlerProcess, ProcessStarts};
use crate::lifecycle::{Lifecycle, Phase};
use crate::lock::lock;

/// Each process and its pool, keyed by `Member::number`.
pub(super) type Members = BTreeMap<u64, (Arc<Pool>, Arc<Member>)>;

/// All warm processes of one dispatcher.
#[derive(Debug, Default)]
pub(in crate::dispatch) struct Processes {
    members: Mutex<Members>,
    pub(super) next: AtomicU64,
    /// The keeper task of each process, and the tasks that wait for a process to connect. All these tasks have ended once the last
    /// process has ended.
    pub(super) tasks: TaskTracker,
    starts: Mutex<BTreeMap<(String, &'static str), u64>>,
}

impl Processes {
    pub(super) fn members(&self) -> MutexGuard<'_, Members> {
        lock(&self.members)
    }

    fn all(&self) -> Vec<(Arc<Pool>, Arc<Member>)> {
        self.members().values().cloned().collect()
    }

    pub(super) fn count_start(&self, handler: &str, reason: &'static str) {
        let mut starts = lock(&self.starts);
        *starts.entry((handler.to_owned(), reason)).or_default() += 1;
    }

    /// Ends all processes, and waits until their process groups have ended. Must not be called while a job runs.
    pub(in crate::dispatch) async fn finish(&self, lifecycle: &Lifecycle) {
        self.stop_all(StopRequest::Retire);
        self.tasks.close();
        let mut gone = pin!(self.tasks.wait());
        tokio::select! {
            biased;
            () = &mut gone => return,
            () = lifecycle.reached(Phase::Killing) => self.stop_all(StopRequest::Terminate),
        }
        gone.await;
    }

    pub(super) fn stop_all(&self, stop: StopRequest) {
        for (pool, member) in self.all() {
            pool.remove_idle(&member);
            member.stop(stop);
        }
    }

    /// Kills all processes, and does not wait until they have ended.
    pub(in crate::dispatch) fn kill(&self) {
        self.stop_all(StopRequest::Kill);
    }

    /// Returns the status of each process.
    pub(in crate::dispatch) fn list(&self) -> Vec<HandlerProcess> {
        let described = self.all().into_iter().map(|(pool, member)| {
            let memory_bytes = member.memory();
            let work = member.work();
            HandlerProcess {
                handler: pool.name.clone(),
                pid: member.pid,
                state: work.state.name(),
                jobs: work.jobs,
                age_seconds: member.started.elapsed().as_secs_f64(),
                memory_bytes,
                job: work.job.as_ref().map(ToString::to_string),
            }
        });
        described.collect()
    }

    /// Returns the number of started processes, by handler and by the reason for the start.
    pub(in crate::dispatch) fn starts(&self) -> Vec<ProcessStarts> {
        let starts = lock(&self.starts);
        let count = starts.iter().map(|((handler, reason), count)| (handler.clone(), *reason, *count));
        count.map(|(handler, reason, count)| ProcessStarts { handler, reason, count }).collect()
    }
}
