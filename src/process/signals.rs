//! The signal settings of this process: ignored signals, blocked signals, and SIGCHLD.

use std::mem::MaybeUninit;
use std::ptr;

/// Reports whether this process ignores a signal.
pub(crate) fn is_ignored(signal: i32) -> bool {
    action_of(signal) == libc::SIG_IGN
}

/// Returns the action of a signal: its handler, `SIG_DFL` or `SIG_IGN`.
#[expect(unsafe_code, reason = "no safe wrapper tells the action of a signal")]
pub(super) fn action_of(signal: i32) -> libc::sighandler_t {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: `action` is valid memory of the right type, a `sigaction` of all zeroes is valid, and a null pointer in place of a
    // new action changes nothing.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction
    }
}

/// Calls `protected` with all signals blocked in this thread. A signal that arrives during the call is delivered afterwards.
#[expect(unsafe_code, reason = "no safe wrapper changes the signal mask of a thread")]
pub(crate) fn without_signals<T>(protected: impl FnOnce() -> T) -> T {
    let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: both sets are initialised before they are read (signal(7), sigsetops(3)).
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let result = protected();
    // SAFETY: the call above has initialised the set.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut());
    }
    result
}

/// Resets SIGCHLD to its default action if this process inherited it as ignored, because the kernel discards the exit statuses of
/// children while SIGCHLD is ignored.
#[expect(unsafe_code, reason = "no safe wrapper sets a signal back to its default")]
pub(crate) fn keep_exit_statuses() {
    if is_ignored(libc::SIGCHLD) {
        // SAFETY: `SIG_DFL` installs no handler, and replaces none, because the present action is `SIG_IGN`.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(unsafe_code, reason = "a signal is sent to this very thread")]
    fn a_signal_that_arrives_meanwhile_is_delivered_afterwards() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicBool, Ordering};
        let received = Arc::new(AtomicBool::new(false));
        without_signals(|| {
            // SAFETY: no action of SIGUSR1 runs while the signal is blocked.
            unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR1) };
            signal_hook::flag::register(libc::SIGUSR1, Arc::clone(&received)).unwrap();
            assert!(!received.load(Ordering::SeqCst));
        });
        assert!(received.load(Ordering::SeqCst));
    }

    #[test]
    fn std_ignores_sigpipe_and_nothing_ignores_sigurg() {
        assert!(is_ignored(libc::SIGPIPE) && !is_ignored(libc::SIGURG));
    }
}
