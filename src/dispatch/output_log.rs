//! [`OutputLog`]: the log of the handlers' output.

use tracing::{Level, enabled, info, warn};

use crate::config::OUTPUT_TARGET;
use crate::process::{Channel, Printer};

/// A printer that logs the output of spawned handlers.
pub(super) struct OutputLog;

impl Printer for OutputLog {
    fn wants(&self, channel: Channel) -> bool {
        match channel {
            Channel::Stdout => enabled!(target: OUTPUT_TARGET, Level::INFO),
            Channel::Stderr => enabled!(target: OUTPUT_TARGET, Level::WARN),
        }
    }

    fn print(&self, channel: Channel, line: &str) {
        log_line(channel, line);
    }
}

/// Logs a line of output in the current span. The line is a field, because every log format escapes control characters in fields.
pub(super) fn log_line(channel: Channel, line: &str) {
    match channel {
        Channel::Stdout => info!(target: OUTPUT_TARGET, line, "stdout"),
        Channel::Stderr => warn!(target: OUTPUT_TARGET, line, "stderr"),
    }
}
