//! [`LiveLine`]: the status line below the log on a terminal.

use std::io::{self, Write, stderr};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::termios::tcgetwinsize;
use tracing_subscriber::fmt::MakeWriter;

use super::Stderr;
use crate::lock::lock;

/// A line that is rewritten in place below the log. Clones share the line.
#[derive(Debug, Clone, Default)]
pub struct LiveLine(Arc<Mutex<String>>);

/// Terminal sequence that moves the cursor to the start of the line and clears the line.
const CLEAR: &str = "\r\x1b[K";

impl LiveLine {
    /// Replaces the line's text. An empty text removes the line.
    pub fn show(&self, text: &str) {
        let mut shown = lock(&self.0);
        if !(shown.is_empty() && text.is_empty()) {
            // Cut the text to one row, because `CLEAR` clears only the last row of a wrapped line.
            *shown = text.chars().take(width().saturating_sub(1)).collect();
            // Ignore a failed write, which means that the terminal is closed.
            let _ = write!(Stderr, "{CLEAR}{shown}");
        }
    }
}

/// Returns the terminal's width in characters, or `usize::MAX` if the width is unknown.
fn width() -> usize {
    let columns = tcgetwinsize(stderr()).map_or(0, |size| usize::from(size.ws_col));
    if columns == 0 { usize::MAX } else { columns }
}

impl<'a> MakeWriter<'a> for LiveLine {
    type Writer = AboveLiveLine<'a>;

    fn make_writer(&'a self) -> AboveLiveLine<'a> {
        AboveLiveLine(lock(&self.0))
    }
}

/// A writer that overwrites the live line with an event, and shows the live line again below the event.
#[derive(Debug)]
pub struct AboveLiveLine<'a>(MutexGuard<'a, String>);

impl Write for AboveLiveLine<'_> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        if self.0.is_empty() {
            Stderr.write_all(event)?;
        } else {
            // Use one write, so that the terminal never shows the event without the live line.
            Stderr.write_all(&[CLEAR.as_bytes(), event, self.0.as_bytes()].concat())?;
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Stderr.flush()
    }
}
