//! [`spawn`]: starts a program as the leader of a process group, and does not wait for `execve`.
//!
//! As with `posix_spawn`, the child uses this process's memory until `execve`, on a stack of its own. But `posix_spawn` blocks
//! its caller until `execve`: for 0.06 ms on an idle machine, for 0.5 ms and more if all processors are busy with children, and
//! forever if `execve` hangs. [`spawn`] returns before `execve`. So an error in the child becomes known later, and the child's
//! [`ChildSetup`] is kept until the child has ended.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::raw::{c_int, c_void};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, setpgid, waitpid};

use super::child_setup::{ChildSetup, child_main};
use super::signals::without_signals;
use super::stack::Stack;
use super::starter::StartMethod;

/// A child that leads its own process group.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) id: Pid,
    /// The child's pidfd, if the kernel could open one.
    pub(super) pidfd: Option<OwnedFd>,
    pub(super) setup: Arc<ChildSetup>,
}

/// Starts a child. Fails if the system cannot create the process. [`ChildSetup::failure`] returns an error that occurs later in
/// the child.
#[expect(unsafe_code, reason = "see `clone`")]
pub(super) fn spawn(mut setup: ChildSetup) -> io::Result<Child> {
    // This process's copy of the child's end of the error pipe is closed when this function returns. Then only the child has that
    // end open, so the pipe reaches end of file at the child's `execve`.
    let _their_end = setup.open_error_pipe()?;
    let setup = Arc::new(setup);
    // SAFETY: `Child` keeps `setup` and its stack until the child has ended. `child_main` meets the requirements of `clone`.
    let (id, pidfd) = unsafe { clone(setup.way, child_main, Arc::as_ptr(&setup).cast_mut().cast(), &setup.stack) }?;
    // The child calls `setpgid` too. Without the call here, this process could signal the new group before the child has created
    // it, and a signal to this process's own group could reach the child. The call fails if the child has already executed its
    // program, and the error does no harm.
    let _ = setpgid(Some(id), Some(id));
    Ok(Child { id, pidfd, setup })
}

