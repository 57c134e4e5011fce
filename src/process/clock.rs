//! Reads the CPU clock of another process.

use std::mem::MaybeUninit;
use std::time::Duration;

use rustix::process::Pid;

/// Returns the id of a process's CPU clock. `clock_getcpuclockid` returns the same id, but needs an additional system call.
fn clock_of(process: Pid) -> libc::clockid_t {
    const SCHEDULER: libc::clockid_t = 2;
    (!process.as_raw_nonzero().get() << 3) | SCHEDULER
}

/// Returns the CPU time that all threads of a process have used. Returns `None` once the process is reaped.
#[expect(unsafe_code, reason = "no safe wrapper reads the clock of another process")]
pub(super) fn cpu_time_of(process: Pid) -> Option<Duration> {
    let mut time = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: `time` is valid memory of the right type, and a `timespec` of all zeroes is valid.
    let time = unsafe {
        if libc::clock_gettime(clock_of(process), time.as_mut_ptr()) != 0 {
            return None;
        }
        time.assume_init()
    };
    Some(Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(unsafe_code, reason = "the C library's word is compared")]
    fn the_clock_id_is_the_one_of_the_c_library() {
        let this = rustix::process::getpid();
        let mut clock = 0;
        // SAFETY: `clock` is valid memory of the right type.
        assert_eq!(unsafe { libc::clock_getcpuclockid(this.as_raw_nonzero().get(), &raw mut clock) }, 0);
        assert_eq!(clock_of(this), clock);
        assert!(cpu_time_of(this).is_some());
    }
}
