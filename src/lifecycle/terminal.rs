//! [`Terminal`]: the terminal from which a worker was started, and the meaning of a SIGHUP there.

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use signal_hook::consts::SIGHUP;

use crate::process::is_ignored;

/// The meaning of a SIGHUP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HangUp {
    /// A process sent the signal: reload the settings.
    Reload,
    /// The terminal is gone, or its shell is.
    Gone,
    /// The terminal is gone, and the worker outlives it.
    Outlived,
}

/// The relation of this process to a terminal at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Terminal {
    /// No terminal: a service manager, cron or setsid started this process.
    None,
    /// A terminal that the process outlives: nohup started it.
    Outlived,
    /// A terminal with which the process ends.
    Controlling,
}

impl Terminal {
    /// Looks for the controlling terminal, and for an ignored SIGHUP, which nohup leaves. Call this before a handler for SIGHUP
    /// is registered.
    pub(super) fn of_this_process() -> Self {
        match open_terminal() {
            Ok(()) if is_ignored(SIGHUP) => Self::Outlived,
            Ok(()) => Self::Controlling,
            Err(_) => Self::None,
        }
    }

    /// Decides by the `si_code` of a SIGHUP. The kernel sends SIGHUP when the terminal is closed, and when the session leader
    /// ends: in the second case, before the terminal is gone. A shell passes the kernel's SIGHUP on to its background jobs with
    /// the code of an ordinary process; by then the terminal is gone.
    pub(super) fn meaning_of(self, code: i32) -> HangUp {
        match self {
            Self::None => HangUp::Reload,
            Self::Outlived if code == libc::SI_KERNEL => HangUp::Outlived,
            Self::Outlived => HangUp::Reload,
            Self::Controlling if code == libc::SI_KERNEL || self.is_gone() => HangUp::Gone,
            Self::Controlling => HangUp::Reload,
        }
    }

    /// Reports whether the terminal is gone and the process is to end with it.
    pub(super) fn is_gone(self) -> bool {
        self == Self::Controlling && matches!(open_terminal(), Err(Errno::NXIO | Errno::IO))
    }
}

/// Opens the controlling terminal, and closes it again.
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
