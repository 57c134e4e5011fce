//! [`Task`]: a job that is being run, from the choice of its handler to its outcome. Starting or finding a process may take several
//! tries.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use super::brake::{Begin, NotStarted};
use super::routes::{Route, Routes};
use super::warm::{HandlerHealth, Idle, Pool, StartError};
use super::{Ended, ExecDispatcher, variables};
use crate::job::{Failure, Job, Outcome};
use crate::lifecycle::{Lifecycle, Phase};
use crate::process::{Input, Resident, Start};

/// A job, and the state that is kept between the tries to run the job.
pub(super) struct Task<'a> {
    pub(super) job: &'a Job,
    pub(super) lifecycle: &'a Lifecycle,
    pub(super) routes: watch::Receiver<Arc<Routes>>,
    /// The number of warm processes that ended, or closed their connection, before they had read the whole job.
    pub(super) unread: usize,
}

/// The result of one try at running a job.
pub(super) enum Tried {
    Ended(Ended),
    /// The job has not begun, and another try is needed. Holds the error if the start failed.
    Again(Option<io::Error>),
}

impl Tried {
    fn cut_short(why: Cut) -> Self {
        match why {
            Cut::Replaced => Self::Again(None),
            Cut::Stopping => Self::Ended(Ended::unstarted(Outcome::Interrupted)),
        }
    }

    async fn failed(route: &Route, error: &io::Error) -> Self {
        let error_type = if start_error(error).is_some() { "StartError" } else { "SpawnError" };
        let failure = Failure::new(error_type, why_not_started(route, error).await);
        Self::Ended(Ended::unstarted(Outcome::Failure(failure)))
    }
}

impl ExecDispatcher {
    /// Runs a job in a process of its own. `fault` is the error of the job's previous start, if that start failed.
    pub(super) async fn try_spawned(&self, route: &Route, task: &mut Task<'_>, fault: Option<io::Error>) -> Tried {
        let Task { job, lifecycle, routes, .. } = task;
        let result = self.results.file();
        let start = || self.start(route, job, lifecycle, &result);
        match route.brake.start(fault, stopped_or_replaced(lifecycle, routes), start).await {
            Ok((started, _)) => {
                let since = started.since;
                match started.see_through(&result).await {
                    Ok(ended) => Tried::Ended(ended.since(since)),
                    Err(error) => Tried::Again(Some(error)),
                }
            }
            Err(NotStarted::CutShort(why)) => Tried::cut_short(why),
            Err(NotStarted::Failed(error)) => Tried::failed(route, &error).await,
        }
    }

    /// Runs a job in a warm process. `fault` is the error of the job's previous start, if that start failed.
    pub(super) async fn try_warm(
        &self,
        route: &Arc<Route>,
        pool: &Arc<Pool>,
        task: &mut Task<'_>,
        fault: Option<io::Error>,
    ) -> Tried {
        let place = tokio::select! {
            biased;
            place = pool.place() => place,
            why = killed_or_replaced(route, task) => return Tried::cut_short(why),
        };
        let busy = match self.warm_process(route, pool, task, fault).await {
            Ok(idle) => pool.busy(idle, place),
            Err(tried) => return tried,
        };
        let _listed = self.pids.list(&task.job.id, busy.pid());
        let (started, since) = (busy.started(), Instant::now());
        let (ended, health) = busy.run(task.job, task.lifecycle).await;
        match health {
            HandlerHealth::Works => route.brake.proven(started),
            HandlerHealth::Crashed(why) => route.brake.crashed(started, &why),
            HandlerHealth::JobUnread(why) => {
                if let Some(why) = why {
                    route.brake.crashed(started, &why);
                }
                task.unread += 1;
                // Limit the retries, because some jobs crash every process that reads them.
                if task.unread < if pool.is_any_at_work() { MAX_UNREAD } else { MAX_UNREAD_ALONE } {
                    return Tried::Again(None);
                }
            }
            HandlerHealth::Unknown => {}
        }
        Tried::Ended(ended.since(since))
    }

