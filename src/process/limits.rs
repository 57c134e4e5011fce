//! What this process may have been handed down that running children does not go with.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Open files of a running child: its stdin, stdout and stderr, and its pidfd; while it starts, also its ends.
const DESCRIPTORS_PER_PROCESS: u64 = 7;

/// Open files of everything else: the runtime, the log, connections.
const OTHER_DESCRIPTORS: u64 = 64;

/// Sees to it that `processes` children can run at once, by raising the soft limit of open files if need be.
///
/// # Errors
/// When the hard limit does not allow that.
pub(crate) fn ensure_descriptors(processes: usize) -> Result<(), TooFewDescriptors> {
    let needed = DESCRIPTORS_PER_PROCESS * processes as u64 + OTHER_DESCRIPTORS;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let Some(soft) = current.filter(|soft| *soft < needed) else {
        return Ok(());
    };
    let raised = maximum.map_or(needed, |hard| hard.min(needed));
    let limit = match setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum }) {
        Ok(()) => raised,
        Err(_) => soft,
    };
    if limit < needed { Err(TooFewDescriptors { limit, needed }) } else { Ok(()) }
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
    // SAFETY: the pointer is to live memory of the right type, and all zeroes is a valid `sigaction`. The default action
    // of SIGCHLD does nothing, and takes the place of none that does: a handler of the embedding program stays.
    unsafe {
        libc::sigaction(libc::SIGCHLD, std::ptr::null(), action.as_mut_ptr());
        if action.assume_init().sa_sigaction == libc::SIG_IGN {
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        }
    }
}