/// Creates a process that runs `child_main` on `stack`.
///
/// # Safety
/// If the child shares this process's memory, `argument` and the stack must live until the child has ended. `child_main` runs
/// concurrently with all threads of this process, and uses the thread-local data of this thread. So `child_main` must take no
/// lock, allocate nothing, and not write to `errno`.
#[expect(unsafe_code, reason = "no safe wrapper starts a process that shares memory")]
pub(super) unsafe fn clone(
    way: StartMethod,
    child_main: extern "C" fn(*mut c_void) -> c_int,
    argument: *mut c_void,
    stack: &Stack,
) -> io::Result<(Pid, Option<OwnedFd>)> {
    let flags = libc::SIGCHLD | if way == StartMethod::Sharing { libc::CLONE_VM | libc::CLONE_PIDFD } else { 0 };
    let mut pidfd = -1;
    // SAFETY: the child inherits this thread's mask, which blocks all signals, so no signal handler of this process runs in the
    // child. The child has a stack of its own. The kernel copies the table of descriptors, the working directory and the signal
    // actions, so the child does not change those of this process.
    let id = without_signals(|| unsafe { libc::clone(child_main, stack.top(), flags, argument, &raw mut pidfd) });
    // `clone` returns -1 if it fails.
    let Some(id) = u32::try_from(id).ok().and_then(|_| Pid::from_raw(id)) else {
        return Err(io::Error::last_os_error());
    };
    match way {
        // SAFETY: the kernel has just opened the descriptor, and nothing else owns it.
        StartMethod::Sharing if pidfd >= 0 => Ok((id, Some(unsafe { OwnedFd::from_raw_fd(pidfd) }))),
        StartMethod::Sharing => {
            // An old kernel ignores CLONE_PIDFD. Kill the child and wait for its end, because the caller frees the shared memory
            // after the error.
            let _ = kill_process(id, Signal::KILL);
            while matches!(waitpid(Some(id), WaitOptions::empty()), Err(Errno::INTR)) {}
            Err(io::Error::other("the kernel gives no pidfd"))
        }
        // The process id cannot be reused until this process reaps the child, so the pidfd is the child's.
        StartMethod::Copying => Ok((id, pidfd_open(id, PidfdFlags::empty()).ok())),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::{Duration, Instant};

    use rustix::process::{kill_process_group, test_kill_process_group};

    use super::*;
    use crate::process::stack::SIZE;
    use crate::process::starter::Starter;
    use crate::process::{Command, OpenFiles, Program};

    pub(in crate::process) fn setup_of(way: StartMethod, program: &str, cwd: Option<&str>) -> ChildSetup {
        let program = Program::find(program.into(), vec!["600".into()], Some(&"/bin:/usr/bin".into())).unwrap();
        let command = Command::new(&program, [], cwd.map(std::path::Path::new)).unwrap();
        let starter = Starter::new(way, OpenFiles::ensure(1, way).0);
        ChildSetup::of(&starter, Arc::new(command), &[], [None; 3]).unwrap()
    }

    const WAYS: [StartMethod; 2] = [StartMethod::Sharing, StartMethod::Copying];

    fn end_of(child: &Child) {
        let _ = kill_process_group(child.id, Signal::KILL);
        waitpid(Some(child.id), WaitOptions::empty()).unwrap();
    }

    #[test]
    fn a_child_leads_its_group_as_soon_as_it_is_known() {
        for way in WAYS {
            for _ in 0..100 {
                let child = spawn(setup_of(way, "sleep", None)).unwrap();
                let found = test_kill_process_group(child.id);
                end_of(&child);
                assert_eq!(found, Ok(()));
            }
        }
    }

    #[test]
    fn the_error_of_a_failed_setup_is_known_at_the_childs_end() {
        for way in WAYS {
            let child = spawn(setup_of(way, "sleep", Some("/no/such/directory"))).unwrap();
            let pidfd = child.pidfd.as_ref().unwrap();
            let mut exit = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut exit, None).unwrap();
            assert_eq!(child.setup.failure().unwrap().kind(), io::ErrorKind::NotFound);
            end_of(&child);
        }
    }

    #[tokio::test]
    async fn the_exec_of_a_child_is_noticed() {
        for way in WAYS {
            for _ in 0..20 {
                let child = spawn(setup_of(way, "sleep", None)).unwrap();
                tokio::time::timeout(Duration::from_secs(60), child.setup.exec_done()).await.unwrap();
                let exe = format!("/proc/{}/exe", child.id.as_raw_nonzero());
                let begun = Instant::now();
                // The kernel clears `uses_our_memory` a moment before /proc shows the new program.
                while std::fs::read_link(&exe).unwrap() == std::env::current_exe().unwrap() {
                    assert!(begun.elapsed() < Duration::from_secs(60));
                }
                end_of(&child);
                assert!(child.setup.failure().is_none());
            }
        }
    }

    #[tokio::test]
    #[expect(unsafe_code, reason = "nothing else looks at that memory")]
    async fn a_child_has_far_more_stack_than_it_uses() {
        for cwd in [None, Some("/no/such/directory")] {
            let setup = setup_of(StartMethod::Sharing, "sleep", cwd);
            let bottom = setup.stack.bottom();
            // SAFETY: the range is the stack, and no child runs on it yet.
            unsafe { bottom.write_bytes(0xa5, SIZE) };
            let child = spawn(setup).unwrap();
            child.setup.exec_done().await;
            // SAFETY: the range is the stack, and no child runs on it any more.
            let stack = unsafe { std::slice::from_raw_parts(bottom, SIZE) };
            let unused = stack.iter().take_while(|byte| **byte == 0xa5).count();
            end_of(&child);
            assert!((SIZE * 7 / 8..SIZE).contains(&unused), "{unused} of {SIZE} bytes unused");
        }
    }
}
