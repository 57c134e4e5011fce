//! [`is_ignored`]: the signals that the parent had this process ignore.

use std::mem::MaybeUninit;
use std::ptr;

/// Returns whether this process ignores that signal.
#[expect(unsafe_code, reason = "no safe wrapper tells the action of a signal")]
pub(crate) fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the pointer is to live memory of the right type, all zeroes is a valid `sigaction`, and a null pointer for the
    // new action changes nothing.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn std_ignores_sigpipe_and_nothing_ignores_sigurg() {
        assert!(is_ignored(libc::SIGPIPE) && !is_ignored(libc::SIGURG));
    }
}
