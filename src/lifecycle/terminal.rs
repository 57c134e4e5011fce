//! [`Terminal`]: the terminal from which a worker was started, if any, and the meaning of a SIGHUP in that case.

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

/// The relation of this process to a terminal at its start.
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
    /// Determines the relation from the controlling terminal, and from whether SIGHUP is ignored, as nohup arranges. Call this
    /// before a handler for SIGHUP is registered, because SIGHUP is no longer ignored from then on.
    pub(super) fn of_this_process() -> Self {
        match open_terminal() {
            Ok(()) if is_ignored(SIGHUP) => Self::Outlived,
            Ok(()) => Self::Controlling,
            Err(_) => Self::None,
        }
    }

    /// Returns the meaning of a SIGHUP with the `si_code` `code`. The kernel sends SIGHUP when the terminal is closed. It
    /// also sends SIGHUP when the session leader ends, before it closes the terminal. A shell forwards the kernel's SIGHUP to its
    /// background jobs with the `si_code` of an ordinary process. By then the terminal is closed.
    pub(super) fn meaning_of(self, code: i32) -> HangUp {
        match self {
            Self::None => HangUp::Reload,
            Self::Outlived if code == libc::SI_KERNEL => HangUp::Outlived,
            Self::Outlived => HangUp::Reload,
            Self::Controlling if code == libc::SI_KERNEL || self.is_gone() => HangUp::Gone,
            Self::Controlling => HangUp::Reload,
        }
    }

    /// Reports whether this is a terminal whose end stops the process, and the terminal is closed.
    pub(super) fn is_gone(self) -> bool {
        self == Self::Controlling && matches!(open_terminal(), Err(Errno::NXIO | Errno::IO))
    }
}

/// Opens the controlling terminal, and closes the descriptor again.
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
