//! [`Starter`]: the state shared by all starts of processes. [`Trial`]: a test that finds the [`StartMethod`] that works on this
//! machine.

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

/// A method of starting a process. The methods differ in the memory that a child uses until `execve`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StartMethod {
    /// The child shares this process's memory, and the kernel returns a pidfd for the child.
    Sharing,
    /// The child has a copy of this process's memory, as after `fork`. This method is slower than `Sharing`, but works where a
    /// sandbox or an emulator refuses `Sharing`.
    Copying,
}

impl StartMethod {
    /// Returns the number of descriptors that this process needs for one child: this process's ends of stdin, stdout and stderr,
    /// the pidfd, the child's three ends during the start, and with `Copying` the error pipe.
    pub(super) fn descriptors(self) -> u64 {
        match self {
            Self::Sharing => 7,
            Self::Copying => 9,
        }
    }
}

/// The state that all starts of processes share.
#[derive(Debug)]
pub(crate) struct Starter {
    pub(super) way: StartMethod,
    pub(super) stacks: Stacks,
    pub(super) open_files: OpenFiles,
}

impl Starter {
    pub(crate) fn new(way: StartMethod, open_files: OpenFiles) -> Self {
        Self { way, stacks: Stacks::default(), open_files }
    }
}

/// The result of a trial start of a process that exits at once.
#[derive(Debug)]
pub(crate) enum Trial {
    /// [`StartMethod::Sharing`] works.
    Usual,
    /// Only [`StartMethod::Copying`] works. Contains the error of [`StartMethod::Sharing`].
    Slow(io::Error),
    /// Neither method works, or the machine lacks a resource.
    Impossible(io::Error),
}

impl Trial {
    /// Starts a process with each method until one works, or until the machine lacks a resource. Takes well under a millisecond.
    pub(crate) fn of_this_machine() -> Self {
        match try_start(StartMethod::Sharing) {
            Ok(()) => Self::Usual,
            Err(error) if is_shortage(&error) => Self::Impossible(error),
            Err(refused) => match try_start(StartMethod::Copying) {
                Ok(()) => Self::Slow(refused),
                Err(error) => Self::Impossible(error),
            },
        }
    }

    /// Returns the method with which to start processes from now on. After `Impossible`, the method is [`StartMethod::Sharing`],
    /// because a shortage of resources may be temporary. If the shortage lasts, each start fails with its own error.
    pub(crate) fn way(&self) -> StartMethod {
        match self {
            Self::Usual | Self::Impossible(_) => StartMethod::Sharing,
            Self::Slow(_) => StartMethod::Copying,
        }
    }
}

/// Reports whether an error is a shortage of resources. Such an error does not mean that the system refuses this method of
/// starting a process.
fn is_shortage(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::AGAIN | Errno::NOMEM | Errno::MFILE | Errno::NFILE))
}

/// The memory that a trial's child writes to.
#[derive(Debug, Default)]
struct Trace {
    /// A flag that the kernel sets to 0 when the child stops using the shared memory, as in `ChildSetup`.
    uses_our_memory: AtomicU32,
    was_shared: AtomicBool,
}

/// The time limit for the pidfd to report the child's exit. Reached only if the kernel does not report exits on a pidfd.
const LONGEST_EXIT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// Starts a process that ends at once, and checks everything that a real start relies on.
#[expect(unsafe_code, reason = "see `clone`")]
fn try_start(way: StartMethod) -> io::Result<()> {
    let trace = Trace { uses_our_memory: AtomicU32::new(1), ..Trace::default() };
    let stack = Stacks::default().take()?;
    // SAFETY: `trace` and the stack live until the child is reaped, below. `leave` meets the requirements of `clone`.
    let (id, pidfd) = unsafe { clone(way, leave, ptr::from_ref(&trace).cast_mut().cast(), &stack) }?;
    let told = pidfd.is_some_and(|pidfd| tells_of_exit(&pidfd));
    if way == StartMethod::Sharing && !told {
        let _ = kill_process(id, Signal::KILL);
    }
    while matches!(waitpid(Some(id), WaitOptions::empty()), Err(Errno::INTR)) {}
    let problem = match way {
        StartMethod::Copying => None,
        StartMethod::Sharing if !told => Some("the kernel does not tell when a child exits"),
        StartMethod::Sharing if !trace.was_shared.load(Ordering::Acquire) => Some("a child does not share memory"),
        StartMethod::Sharing if trace.uses_our_memory.load(Ordering::Acquire) != 0 => {
            Some("the kernel does not tell when a child has left the memory that it shares")
        }
        StartMethod::Sharing => None,
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

/// Runs in the child of a trial: records that the child shares this process's memory, and exits.
#[expect(unsafe_code, reason = "it is called by the C library, and ends without going through it")]
extern "C" fn leave(trace: *mut c_void) -> c_int {
    // SAFETY: `trace` is the argument of `clone`, and lives until the child has ended. The kernel writes to `uses_our_memory`
    // once, at the child's exit. `_exit` runs none of the parent's code.
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
        try_start(StartMethod::Copying).unwrap();
    }
}
