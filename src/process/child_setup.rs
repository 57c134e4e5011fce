//! [`ChildSetup`]: a child's life until it is its program, as the child lives it and as this process sees it.

use std::borrow::Cow;
use std::convert::Infallible;
use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::raw::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::io::ioctl_fionbio;
use rustix::pipe::{PipeFlags, pipe_with};
use syscalls::{Errno, Sysno, syscall};
use tokio::time::sleep;

use super::command::Command;
use super::cstrings::CStrings;
use super::open_files::OpenFiles;
use super::stack::Stack;
use super::starter::{Starter, Way};

/// The pause between two looks at a child that becomes its program grows from this …
const FIRST_PAUSE: Duration = Duration::from_millis(1);

/// … up to this.
const LONGEST_PAUSE: Duration = Duration::from_millis(32);

/// The first descriptor that is not one of the standard ones.
const FIRST_OTHER: RawFd = 3;

/// What a child is made of until it has become its program. A child that shares our memory reads it there: it is to be kept until
/// the child has ended.
#[derive(Debug)]
pub(super) struct ChildSetup {
    command: Arc<Command>,
    environment: CStrings,
    stdio: [Option<RawFd>; 3],
    handled_signals: &'static [c_int],
    open_files: OpenFiles,
    stack: Stack,
    way: Way,
    /// The pipe by which a child tells that has a copy of the memory.
    report: Option<ErrorPipe>,
    /// Not 0 while the child uses our memory: the kernel sets it to 0 when the child has become its program.
    uses_our_memory: AtomicU32,
    /// The errno for which it has not become its program, or 0.
    failure: AtomicI32,
}

/// A pipe that brings an errno, or its end when the child has become its program.
#[derive(Debug)]
struct ErrorPipe {
    ours: OwnedFd,
    theirs: RawFd,
}

