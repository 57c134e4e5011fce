//! The CPU time, sleeps and memory of a process, as the kernel counts them.

use std::fs;
use std::mem::MaybeUninit;
use std::time::Duration;

use crate::Result;

/// A process, identified by its pid.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Process(pub(crate) u32);

impl Process {
    pub(crate) fn this() -> Self {
        Self(std::process::id())
    }

    /// Returns the CPU time of the live threads, with nanosecond resolution. Ended threads and children are not included.
    pub(crate) fn own_cpu(self) -> Result<Duration> {
        let times = self.of_threads("schedstat", |text| text.split(' ').next()?.parse().ok())?;
        Ok(Duration::from_nanos(times))
    }

    /// Returns the number of times that the live threads have gone to sleep.
    pub(crate) fn sleeps(self) -> Result<u64> {
        self.of_threads("status", |text| number_after(text, "voluntary_ctxt_switches:"))
    }

    /// Returns the peak resident memory in bytes.
    pub(crate) fn peak_memory(self) -> Result<u64> {
        self.memory("VmHWM:")
    }

    /// Returns the current resident memory in bytes.
    pub(crate) fn memory_now(self) -> Result<u64> {
        self.memory("VmRSS:")
    }

    fn memory(self, name: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0))?;
        Ok(number_after(&status, name).ok_or("no memory in the status of the process")? * 1024)
    }

    fn of_threads(self, file: &str, read: impl Fn(&str) -> Option<u64>) -> Result<u64> {
        let mut sum = 0;
        for thread in fs::read_dir(format!("/proc/{}/task", self.0))? {
            // A thread may have ended since the listing.
            let text = fs::read_to_string(thread?.path().join(file)).unwrap_or_default();
            sum += read(&text).unwrap_or_default();
        }
        Ok(sum)
    }
}

fn number_after(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// Returns the CPU time of this process so far, including threads that have ended.
#[expect(unsafe_code, reason = "no safe wrapper of getrusage is at hand")]
pub(crate) fn own_cpu_so_far() -> Duration {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is valid memory of the right type, and is initialised, because all zeroes is a valid `rusage`.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    cpu(&usage)
}

/// Waits for a child. Returns the wait status, and the CPU time of the child and of the descendants for which the child waited.
#[expect(unsafe_code, reason = "wait4 is the only wait that tells what the child has used")]
pub(crate) fn reap(child: Process) -> Result<(i32, Duration)> {
    let (mut status, mut usage) = (0, MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: `status` and `usage` are valid memory of the right types, and `usage` is initialised, because all zeroes is a valid
    // `rusage`.
    let (reaped, usage) = unsafe {
        let reaped = libc::wait4(child.0.cast_signed(), &raw mut status, 0, usage.as_mut_ptr());
        (reaped, usage.assume_init())
    };
    if reaped < 0 { Err(std::io::Error::last_os_error().into()) } else { Ok((status, cpu(&usage))) }
}

fn cpu(usage: &libc::rusage) -> Duration {
    let time = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec.unsigned_abs()) + Duration::from_micros(time.tv_usec.unsigned_abs())
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}
