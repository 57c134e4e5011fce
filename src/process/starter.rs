//! [`Starter`]: the way to start processes on this machine. [`Trial`]: a start that finds the way.

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

/// The memory of a child until `execve`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// The child shares this process's memory, and comes with a pidfd.
    Sharing,
    /// The child has a copy of the memory, as by `fork`. This is slower, and works where a sandbox or an emulator refuses the
    /// other.
    Copying,
}

impl Way {
    /// Returns the number of open files of one child: its stdin, stdout, stderr and pidfd, the child's ends while it starts, and
    /// the error pipe of a copy.
    pub(super) fn descriptors(self) -> u64 {
        match self {
            Self::Sharing => 7,
            Self::Copying => 9,
        }
    }
}

/// The state that the starts of all handlers share.
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

/// The result of starting a process that ends at once.
#[derive(Debug)]
pub(crate) enum Trial {
    /// [`Way::Sharing`] works.
    Usual,
    /// Only [`Way::Copying`] works; the error of the other.
    Slow(io::Error),
    /// Neither works, or the machine lacks a resource.
    Impossible(io::Error),
}

impl Trial {
    /// Starts a process in each way until one works. Takes well under a millisecond.
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

    /// Returns the way to start processes from now on. A shortage may pass; until then each start fails with its own error.
    pub(crate) fn way(&self) -> Way {
        match self {
            Self::Usual | Self::Impossible(_) => Way::Sharing,
            Self::Slow(_) => Way::Copying,
        }
    }
}

/// Reports whether an error is a lack of resources, and not a refusal of the way.
fn is_shortage(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::AGAIN | Errno::NOMEM | Errno::MFILE | Errno::NFILE))
}

/// The memory that a trial's child writes to.
#[derive(Debug, Default)]
struct Trace {
    /// Not 0 until the child has left the memory, as in `ChildSetup`.
    uses_our_memory: AtomicU32,
    was_shared: AtomicBool,
}

/// The longest wait for the event of the child's exit. Only a kernel that never sends the event takes this long.
const LONGEST_EXIT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// Starts a process that ends at once, and checks everything that a real start relies on.
#[expect(unsafe_code, reason = "see `clone`")]
fn try_start(way: Way) -> io::Result<()> {
    let trace = Trace { uses_our_memory: AtomicU32::new(1), ..Trace::default() };
    let stack = Stacks::default().take()?;
    // SAFETY: `trace` and the stack live until the child is reaped, below. `leave` is made for `clone`.
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

/// Runs in the trial's child.
#[expect(unsafe_code, reason = "it is called by the C library, and ends without going through it")]
extern "C" fn leave(trace: *mut c_void) -> c_int {
    // SAFETY: `trace` is the argument of `clone`, and lives until the child has ended. The kernel writes to `uses_our_memory`
    // once, when the child leaves the memory. `_exit` runs none of the parent's code.
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
