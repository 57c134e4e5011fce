//! [`OpenFiles`]: the limits on open files of this process and its children.

use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::starter::StartMethod;

/// The number of descriptors that this process needs apart from its children: for the runtime, the log and connections.
const OTHER_DESCRIPTORS: u64 = 64;

/// The minimum of `OpenFiles::bound`, unless the limit on open files is lower.
const LEAST_BOUND: u64 = 1024;

/// The soft limit that this process inherited. Recorded once, because a second dispatcher in this process finds the limit already
/// raised.
static HANDED_DOWN: OnceLock<Option<u64>> = OnceLock::new();

/// The limit on open files that a child gets, and an upper bound for the descriptors that a child closes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OpenFiles {
    /// The inherited soft limit and the hard limit, in the form that `prlimit64` takes. `None` if this process has not raised its
    /// soft limit. A child gets the inherited limit back, because a program that uses `select` overflows its arrays with
    /// descriptors above 1023.
    pub(super) limit: Option<[u64; 2]>,
    /// A number above the descriptors of this process, for a child that must close them one by one.
    pub(super) bound: u32,
}

impl OpenFiles {
    /// Raises the soft limit on open files so that `processes` children can run at once. Also returns an error if the limit stays
    /// too low.
    pub(crate) fn ensure(processes: usize, way: StartMethod) -> (Self, Result<(), TooFewDescriptors>) {
        let needed = way.descriptors() * processes as u64 + OTHER_DESCRIPTORS;
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        let handed_down = *HANDED_DOWN.get_or_init(|| current);
        let raised = match current {
            Some(soft) if soft < needed => {
                let raised = Some(maximum.map_or(needed, |hard| hard.min(needed)));
                let set = setrlimit(Resource::Nofile, Rlimit { current: raised, maximum });
                if set.is_ok() { raised } else { current }
            }
            current => current,
        };
        let limit = raised.unwrap_or(u64::MAX);
        let to_restore = (raised != handed_down).then(|| [handed_down, maximum].map(|limit| limit.unwrap_or(u64::MAX)));
        let bound = u32::try_from(limit.min(needed.max(LEAST_BOUND))).unwrap_or(u32::MAX).max(beyond_present());
        let enough = if limit < needed { Err(TooFewDescriptors { limit, needed }) } else { Ok(()) };
        (Self { limit: to_restore, bound }, enough)
    }
}

/// Returns a number above all descriptors that are open now, including inherited ones.
fn beyond_present() -> u32 {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers.max().map_or(0, |highest| highest.saturating_add(1))
}

/// The warning about [`TooFewDescriptors`].
pub(crate) const TOO_FEW_DESCRIPTORS: &str =
    "limit of open files is too low for that many jobs at once; raise it (ulimit -n, LimitNOFILE=)";

/// The error that the limit on open files is too low.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TooFewDescriptors {
    pub(crate) limit: u64,
    pub(crate) needed: u64,
}
