//! A lease on a file: the kernel holds back whoever opens the file, as a network file system that hangs does.

#![expect(unsafe_code, reason = "no safe wrapper takes a lease")]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use super::eventually;

/// Not in the libc crate.
const F_SETSIG: libc::c_int = 10;

/// A write lease of this process. Every other open of the file, `execve` included, waits until the lease is dropped, for
/// [`Lease::longest`] at most.
pub struct Lease(File);

impl Lease {
    pub fn on(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        // A process that is told of an open by SIGIO dies of it. SIGURG is ignored.
        assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) }, 0);
        let taken = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
        assert_eq!(taken, 0, "{}", std::io::Error::last_os_error());
        Self(file)
    }

    /// Waits until an open waits for the lease.
    pub fn wait_until_awaited(&self) {
        eventually("an open that waits for the lease", || {
            let lease = unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_GETLEASE) };
            (lease != libc::F_WRLCK).then_some(())
        });
    }

    /// How long the kernel lets a lease hold back an open.
    pub fn longest() -> Duration {
        let seconds = fs::read_to_string("/proc/sys/fs/lease-break-time").unwrap();
        Duration::from_secs(seconds.trim().parse().unwrap())
    }
}
