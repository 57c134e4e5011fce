//! A lease on a file. While a process holds the lease, the kernel delays each open of the file, like a hanging network file
//! system.

#![expect(unsafe_code, reason = "no safe wrapper takes a lease")]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use super::eventually;

/// The value of F_SETSIG, which the libc crate lacks.
const F_SETSIG: libc::c_int = 10;

/// A write lease that this process holds. Every other open of the file, including by `execve`, blocks until the lease is dropped,
/// but at most for [`Lease::longest`].
pub struct Lease(File);

impl Lease {
    pub fn on(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        // The kernel announces a blocked open with a signal. SIGIO, the default, would kill this process. SIGURG is ignored by
        // default.
        assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) }, 0);
        let taken = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
        assert_eq!(taken, 0, "{}", std::io::Error::last_os_error());
        Self(file)
    }

    /// Waits until the lease blocks an open of the file.
    pub fn wait_until_awaited(&self) {
        eventually("an open that waits for the lease", || {
            let lease = unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_GETLEASE) };
            (lease != libc::F_WRLCK).then_some(())
        });
    }

    /// Returns the longest time for which the kernel lets a lease block an open.
    pub fn longest() -> Duration {
        let seconds = fs::read_to_string("/proc/sys/fs/lease-break-time").unwrap();
        Duration::from_secs(seconds.trim().parse().unwrap())
    }
}