impl ChildSetup {
    /// `variables` are added to the command's. `stdio` is its stdin, stdout and stderr, where they are not those of this process.
    ///
    /// # Errors
    /// When there is a zero byte in a variable, or the system has no memory.
    pub(super) fn of(
        starter: &Starter,
        command: Arc<Command>,
        variables: &[(&str, Cow<'_, OsStr>)],
        stdio: [Option<BorrowedFd<'_>>; 3],
    ) -> io::Result<Self> {
        Ok(Self {
            environment: command.environment_and(variables)?,
            command,
            stdio: stdio.map(|file| file.map(|file| file.as_raw_fd())),
            handled_signals: HANDLED_SIGNALS.get_or_init(handled_signals),
            open_files: starter.open_files,
            stack: starter.stacks.take()?,
            way: starter.way,
            report: None,
            uses_our_memory: AtomicU32::new(1),
            failure: AtomicI32::new(0),
        })
    }

    pub(super) fn way(&self) -> Way {
        self.way
    }

    pub(super) fn stack(&self) -> &Stack {
        &self.stack
    }

    /// Makes the pipe of a child that needs one, and returns the child's end. The kernel closes it by `execve`.
    ///
    /// # Errors
    /// When the system has no descriptors left.
    pub(super) fn open_error_pipe(&mut self) -> io::Result<Option<OwnedFd>> {
        if self.way == Way::Sharing {
            return Ok(None);
        }
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        ioctl_fionbio(&ours, true)?;
        self.report = Some(ErrorPipe { ours, theirs: theirs.as_raw_fd() });
        Ok(Some(theirs))
    }

    /// Waits until the child has become its program, or cannot. No event tells of it that could be waited for without a thread. The
    /// caller watches for the child's exit as well: the kernel leaves `uses_our_memory` alone for a child that dumps core.
    pub(super) async fn exec_done(&self) {
        let mut pause = FIRST_PAUSE;
        while self.is_under_way() {
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Why the child has not become its program, if that is known.
    pub(super) fn failure(&self) -> Option<io::Error> {
        self.is_under_way();
        match self.failure.load(Ordering::Acquire) {
            0 => None,
            errno => Some(io::Error::from_raw_os_error(errno)),
        }
    }

    fn is_under_way(&self) -> bool {
        if self.uses_our_memory.load(Ordering::Acquire) == 0 {
            return false;
        }
        let Some(report) = &self.report else { return true };
        let mut errno = [0; size_of::<c_int>()];
        match rustix::io::read(&report.ours, &mut errno) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return true,
            // A pipe takes so few bytes whole.
            Ok(count) if count == errno.len() => self.failure.store(c_int::from_ne_bytes(errno), Ordering::Release),
            Ok(_) | Err(_) => {}
        }
        self.uses_our_memory.store(0, Ordering::Release);
        false
    }

    /// Runs in the child, beside all that runs here: it may take no lock, allocate nothing, and not touch the `errno` of the
    /// thread that it comes from. So what can fail is called without the C library. Files of this process are closed before
    /// anything that may hang: another job waits for the end of a pipe.
    ///
    /// # Safety
    /// This process must be a child that `clone` has made for this.
    #[expect(unsafe_code, reason = "there is no safe way to be a process like that")]
    unsafe fn become_program(&self) -> Result<Infallible, Errno> {
        let command = &self.command;
        // SAFETY: every pointer is to live memory of the right type, with a zero byte or a null pointer at the end where there has
        // to be one, and the files are open. The kernel has given this process its own table of descriptors, its own working
        // directory, its own limits and its own actions of signals, so that nothing here changes those of the other. These calls
        // of the C library do not fail for what they are given.
        unsafe {
            // The kernel writes to `uses_our_memory` once, when this process leaves the memory. The C library's `clone` could ask for the
            // same, but not everyone's does.
            let _ = syscall!(Sysno::set_tid_address, self.uses_our_memory.as_ptr());
            let _ = syscall!(Sysno::setpgid, 0, 0);
            set_signals_back(self.handled_signals);
            for (number, file) in (0..).zip(self.stdio) {
                if let Some(file) = file {
                    // It is not that number itself: std sees to it that 0, 1 and 2 are taken.
                    syscall!(Sysno::dup3, file, number, 0)?;
                }
            }
            self.close_others()?;
            if let Some(cwd) = &command.cwd {
                syscall!(Sysno::chdir, cwd.as_ptr())?;
            }
            if let Some(limit) = &self.open_files.limit {
                let _ = syscall!(Sysno::prlimit64, 0, libc::RLIMIT_NOFILE, limit.as_ptr(), 0);
            }
            let mut none = MaybeUninit::uninit();
            libc::sigemptyset(none.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
            let error =
                syscall!(Sysno::execve, command.path.as_ptr(), command.arguments.as_ptr(), self.environment.as_ptr());
            Err(error.err().unwrap_or(Errno::ENOEXEC))
        }
    }

    /// Closes every file but the standard ones, and the pipe of the report, which becomes the first of the others.
    ///
    /// # Safety
    /// As for `become_program`.
    #[expect(unsafe_code, reason = "see `become_program`")]
    unsafe fn close_others(&self) -> Result<(), Errno> {
        let mut first = FIRST_OTHER;
        // SAFETY: the kernel has given this process its own table of descriptors: nothing else uses a file of it.
        unsafe {
            if let Some(report) = &self.report {
                if report.theirs != FIRST_OTHER {
                    syscall!(Sysno::dup3, report.theirs, FIRST_OTHER, libc::O_CLOEXEC)?;
                }
                first += 1;
            }
            if syscall!(Sysno::close_range, first, c_int::MAX, 0).is_err() {
                // Linux before 5.9, or a sandbox that does not know the call. `execve` closes those beyond that this process
                // has opened itself.
                for file in first.cast_unsigned()..self.open_files.bound {
                    let _ = syscall!(Sysno::close, file);
                }
            }
        }
        Ok(())
    }

    /// Runs in a child that cannot become its program.
    #[expect(unsafe_code, reason = "see `become_program`")]
    fn tell(&self, error: Errno) {
        let errno = error.into_raw();
        self.failure.store(errno, Ordering::Release);
        if self.report.is_some() {
            // SAFETY: the kernel reads as many bytes as the number has.
            let _ = unsafe { syscall!(Sysno::write, FIRST_OTHER, &raw const errno, size_of::<c_int>()) };
        }
    }
}

/// Returns the child's life until it is its program, or cannot be.
#[expect(unsafe_code, reason = "it is called by the C library, and ends without going through it")]
pub(super) extern "C" fn child_main(setup: *mut c_void) -> c_int {
    // SAFETY: `setup` is the argument of `clone`, and is kept until this process has ended. The kernel runs this process on a stack
    // and with registers of its own.
    let (setup, Err(error)) = unsafe {
        let setup = &*setup.cast::<ChildSetup>();
        (setup, setup.become_program())
    };
    setup.tell(error);
    // SAFETY: `_exit` runs nothing of the process that the memory belongs to, and the kernel ends this process alone: a process
    // that shares memory is no thread.
    unsafe { libc::_exit(127) }
}

/// What a terminal sends to all of a group. Until it leads its own, a child is in ours.
const SIGNALS_OF_TERMINALS: [c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP];

/// Runs in the child, while it holds all signals back. What this process handles gets its default action, before a handler of
/// ours could run there; and what a terminal has sent to us meanwhile is forgotten: the job is not meant.
#[expect(unsafe_code, reason = "no safe wrapper sets a signal back to its default")]
fn set_signals_back(handled: &[c_int]) {
    let set = |signal, action| {
        // SAFETY: neither of both actions runs any code, and the kernel has given this process actions of its own.
        unsafe { libc::signal(signal, action) }
    };
    for signal in SIGNALS_OF_TERMINALS {
        // One that is pending is dropped by that.
        if set(signal, libc::SIG_IGN) != libc::SIG_IGN {
            set(signal, libc::SIG_DFL);
        }
    }
    handled.iter().for_each(|signal| {
        set(*signal, libc::SIG_DFL);
    });
}

/// Asked once, when the first child is started: by then all handlers are there.
static HANDLED_SIGNALS: OnceLock<Vec<c_int>> = OnceLock::new();

/// Which signals are handled by this process, or ignored by it alone: std does that with SIGPIPE. What else is ignored it was
/// handed down so, and hands down.
#[expect(unsafe_code, reason = "no safe wrapper tells what becomes of a signal")]
fn handled_signals() -> Vec<c_int> {
    let action_of = |signal: c_int| {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: the kernel writes one `sigaction` to the pointer, of which all zeroes is a valid value, and reads none.
        unsafe {
            libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
            action.assume_init().sa_sigaction
        }
    };
    let is_handled =
        |signal: &c_int| *signal == libc::SIGPIPE || !matches!(action_of(*signal), libc::SIG_DFL | libc::SIG_IGN);
    (1..=libc::SIGRTMAX()).filter(is_handled).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_handled_here_is_set_back_and_what_is_not_is_left_alone() {
        let handled = handled_signals();
        assert!(handled.contains(&libc::SIGPIPE) && handled.contains(&libc::SIGSEGV), "{handled:?}");
        assert!(!handled.contains(&libc::SIGKILL) && !handled.contains(&libc::SIGURG), "{handled:?}");
    }
}
