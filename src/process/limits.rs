//! Limits of the operating system that running many children at once comes up against.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Open files of a running child: its stdin, stdout and stderr, and its pidfd; while it starts, also its ends.
const DESCRIPTORS_PER_PROCESS: u64 = 7;

/// Open files of everything else: the runtime, the log, connections.
const OTHER_DESCRIPTORS: u64 = 64;

/// Sees to it that `processes` children can run at once, by raising the soft limit of open files if need be.
///
/// # Errors
/// When the hard limit does not allow that: what there is, and what is needed.
pub(crate) fn ensure_descriptors(processes: usize) -> Result<(), (u64, u64)> {
    let needed = DESCRIPTORS_PER_PROCESS * processes as u64 + OTHER_DESCRIPTORS;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let Some(soft) = current.filter(|soft| *soft < needed) else {
        return Ok(());
    };
    let raised = maximum.map_or(needed, |hard| hard.min(needed));
    if setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum }).is_err() {
        return Err((soft, needed));
    }
    if raised < needed { Err((raised, needed)) } else { Ok(()) }
}
