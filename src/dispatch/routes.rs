//! [`Routes`]: which handler a job goes to, and how the starts of each have gone.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, OnceLock};

use super::brake::Brake;
use super::variables::is_about_a_job;
use crate::handler::{Handler, Handlers};
use crate::process::Command;

/// A handler, and how its starts have gone of late.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) handler: Handler,
    pub(super) brake: Brake,
    command: OnceLock<Arc<Command>>,
}

impl Route {
    fn new(mut handler: Handler) -> Arc<Self> {
        // Of what is there twice, the later counts. What is said of a job nobody else can say.
        let env: BTreeMap<_, _> = handler.env.into_iter().filter(|(name, _)| !is_about_a_job(name)).collect();
        handler.env = env.into_iter().collect();
        let brake = Brake::new(handler.program.file_name());
        Arc::new(Self { handler, brake, command: OnceLock::new() })
    }

    /// What is started for its jobs.
    ///
    /// # Errors
    /// When there is a zero byte in the handler's settings.
    pub(super) fn command(&self) -> io::Result<&Arc<Command>> {
        if let Some(command) = self.command.get() {
            return Ok(command);
        }
        let Handler { program, env, cwd, .. } = &self.handler;
        let env = env.iter().map(|(name, value)| (name.as_os_str(), value.as_os_str()));
        let command = Command::new(program, env, cwd.as_deref())?;
        Ok(self.command.get_or_init(|| Arc::new(command)))
    }

    /// Whether a start would fail, as far as that can be known without one.
    fn is_broken(&self) -> bool {
        self.brake.is_engaged() && (self.brake.has_failed_lately() || self.handler.program.problem().is_some())
    }
}

/// Each handler of a configuration.
#[derive(Debug)]
pub(super) struct Routes {
    by_type: HashMap<String, Arc<Route>>,
    default: Option<Arc<Route>>,
}

impl Routes {
    pub(super) fn new(handlers: Handlers) -> Self {
        let routes = handlers.routes.into_iter().map(|(job_type, handler)| (job_type, Route::new(handler)));
        Self { by_type: routes.collect(), default: handlers.default.map(Route::new) }
    }

    /// The routes of other handlers. Those that are as they were keep what is known of their starts.
    pub(super) fn renewed(&self, handlers: Handlers) -> Self {
        let mut new = Self::new(handlers);
        let pairs = new.by_type.iter_mut().filter_map(|(job_type, route)| Some((route, self.by_type.get(job_type)?)));
        for (route, old) in pairs.chain(new.default.iter_mut().zip(&self.default)) {
            if route.handler == old.handler {
                *route = Arc::clone(old);
            }
        }
        new
    }

    /// The type is looked up, and nothing else is ever made of it.
    pub(super) fn find(&self, job_type: &str) -> Option<&Arc<Route>> {
        self.by_type.get(job_type).or(self.default.as_ref())
    }

    /// Whether jobs of that type have a handler of their own.
    pub(super) fn has_own(&self, job_type: &str) -> bool {
        self.by_type.contains_key(job_type)
    }

    /// The names of the handlers that cannot be started, in order.
    pub(super) fn broken(&self) -> Vec<String> {
        let all = self.by_type.values().chain(&self.default);
        let mut names: Vec<String> =
            all.filter(|route| route.is_broken()).map(|route| route.brake.name().to_owned()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}
