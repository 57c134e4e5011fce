//! [`ChildSetup`]: the code that a child runs between `clone` and `execve`, and the state that shows this process whether the
//! child has executed its program or failed.

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

use super::command::Command;
use super::cstrings::CStrings;
use super::open_files::OpenFiles;
use super::poll_until;
use super::signals::action_of;
use super::stack::Stack;
use super::starter::{StartMethod, Starter};

/// The longest pause between two checks of whether the child has executed its program.
const LONGEST_PAUSE: Duration = Duration::from_millis(32);

/// The first descriptor after the standard ones.
const FIRST_OTHER: RawFd = 3;

/// The data that a child uses until `execve`. A child may share this process's memory, so its `ChildSetup` is kept until the
/// child has ended.
#[derive(Debug)]
pub(super) struct ChildSetup {
    command: Arc<Command>,
    environment: CStrings,
    stdio: [Option<RawFd>; 3],
    handled_signals: &'static [c_int],
    open_files: OpenFiles,
    pub(super) stack: Stack,
    pub(super) way: StartMethod,
    /// The pipe on which a child that has a copy of this process's memory reports an error.
    error_pipe: Option<ErrorPipe>,
    /// A flag that is 1 until the child's `execve` or exit, and 0 afterwards. The kernel clears the flag if the child shares this
    /// process's memory. If the child has a copy of the memory, `is_before_exec` clears the flag.
    uses_our_memory: AtomicU32,
    /// The errno of a failed setup, or 0.
    failure: AtomicI32,
}

/// A pipe to which the child writes the errno of a failed setup. `execve` closes the child's end.
#[derive(Debug)]
struct ErrorPipe {
    ours: OwnedFd,
    theirs: RawFd,
}