    /// Takes an idle process. If there is none, starts a process, and takes the first process that becomes idle or connects.
    async fn warm_process(
        &self,
        route: &Arc<Route>,
        pool: &Arc<Pool>,
        task: &mut Task<'_>,
        fault: Option<io::Error>,
    ) -> Result<Idle, Tried> {
        let mut in_line = match pool.take_idle() {
            Ok(idle) => {
                if let Some(error) = &fault {
                    let started = start_error(error).map_or_else(Instant::now, |error| error.started);
                    route.brake.failed_since(started, error);
                }
                return Ok(idle);
            }
            Err(in_line) => in_line,
        };
        let slot = tokio::select! {
            biased;
            idle = &mut in_line => return Ok(idle),
            slot = pool.slot() => slot,
            why = killed_or_replaced(route, task) => return Err(Tried::cut_short(why)),
        };
        let spawn = |socket: &PathBuf| self.spawn_warm(route, socket);
        let lifecycle = task.lifecycle;
        let start = || pool.start(self.results.socket(), &slot, lifecycle, spawn);
        let cut = async {
            tokio::select! {
                biased;
                cut = stopped_or_replaced(lifecycle, &mut task.routes) => WarmCut::Short(cut),
                idle = &mut in_line => WarmCut::Idle(idle),
            }
        };
        let (starting, cut) = match route.brake.start(fault, cut, start).await {
            Ok(started) => started,
            Err(NotStarted::CutShort(WarmCut::Idle(idle))) => return Ok(idle),
            Err(NotStarted::CutShort(WarmCut::Short(why))) => return Err(Tried::cut_short(why)),
            // Do not fail the job. It can still get one of the running processes, while the brake delays the next start.
            Err(NotStarted::Failed(_)) if pool.is_any_at_work() => return Err(Tried::Again(None)),
            Err(NotStarted::Failed(error)) => return Err(Tried::failed(route, &error).await),
        };
        let idle = match cut {
            Some(WarmCut::Idle(idle)) => idle,
            _ => tokio::select! {
                biased;
                connected = starting.begun() => return match connected {
                    Ok(()) => starting.connected().ok_or(Tried::Again(None)),
                    Err(error) => Err(Tried::Again(Some(error))),
                },
                why = killed_or_replaced(route, task) => return Err(Tried::cut_short(why)),
                idle = in_line => idle,
            },
        };
        let (brake_of, since) = (Arc::clone(route), starting.started());
        pool.adopt(starting, lifecycle, move |error| brake_of.brake.failed_since(since, error));
        Ok(idle)
    }

    pub(super) fn spawn_warm(&self, route: &Route, socket: &Path) -> io::Result<Resident> {
        route.count_start();
        Resident::spawn(Start {
            command: route.command()?,
            variables: &variables::of_warm(socket, &self.worker_id),
            input: Input::Nothing,
            output: route.handler.output,
            starter: &self.starter,
            read_delay: &self.read_delay,
            children: &self.children,
        })
    }
}

/// The reason why a job stops waiting for a start.
enum Cut {
    /// The worker is stopping.
    Stopping,
    /// A reload has replaced the handlers.
    Replaced,
}

/// The reason why a job stops waiting for the start of a warm process.
enum WarmCut {
    Short(Cut),
    /// Another process has become idle.
    Idle(Idle),
}

/// The value of `Task::unread` at which the job fails if the pool has another usable process.
const MAX_UNREAD: usize = 5;

/// The value of `Task::unread` at which the job fails if the pool has no other usable process.
const MAX_UNREAD_ALONE: usize = 2;

/// Returns the `StartError` if a warm process was started but did not connect.
fn start_error(error: &io::Error) -> Option<&StartError> {
    error.get_ref()?.downcast_ref()
}

/// Describes why a start failed, for error messages.
pub(super) async fn why_not_started(route: &Route, error: &io::Error) -> String {
    if start_error(error).is_some() { format!("{} {error}", route.brake.name) } else { route.not_started(error).await }
}

async fn stopped_or_replaced(lifecycle: &Lifecycle, routes: &mut watch::Receiver<Arc<Routes>>) -> Cut {
    tokio::select! {
        biased;
        () = lifecycle.awaited() => Cut::Stopping,
        // `changed` fails only once the sender is dropped, and the dispatcher holds the sender.
        _ = routes.changed() => Cut::Replaced,
    }
}

/// Waits until the lifecycle reaches `Phase::Killing`, or a reload replaces the job's route. A drain does not end the wait,
/// because jobs that were taken before the drain are still run. A reload that keeps the job's route does not end the wait either.
async fn killed_or_replaced(route: &Route, task: &mut Task<'_>) -> Cut {
    let Task { job, lifecycle, routes, .. } = task;
    loop {
        // Check before the wait, because an earlier wait on `routes` may have consumed the notification.
        let is_same = routes.borrow_and_update().find(&job.job_type).is_some_and(|found| std::ptr::eq(&**found, route));
        if !is_same {
            return Cut::Replaced;
        }
        tokio::select! {
            biased;
            () = lifecycle.reached(Phase::Killing) => return Cut::Stopping,
            // `changed` fails only once the sender is dropped, and the dispatcher holds the sender.
            _ = routes.changed() => {}
        }
    }
}
