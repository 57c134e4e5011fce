//! [`spawn`]: starts a program as the leader of a process group, and does not wait until it runs.
//!
//! As with `posix_spawn`, the child uses this process's memory until it has become the program, on a stack of its own.
//! `posix_spawn` holds its caller until then: for 0.06 ms on an idle machine, for 0.5 ms and more where all processors are busy
//! with children. Here, this process goes on. So a start that goes wrong in the child is learned of when the child has ended, and
//! its [`Birth`] is kept until then.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::borrow::Cow;
use std::convert::Infallible;
use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::raw::{c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, kill_process, setpgid, waitpid};
use syscalls::{Errno, Sysno, syscall};
use tokio::time::sleep;

use super::command::Command;
use super::cstrings::CStrings;

/// How often a child is looked at that becomes the program.
const A_MOMENT: Duration = Duration::from_millis(1);

/// A child that leads a group of its own.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) id: Pid,
    pub(super) pidfd: OwnedFd,
    pub(super) birth: Arc<Birth>,
}

/// What a child is made of until it has become the program. It reads this from our memory: to be kept until it has ended.
#[derive(Debug)]
pub(super) struct Birth {
    command: Arc<Command>,
    environment: CStrings,
    stdio: [Option<RawFd>; 3],
    handled_signals: &'static [c_int],
    /// Not 0 while the child uses our memory: the kernel sets it to 0 when the child has become the program.
    is_here: AtomicU32,
    /// The errno for which it has not become the program, or 0.
    failure: AtomicI32,
    stack: Stack,
}

/// Starts it. An error is the system's word for why there is no process. Why it has not become the program is told by
/// [`Birth::failure`]: at once if `wait_for_exec` is set, and otherwise when it has ended.
pub(super) fn spawn(birth: Birth, wait_for_exec: bool) -> io::Result<Child> {
    let child = clone(Arc::new(birth), if wait_for_exec { libc::CLONE_VFORK } else { 0 })?;
    if !wait_for_exec {
        // The child does the same, but may be signalled before it has. When it was faster, this has nothing left to do.
        let _ = setpgid(Some(child.id), Some(child.id));
    }
    Ok(child)
}

/// Makes the process. Until it has left our memory, no signal's handler may run in it: it would be taken for one of ours.
#[expect(unsafe_code, reason = "no safe wrapper starts a process that shares memory")]
fn clone(birth: Arc<Birth>, flags: c_int) -> io::Result<Child> {
    let flags = flags | libc::CLONE_VM | libc::CLONE_PIDFD | libc::SIGCHLD;
    let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    let mut pidfd = -1;
    // SAFETY: the sets may be uninitialised, and are initialised before they are anything else. The stack is the child's own, and
    // `birth` lives until the child has ended: see `Child`. It calls nothing that would use what belongs to this thread.
    let id = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
        let argument = Arc::as_ptr(&birth).cast_mut().cast();
        let id = libc::clone(live, birth.stack.top(), flags, argument, &raw mut pidfd);
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut());
        id
    };
    // It is less than nothing when there is no child.
    let Some(id) = u32::try_from(id).ok().and_then(|_| Pid::from_raw(id)) else {
        return Err(io::Error::last_os_error());
    };
    if pidfd < 0 {
        // A kernel that does not know the flag ignores it. `birth` may be dropped only after the child.
        let _ = kill_process(id, Signal::KILL);
        while matches!(waitpid(Some(id), WaitOptions::empty()), Err(rustix::io::Errno::INTR)) {}
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel gives no pidfd"));
    }
    // SAFETY: the kernel has just opened it, for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child { id, pidfd, birth })
}

/// The child's life until it is the program, or cannot be.
#[expect(unsafe_code, reason = "it is called by the C library, and ends without going through it")]
extern "C" fn live(birth: *mut c_void) -> c_int {
    // SAFETY: it is what `clone` was given, and is kept until this process has ended.
    let birth = unsafe { &*birth.cast::<Birth>() };
    let Err(error) = birth.become_program();
    birth.failure.store(error.into_raw(), Ordering::Release);
    // SAFETY: nothing of the process that the memory belongs to is run by this.
    unsafe { libc::_exit(127) }
}

