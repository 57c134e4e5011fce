//! [`Routes`]: the handler for each job type, with the record of the handler's starts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::time::Instant;

use super::HandlerStatus;
use super::brake::{Brake, ProvenBy};
use super::file_threads::FileThreads;
use super::variables::is_about_a_job;
use super::warm::{Pool, Processes};
use crate::handler::{Handler, Handlers, Mode};
use crate::lock::lock;
use crate::process::Command;

/// The time limit for checking the files that may explain a failed start.
const HINT_TIMEOUT: Duration = Duration::from_secs(1);

/// A handler and the record of its starts.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) handler: Handler,
    pub(super) brake: Brake,
    /// The processes of a warm handler. `None` for a handler that starts a process for each job.
    pub(super) pool: Option<Arc<Pool>>,
    command: OnceLock<Arc<Command>>,
    look: Arc<Mutex<Look>>,
    files: FileThreads,
    starts: AtomicU64,
}

/// The latest check of a handler's program file.
#[derive(Debug, Default)]
struct Look {
    is_under_way: bool,
    /// The time at which the check began, if it found no problem.
    fine_at: Option<Instant>,
}

impl Route {
    fn new(mut handler: Handler, before: Option<&Self>, shared: &RoutesShared) -> Arc<Self> {
        // If a variable occurs twice, the later value wins. Variables about the job are dropped, because only the worker sets
        // them.
        let env: BTreeMap<_, _> = handler.env.into_iter().filter(|(name, _)| !is_about_a_job(name)).collect();
        handler.env = env.into_iter().collect();
        let (pool, proof) = match &handler.mode {
            Mode::Spawn => (None, ProvenBy::Start),
            Mode::Warm(settings) => {
                let before = before.and_then(|before| before.pool.as_deref());
                (Some(Pool::new(&handler, settings, shared.concurrency, &shared.processes, before)), ProvenBy::Job)
            }
        };
        let (brake, files) = (Brake::new(handler.program.file_name(), proof), shared.files.clone());
        let (command, look, starts) = (OnceLock::new(), Arc::default(), AtomicU64::new(0));
        Arc::new(Self { handler, brake, pool, command, look, files, starts })
    }

    /// Returns the command that starts a process of the handler.
    ///
    /// # Errors
    /// When the handler's settings contain a zero byte.
    pub(super) fn command(&self) -> io::Result<&Arc<Command>> {
        if let Some(command) = self.command.get() {
            return Ok(command);
        }
        let Handler { program, env, cwd, .. } = &self.handler;
        let env = env.iter().map(|(name, value)| (name.as_os_str(), value.as_os_str()));
        let command = Command::new(program, env, cwd.as_deref())?;
        Ok(self.command.get_or_init(|| Arc::new(command)))
    }

    /// Counts a start, whether or not it succeeds.
    pub(super) fn count_start(&self) {
        self.starts.fetch_add(1, Ordering::Relaxed);
    }

    fn status(&self, job_type: Option<&str>) -> HandlerStatus {
        HandlerStatus {
            r#type: job_type.map(str::to_owned),
            handler: self.brake.name.clone(),
            mode: if self.pool.is_some() { "warm" } else { "spawn" },
            starts: self.starts.load(Ordering::Relaxed),
            brake: self.brake.status(),
            pids: self.pool.as_ref().map(|pool| pool.pids()).unwrap_or_default(),
        }
    }

    /// Reports whether a start would probably fail. Starts no process, and never blocks on a file. If the handler starts a process
    /// for each job, another thread checks the program file. Each call after the brake's pause requests a new check, and uses the
    /// result of the previous check.
    fn is_broken(&self) -> bool {
        if let Some(pool) = &self.pool {
            return self.brake.holds_starts_that_fail() && !pool.is_any_at_work();
        }
        if !self.brake.is_engaged() {
            return false;
        }
        let pause_end = self.brake.pause_end().filter(|end| *end <= Instant::now());
        // `pause_end` is `None` during the pause and while a start is in progress. The handler then counts as broken.
        pause_end.is_none_or(|pause_end| !self.looks_fine_since(pause_end))
    }

    fn looks_fine_since(&self, pause_end: Instant) -> bool {
        let mut look = lock(&self.look);
        if !look.is_under_way {
            let (latest, program, begun) = (Arc::clone(&self.look), self.handler.program.clone(), Instant::now());
            look.is_under_way = self.files.run(move || {
                let fine_at = program.problem().is_none().then_some(begun);
                *lock(&latest) = Look { is_under_way: false, fine_at };
            });
        }
        look.fine_at.is_some_and(|fine_at| fine_at >= pause_end)
    }

