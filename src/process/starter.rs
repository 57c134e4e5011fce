//! [`Starter`]: how processes are started on this machine; [`Trial`]: a start that finds it out.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::raw::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, WaitOptions, kill_process, waitpid};
use syscalls::{Sysno, syscall};

use super::open_files::OpenFiles;
use super::spawn::clone;
use super::stack::Stacks;

/// How a child comes to its program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// It shares this process's memory until it is the program, and comes with a pidfd.
    Sharing,
    /// It has a copy of the memory, as by `fork`. That takes longer, and works where a sandbox or an emulator refuses the rest.
    Copying,
}

impl Way {
    /// Open files of a running child: its stdin, stdout and stderr, and its pidfd; while it starts, also its ends; and by a copy,
    /// the pipe over which it tells of a start that failed.
    pub(super) fn descriptors(self) -> u64 {
        match self {
            Self::Sharing => 7,
            Self::Copying => 9,
        }
    }
}

/// Everything that the starts of all handlers share.
#[derive(Debug)]
pub(crate) struct Starter {
    pub(super) way: Way,
    pub(super) stacks: Stacks,
    pub(super) open_files: OpenFiles,
}

impl Starter {
    pub(crate) fn new(way: Way, open_files: OpenFiles) -> Self {
        Self { way, stacks: Stacks::default(), open_files }
    }
}

/// What came of a start of a process that ends at once.
#[derive(Debug)]
pub(crate) enum Trial {
    /// The usual way works.
    Usual,
    /// Only the slower one does, and why not the usual one.
    Slow(io::Error),
    /// Neither does, or the machine is short of something.
    Impossible(io::Error),
}

impl Trial {
    /// Starts a process in each way, until one works. It takes well under a millisecond.
    pub(crate) fn of_this_machine() -> Self {
        match try_start(Way::Sharing) {
            Ok(()) => Self::Usual,
            Err(error) if is_shortage(&error) => Self::Impossible(error),
            Err(refused) => match try_start(Way::Copying) {
                Ok(()) => Self::Slow(refused),
                Err(error) => Self::Impossible(error),
            },
        }
    }

    /// Returns the way to start processes from now on. A shortage may pass: until it does, each start says so itself.
    pub(crate) fn way(&self) -> Way {
        match self {
            Self::Usual | Self::Impossible(_) => Way::Sharing,
            Self::Slow(_) => Way::Copying,
        }
    }
}

/// Reports whether an error is for want of something, and not for the way of starting.
fn is_shortage(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::AGAIN | Errno::NOMEM | Errno::MFILE | Errno::NFILE))
}

/// What the child of a trial leaves in memory that it shares.
#[derive(Debug, Default)]
struct Trace {
    /// Not 0 until the child has left, as in `ChildSetup`.
    uses_our_memory: AtomicU32,
    was_shared: AtomicBool,
}

/// How long the exit of the trial's child may take to be told. Only a kernel that never tells takes longer than a moment.
const LONGEST_EXIT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// Starts a process that ends at once, and sees to it that all that a real start relies on works.
#[expect(unsafe_code, reason = "see `clone`")]
fn try_start(way: Way) -> io::Result<()> {
    let trace = Trace { uses_our_memory: AtomicU32::new(1), ..Trace::default() };
    let stack = Stacks::default().take()?;
    // SAFETY: `trace` and the stack live until the child has been waited for, below. `leave` is made for it.
    let (id, pidfd) = unsafe { clone(way, leave, ptr::from_ref(&trace).cast_mut().cast(), &stack) }?;
    let told = pidfd.is_some_and(|pidfd| tells_of_exit(&pidfd));
    if way == Way::Sharing && !told {
        let _ = kill_process(id, Signal::KILL);
    }
    while matches!(waitpid(Some(id), WaitOptions::empty()), Err(Errno::INTR)) {}
    let problem = match way {
        Way::Copying => None,
        Way::Sharing if !told => Some("the kernel does not tell when a child exits"),
        Way::Sharing if !trace.was_shared.load(Ordering::Acquire) => Some("a child does not share memory"),
        Way::Sharing if trace.uses_our_memory.load(Ordering::Acquire) != 0 => {
            Some("the kernel does not tell when a child has left the memory that it shares")
        }
        Way::Sharing => None,
    };
    problem.map_or(Ok(()), |problem| Err(io::Error::other(problem)))
}

fn tells_of_exit(pidfd: &OwnedFd) -> bool {
    loop {
        let mut exit = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        match poll(&mut exit, Some(&LONGEST_EXIT)) {
            Err(Errno::INTR) => {}
            told => return told == Ok(1),
        }
    }
}

/// Returns the whole life of the trial's child.
#[expect(unsafe_code, reason = "it is called by the C library, and ends without going through it")]
extern "C" fn leave(trace: *mut c_void) -> c_int {
    // SAFETY: `trace` is what `clone` was given: it lives until this process has ended. The kernel writes to `uses_our_memory` once, when
    // this process leaves the memory. `_exit` runs nothing of the process that the memory belongs to.
    unsafe {
        let trace = &*trace.cast::<Trace>();
        let _ = syscall!(Sysno::set_tid_address, trace.uses_our_memory.as_ptr());
        trace.was_shared.store(true, Ordering::Release);
        libc::_exit(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_work_here() {
        assert!(matches!(Trial::of_this_machine(), Trial::Usual));
        try_start(Way::Copying).unwrap();
    }
}
