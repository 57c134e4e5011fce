//! The CPU clock of another process.

use std::mem::MaybeUninit;
use std::time::Duration;

use rustix::process::Pid;

/// The CPU time that a process has used, its threads included. None once it has been reaped, or where another user owns it.
#[expect(unsafe_code, reason = "no safe wrapper reads the clock of another process")]
pub(super) fn cpu_time_of(process: Pid) -> Option<Duration> {
    let (mut clock, mut time) = (0, MaybeUninit::<libc::timespec>::zeroed());
    // SAFETY: both pointers are to live memory of the right type, and all zeroes is a valid `timespec`.
    let time = unsafe {
        if libc::clock_getcpuclockid(process.as_raw_nonzero().get(), &raw mut clock) != 0
            || libc::clock_gettime(clock, time.as_mut_ptr()) != 0
        {
            return None;
        }
        time.assume_init()
    };
    Some(Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).ok()?))
}