impl Birth {
    /// `variables` are added to the command's. `stdio` is its stdin, stdout and stderr, where they are not those of this process.
    ///
    /// # Errors
    /// When there is a zero byte in a variable.
    pub(super) fn of(
        command: Arc<Command>,
        variables: &[(&str, Cow<'_, OsStr>)],
        stdio: [Option<BorrowedFd<'_>>; 3],
    ) -> io::Result<Self> {
        Ok(Self {
            environment: command.environment_and(variables)?,
            command,
            stdio: stdio.map(|file| file.map(|file| file.as_raw_fd())),
            handled_signals: HANDLED_SIGNALS.get_or_init(handled_signals),
            is_here: AtomicU32::new(1),
            failure: AtomicI32::new(0),
            stack: Stack::new(),
        })
    }

    /// Waits until the child has become the program. That is a matter of milliseconds, and nothing tells of it that could be
    /// waited for without a thread. It may end before: whoever waits has to look for that too.
    pub(super) async fn over(&self) {
        while self.is_here.load(Ordering::Acquire) != 0 {
            sleep(A_MOMENT).await;
        }
    }

    /// Why the child has not become the program, if that is known.
    pub(super) fn failure(&self) -> Option<io::Error> {
        match self.failure.load(Ordering::Acquire) {
            0 => None,
            errno => Some(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Runs in the child, beside all that runs here: it may take no lock, allocate nothing, and not touch the `errno` of the
    /// thread that it comes from. So what can fail is called without the C library.
    #[expect(unsafe_code, reason = "there is no safe way to be a process like that")]
    fn become_program(&self) -> Result<Infallible, Errno> {
        let command = &self.command;
        // SAFETY: every pointer is to live memory of the right type, with a zero byte or a null pointer at the end where there has
        // to be one, and the files are open. These calls of the C library do not fail for what they are given.
        unsafe {
            // The C library's `clone` could ask for the same, but not everyone's does.
            let _ = syscall!(Sysno::set_tid_address, self.is_here.as_ptr());
            libc::setpgid(0, 0);
            set_signals_back(self.handled_signals);
            if let Some(cwd) = &command.cwd {
                syscall!(Sysno::chdir, cwd.as_ptr())?;
            }
            for (number, file) in (0..).zip(self.stdio) {
                if let Some(file) = file {
                    // It is not that number itself: std sees to it that 0, 1 and 2 are taken.
                    syscall!(Sysno::dup3, file, number, 0)?;
                }
            }
            let mut none = MaybeUninit::uninit();
            libc::sigemptyset(none.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
            let error =
                syscall!(Sysno::execve, command.path.as_ptr(), command.arguments.as_ptr(), self.environment.as_ptr());
            Err(error.err().unwrap_or(Errno::ENOEXEC))
        }
    }
}

/// What a terminal sends to all of a group. Until it leads its own, a child is in ours.
const SIGNALS_OF_TERMINALS: [c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP];

/// Runs in the child, while it holds all signals back. What this process handles gets its default action, before a handler of
/// ours could run there; and what a terminal has sent to us meanwhile is forgotten: the job is not meant.
#[expect(unsafe_code, reason = "no safe wrapper sets a signal back to its default")]
fn set_signals_back(handled: &[c_int]) {
    let set = |signal, action| {
        // SAFETY: neither of both actions runs any code.
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
        // SAFETY: the pointer is to live memory of the right type, and all zeroes is a valid `sigaction`.
        unsafe {
            libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
            action.assume_init().sa_sigaction
        }
    };
    let is_handled =
        |signal: &c_int| *signal == libc::SIGPIPE || !matches!(action_of(*signal), libc::SIG_DFL | libc::SIG_IGN);
    (1..=libc::SIGRTMAX()).filter(is_handled).collect()
}

/// What a child runs on until it has become the program. No handler runs on it, and nothing that calls deeply.
#[derive(Debug)]
struct Stack(NonNull<u8>);

// SAFETY: it is memory like any other, and this process does not touch it.
#[expect(unsafe_code, reason = "a pointer is not known to be that harmless")]
unsafe impl Send for Stack {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "a pointer is not known to be that harmless")]
unsafe impl Sync for Stack {}

#[expect(unsafe_code, reason = "memory that another process writes to is not for safe code")]
impl Stack {
    /// Many times what is used: see the test.
    const LAYOUT: Layout = match Layout::from_size_align(16 * 1024, 16) {
        Ok(layout) => layout,
        Err(_) => panic!("an alignment that is no power of two"),
    };

    fn new() -> Self {
        // SAFETY: the size is not zero.
        let start = unsafe { alloc(Self::LAYOUT) };
        Self(NonNull::new(start).unwrap_or_else(|| handle_alloc_error(Self::LAYOUT)))
    }

    /// It grows downwards from there.
    fn top(&self) -> *mut c_void {
        // SAFETY: that is its end.
        unsafe { self.0.add(Self::LAYOUT.size()) }.as_ptr().cast()
    }
}

#[expect(unsafe_code, reason = "see `new`")]
impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: it was allocated like that, and whoever ran on it has ended.
        unsafe { dealloc(self.0.as_ptr(), Self::LAYOUT) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::process::{kill_process_group, test_kill_process_group};

    use super::*;
    use crate::process::Program;

    fn birth_of(program: &str, cwd: Option<&str>) -> Birth {
        let program = Program::find(program.into(), vec!["600".into()], Some(&"/bin:/usr/bin".into())).unwrap();
        let command = Command::new(&program, [], cwd.map(std::path::Path::new)).unwrap();
        Birth::of(Arc::new(command), &[], [None; 3]).unwrap()
    }

    fn end_of(child: &Child) {
        let _ = kill_process_group(child.id, Signal::KILL);
        waitpid(Some(child.id), WaitOptions::empty()).unwrap();
    }

    #[test]
    fn a_child_leads_its_group_from_the_moment_it_is_known() {
        for _ in 0..100 {
            let child = spawn(birth_of("sleep", None), false).unwrap();
            let there = test_kill_process_group(child.id);
            end_of(&child);
            assert_eq!(there, Ok(()));
        }
    }

    #[test]
    fn why_a_child_has_not_become_the_program_is_known_at_once_if_that_is_waited_for() {
        let child = spawn(birth_of("sleep", Some("/no/such/directory")), true).unwrap();
        assert_eq!(child.birth.failure().unwrap().kind(), io::ErrorKind::NotFound);
        end_of(&child);
    }

    #[test]
    fn why_a_child_has_not_become_the_program_is_known_at_its_end() {
        let child = spawn(birth_of("sleep", Some("/no/such/directory")), false).unwrap();
        rustix::event::poll(
            &mut [rustix::event::PollFd::new(&child.pidfd.as_fd(), rustix::event::PollFlags::IN)],
            None,
        )
        .unwrap();
        assert_eq!(child.birth.failure().unwrap().kind(), io::ErrorKind::NotFound);
        end_of(&child);
    }

    #[tokio::test]
    async fn it_is_known_when_a_child_has_become_the_program() {
        for _ in 0..20 {
            let child = spawn(birth_of("sleep", None), false).unwrap();
            tokio::time::timeout(Duration::from_secs(60), child.birth.over()).await.unwrap();
            let program = std::fs::read_link(format!("/proc/{}/exe", child.id.as_raw_nonzero()));
            end_of(&child);
            assert_ne!(program.unwrap(), std::env::current_exe().unwrap());
        }
    }

    #[test]
    #[expect(unsafe_code, reason = "nothing else looks at that memory")]
    fn a_child_has_far_more_stack_than_it_uses() {
        for cwd in [None, Some("/no/such/directory")] {
            let birth = birth_of("sleep", cwd);
            let (bottom, size) = (birth.stack.0.as_ptr(), Stack::LAYOUT.size());
            // SAFETY: that is the memory, and nobody runs on it yet.
            unsafe { bottom.write_bytes(0xa5, size) };
            let child = spawn(birth, true).unwrap();
            // SAFETY: the same, and nobody runs on it any more.
            let stack = unsafe { std::slice::from_raw_parts(bottom, size) };
            let unused = stack.iter().take_while(|byte| **byte == 0xa5).count();
            end_of(&child);
            assert!((size / 2..size).contains(&unused), "{unused} of {size} bytes unused");
        }
    }

    #[test]
    fn what_is_handled_here_is_set_back_and_what_is_not_is_left_alone() {
        let handled = handled_signals();
        assert!(handled.contains(&libc::SIGPIPE) && handled.contains(&libc::SIGSEGV), "{handled:?}");
        assert!(!handled.contains(&libc::SIGKILL) && !handled.contains(&libc::SIGURG), "{handled:?}");
    }
}
