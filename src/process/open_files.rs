//! [`OpenFiles`]: how many files this process and its children may open; and the one signal whose action, where this process was
//! handed it, keeps it from learning how its children end.

use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::starter::Way;

/// Open files of everything but children: the runtime, the log, connections.
const OTHER_DESCRIPTORS: u64 = 64;

/// How many descriptors a child looks for at least, where the kernel cannot close all at once.
const LEAST_BOUND: u64 = 1024;

/// The soft limit with which this process was started. A second dispatcher of the same process finds a raised one.
static HANDED_DOWN: OnceLock<Option<u64>> = OnceLock::new();

/// What a child is given of this process's open files.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OpenFiles {
    /// The limit that a child gets back, soft and hard, as the kernel reads it; none where this process has not raised its own. A
    /// program that uses `select` writes beyond its arrays where there are more than 1024 descriptors.
    pub(super) limit: Option<[u64; 2]>,
    /// A number that the descriptors of this process stay below.
    pub(super) bound: u32,
}

impl OpenFiles {
    /// Sees to it that `processes` children can run at once, by raising the soft limit of open files if need be. The error is
    /// that the hard limit does not allow that.
    pub(crate) fn ensure(processes: usize, way: Way) -> (Self, Result<(), TooFewDescriptors>) {
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

/// Returns a number beyond all descriptors that this process has now, those that it was handed included.
fn beyond_present() -> u32 {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers.max().map_or(0, |highest| highest.saturating_add(1))
}

/// The limit of open files is lower than what may be needed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TooFewDescriptors {
    pub(crate) limit: u64,
    pub(crate) needed: u64,
}

/// Sees to it that the kernel keeps exit statuses for us. It throws them away where SIGCHLD is ignored, and that is
/// handed down from whoever started this process.
#[expect(unsafe_code, reason = "no safe wrapper tells what becomes of a signal, or sets it back to its default")]
pub(crate) fn keep_exit_statuses() {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the kernel writes one `sigaction` to the pointer, of which all zeroes is a valid value, and reads none. The default
    // action of SIGCHLD runs no code, and takes the place of none that does: a handler of the embedding program stays.
    unsafe {
        libc::sigaction(libc::SIGCHLD, std::ptr::null(), action.as_mut_ptr());
        if action.assume_init().sa_sigaction == libc::SIG_IGN {
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        }
    }
}
