//! [`Terminal`]: whether a worker was started from a terminal, and the meaning of a SIGHUP that the worker receives.

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use signal_hook::consts::SIGHUP;

use crate::process::is_ignored;

/// The meaning of a SIGHUP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HangUp {
    /// A process sent the signal: reload the settings.
    Reload,
    /// The terminal is closed, or its shell has ended: drain.
    Gone,
    /// The terminal is closed, and the worker continues without it.
    Outlived,
}

/// Whether this process had a terminal when it started, and whether the end of the terminal stops the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Terminal {
    /// No terminal: a service manager, cron or setsid started this process.
    None,
    /// A terminal whose end does not stop the process, because nohup started the process.
    Outlived,
    /// A terminal whose end stops the process.
    Controlling,
}

impl Terminal {
    /// Checks whether this process has a controlling terminal, and whether SIGHUP is ignored, as it is under nohup. Call this
    /// before a handler for SIGHUP is registered, because SIGHUP is not ignored afterwards.
    pub(super) fn of_this_process() -> Self {
        match open_terminal() {
            Ok(()) if is_ignored(SIGHUP) => Self::Outlived,
            Ok(()) => Self::Controlling,
            Err(_) => Self::None,
        }
    }

    /// Returns the meaning of a SIGHUP whose `si_code` is `code`. The kernel sends SIGHUP when the terminal is closed, or when the
    /// session leader ends. In the second case, the signal comes before the terminal is closed. A SIGHUP that a shell forwards to
    /// its background jobs has the same `si_code` as a signal from any other process. So the terminal is checked as well: when the
    /// shell forwards the signal, the terminal is already closed.
    pub(super) fn meaning_of(self, code: i32) -> HangUp {
        match self {
            Self::Outlived if code == libc::SI_KERNEL => HangUp::Outlived,
            Self::Controlling if code == libc::SI_KERNEL || self.is_gone() => HangUp::Gone,
            Self::None | Self::Outlived | Self::Controlling => HangUp::Reload,
        }
    }

    /// Reports whether this process had a terminal whose end stops the process, and that terminal is now closed.
    pub(super) fn is_gone(self) -> bool {
        self == Self::Controlling && matches!(open_terminal(), Err(Errno::NXIO | Errno::IO))
    }
}

/// Checks that the controlling terminal can be opened, and closes the descriptor again.
fn open_terminal() -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    open("/dev/tty", flags, Mode::empty()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_worker_on_a_terminal_takes_sighup_for_its_end() {
        let kernel = libc::SI_KERNEL;
        assert_eq!(Terminal::None.meaning_of(kernel), HangUp::Reload);
        assert_eq!(Terminal::None.meaning_of(libc::SI_USER), HangUp::Reload);
        assert_eq!(Terminal::Outlived.meaning_of(kernel), HangUp::Outlived);
        assert_eq!(Terminal::Outlived.meaning_of(libc::SI_USER), HangUp::Reload);
        assert_eq!(Terminal::Controlling.meaning_of(kernel), HangUp::Gone);
    }
}