    /// Returns the message for a failed start. Adds a hint if a file explains the failure, because the system reports the same
    /// error for a missing program, working directory and interpreter.
    pub(super) async fn not_started(&self, error: &io::Error) -> String {
        let (program, cwd) = (self.handler.program.clone(), self.handler.cwd.clone());
        let (name, is_missing) = (program.file_name(), error.kind() == io::ErrorKind::NotFound);
        let hint = move || match cwd {
            Some(cwd) if !cwd.is_dir() => format!(" (its cwd {} is missing)", cwd.display()),
            _ if is_missing && program.exists() => " (the file is there; what its #! line names is not)".to_owned(),
            _ => String::new(),
        };
        let hint = self.files.ask(HINT_TIMEOUT, hint).await.unwrap_or_default();
        format!("{name} could not be started: {error}{hint}")
    }
}

/// The handlers of one configuration.
#[derive(Debug)]
pub(super) struct Routes {
    by_type: HashMap<String, Arc<Route>>,
    default: Option<Arc<Route>>,
    shared: RoutesShared,
}

/// The state that all routes share, including those of earlier configurations.
#[derive(Debug, Clone)]
struct RoutesShared {
    /// The threads that check handlers' files.
    files: FileThreads,
    /// The maximum number of jobs that run at once.
    concurrency: usize,
    processes: Arc<Processes>,
}

impl Routes {
    pub(super) fn new(handlers: Handlers, concurrency: usize) -> Self {
        let shared = RoutesShared { files: FileThreads::with_threads(4), concurrency, processes: Arc::default() };
        let none = Self { by_type: HashMap::new(), default: None, shared };
        none.renewed(handlers)
    }

    /// Returns the warm processes of this configuration and of earlier ones.
    pub(super) fn processes(&self) -> &Arc<Processes> {
        &self.shared.processes
    }

    /// Returns the routes for a new configuration. An unchanged handler keeps its route, with the record of its starts. Every
    /// running warm process ends as soon as it is idle, even if its handler is unchanged.
    pub(super) fn renewed(&self, handlers: Handlers) -> Self {
        let route = |handler: Handler, before: Option<&Arc<Route>>| {
            let new = Route::new(handler, before.map(|before| &**before), &self.shared);
            before.filter(|before| before.handler == new.handler).map_or(new, Arc::clone)
        };
        let by_type = handlers.routes.into_iter().map(|(job_type, handler)| {
            let before = self.by_type.get(&job_type);
            (job_type, route(handler, before))
        });
        let by_type = by_type.collect();
        let default = handlers.default.map(|handler| route(handler, self.default.as_ref()));
        self.all().filter_map(|before| before.pool.as_ref()).for_each(|pool| pool.renew());
        Self { by_type, default, shared: self.shared.clone() }
    }

    /// Returns the route for a job type, or the default route. The type is untrusted input, and is used only as a key.
    pub(super) fn find(&self, job_type: &str) -> Option<&Arc<Route>> {
        self.by_type.get(job_type).or(self.default.as_ref())
    }

    /// Returns all routes, the default one last.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.by_type.values().chain(&self.default)
    }

    /// Returns the status of each handler, sorted by job type, with the default handler last.
    pub(super) fn list(&self) -> Vec<HandlerStatus> {
        let by_type: BTreeMap<_, _> = self.by_type.iter().collect();
        let of_types = by_type.into_iter().map(|(job_type, route)| route.status(Some(job_type)));
        of_types.chain(self.default.iter().map(|route| route.status(None))).collect()
    }

    /// Reports whether a job type has its own handler.
    pub(super) fn has_own(&self, job_type: &str) -> bool {
        self.by_type.contains_key(job_type)
    }

    /// Returns the types that have a handler of their own.
    pub(super) fn own_types(&self) -> Vec<String> {
        self.by_type.keys().cloned().collect()
    }

    /// Returns the sorted names of the handlers that cannot be started.
    pub(super) fn broken(&self) -> Vec<String> {
        let broken = self.all().filter(|route| route.is_broken());
        broken.map(|route| route.brake.name.clone()).collect::<BTreeSet<_>>().into_iter().collect()
    }
}