impl ChildSetup {
    /// Prepares a child. `variables` are added to the command's environment. `stdio` contains the child's stdin, stdout and
    /// stderr. Where an entry is `None`, the child inherits this process's own file.
    ///
    /// # Errors
    /// When a variable contains a zero byte, or the system is out of memory.
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
            error_pipe: None,
            uses_our_memory: AtomicU32::new(1),
            failure: AtomicI32::new(0),
        })
    }

    /// Opens the error pipe of a child that needs one, and returns the child's end.
    pub(super) fn open_error_pipe(&mut self) -> io::Result<Option<OwnedFd>> {
        if self.way == StartMethod::Sharing {
            return Ok(None);
        }
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        ioctl_fionbio(&ours, true)?;
        self.error_pipe = Some(ErrorPipe { ours, theirs: theirs.as_raw_fd() });
        Ok(Some(theirs))
    }

    /// Waits until the child has executed its program, or the setup has failed. Polls, because only a dedicated thread could wait
    /// for this event. The caller must watch for the child's exit as well, because the kernel does not clear `uses_our_memory`
    /// for a child that dumps core.
    pub(super) async fn exec_done(&self) {
        poll_until(LONGEST_PAUSE, || (!self.is_before_exec()).then_some(())).await;
    }

    /// Returns the error that kept the child from executing its program, if one is known.
    pub(super) fn failure(&self) -> Option<io::Error> {
        self.is_before_exec();
        match self.failure.load(Ordering::Acquire) {
            0 => None,
            errno => Some(io::Error::from_raw_os_error(errno)),
        }
    }

    fn is_before_exec(&self) -> bool {
        if self.uses_our_memory.load(Ordering::Acquire) == 0 {
            return false;
        }
        let Some(pipe) = &self.error_pipe else { return true };
        let mut errno = [0; size_of::<c_int>()];
        match rustix::io::read(&pipe.ours, &mut errno) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return true,
            // A pipe never splits a write of so few bytes.
            Ok(count) if count == errno.len() => self.failure.store(c_int::from_ne_bytes(errno), Ordering::Release),
            Ok(_) | Err(_) => {}
        }
        self.uses_our_memory.store(0, Ordering::Release);
        false
    }

    /// Sets up the child and executes its program. The child runs concurrently with this process's threads, so the child must take
    /// no lock, allocate nothing, and not write to the `errno` of the thread that created the child. Calls that can fail bypass the
    /// C library, which would set `errno`. Inherited files are closed before any call that may hang, because an inherited file may
    /// be another job's pipe. While a hanging child held that pipe open, the other job would wait for end of file.
    ///
    /// # Safety
    /// Must run only in a child that `clone` has created for this `ChildSetup`.
    #[expect(unsafe_code, reason = "there is no safe way to be a process like that")]
    unsafe fn become_program(&self) -> Result<Infallible, Errno> {
        let command = &self.command;
        // SAFETY: every pointer points to valid memory of the right type, which ends with a zero byte or a null pointer where one
        // is needed. The files are open. The kernel has given the child its own table of descriptors, working directory, limits
        // and signal actions, so nothing here changes those of the parent. The C library's calls do not fail for these arguments.
        unsafe {
            // Ask the kernel to clear `uses_our_memory` when the child stops using this process's memory. Not every C library's
            // `clone` can request this.
            let _ = syscall!(Sysno::set_tid_address, self.uses_our_memory.as_ptr());
            let _ = syscall!(Sysno::setpgid, 0, 0);
            set_signals_back(self.handled_signals);
            for (number, file) in (0..).zip(self.stdio) {
                if let Some(file) = file {
                    // `dup3` fails for equal descriptors. `file` never equals `number`, because std makes sure that 0, 1 and 2
                    // are open from the start.
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

    /// Closes every descriptor but the standard ones and the error pipe, which is moved to `FIRST_OTHER`.
    ///
    /// # Safety
    /// As for `become_program`.
    #[expect(unsafe_code, reason = "see `become_program`")]
    unsafe fn close_others(&self) -> Result<(), Errno> {
        let mut first = FIRST_OTHER;
        // SAFETY: the kernel has given the child its own table of descriptors, so nothing else uses these descriptors.
        unsafe {
            if let Some(pipe) = &self.error_pipe {
                if pipe.theirs != FIRST_OTHER {
                    syscall!(Sysno::dup3, pipe.theirs, FIRST_OTHER, libc::O_CLOEXEC)?;
                }
                first += 1;
            }
            if syscall!(Sysno::close_range, first, c_int::MAX, 0).is_err() {
                // The call fails on Linux before 5.9 and in some sandboxes. Close the files below `bound` one by one. `execve`
                // closes the others, because this process opens its files with O_CLOEXEC.
                for file in first.cast_unsigned()..self.open_files.bound {
                    let _ = syscall!(Sysno::close, file);
                }
            }
        }
        Ok(())
    }

    /// Records the error of a child that cannot execute its program. Runs in the child.
    #[expect(unsafe_code, reason = "see `become_program`")]
    fn record_failure(&self, error: Errno) {
        let errno = error.into_raw();
        self.failure.store(errno, Ordering::Release);
        if self.error_pipe.is_some() {
            // SAFETY: the kernel reads `size_of::<c_int>()` bytes, which is the size of `errno`.
            let _ = unsafe { syscall!(Sysno::write, FIRST_OTHER, &raw const errno, size_of::<c_int>()) };
        }
    }
}

/// Runs in the child: executes its program, or exits.
#[expect(unsafe_code, reason = "it is called by the C library, and ends without going through it")]
pub(super) extern "C" fn child_main(setup: *mut c_void) -> c_int {
    // SAFETY: `setup` is the argument of `clone`, and lives until the child has ended. The kernel runs the child on a stack and
    // with registers of its own.
    let (setup, Err(error)) = unsafe {
        let setup = &*setup.cast::<ChildSetup>();
        (setup, setup.become_program())
    };
    setup.record_failure(error);
    // SAFETY: `_exit` runs none of the parent's code. The kernel ends only the child, because the child is a process of its own,
    // not a thread of the parent.
    unsafe { libc::_exit(127) }
}

/// The signals that a terminal sends to a whole group. A child can receive them, because it is in this process's group until its
/// `setpgid`.
const SIGNALS_OF_TERMINALS: [c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP];

/// Resets the signals that this process handles to their default actions in the child. All signals are blocked during the reset,
/// so no handler of this process runs in the child. A pending terminal signal is discarded, because the terminal sent it to this
/// process's group and not to the job.
#[expect(unsafe_code, reason = "no safe wrapper sets a signal back to its default")]
fn set_signals_back(handled: &[c_int]) {
    let set = |signal, action| {
        // SAFETY: `action` is `SIG_IGN` or `SIG_DFL`, so no handler is installed. The child has its own table of signal actions,
        // so the parent's do not change.
        unsafe { libc::signal(signal, action) }
    };
    for signal in SIGNALS_OF_TERMINALS {
        // `SIG_IGN` discards a pending signal. A signal that was ignored before stays ignored.
        if set(signal, libc::SIG_IGN) != libc::SIG_IGN {
            set(signal, libc::SIG_DFL);
        }
    }
    handled.iter().for_each(|signal| {
        set(*signal, libc::SIG_DFL);
    });
}

/// The result of [`handled_signals`] at the first start of a child. By then, all signal handlers are registered.
static HANDLED_SIGNALS: OnceLock<Vec<c_int>> = OnceLock::new();

/// Returns the signals that this process handles, and SIGPIPE, which std ignores. Any other ignored signal was already ignored
/// when this process started, and stays ignored in its children.
fn handled_signals() -> Vec<c_int> {
    let is_handled =
        |signal: &c_int| *signal == libc::SIGPIPE || !matches!(action_of(*signal), libc::SIG_DFL | libc::SIG_IGN);
    (1..=libc::SIGRTMAX()).filter(is_handled).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_handled_signals_are_set_back() {
        let handled = handled_signals();
        assert!(handled.contains(&libc::SIGPIPE) && handled.contains(&libc::SIGSEGV), "{handled:?}");
        assert!(!handled.contains(&libc::SIGKILL) && !handled.contains(&libc::SIGURG), "{handled:?}");
    }
}
