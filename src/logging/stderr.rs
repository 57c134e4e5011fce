//! [`Stderr`]: writes that block even if the descriptor of stderr is non-blocking.

use std::io::{self, ErrorKind, Write, stderr};

use rustix::event::{PollFd, PollFlags, poll};

/// This process's stderr. A write blocks even if the descriptor is non-blocking. The descriptor can become non-blocking, because a
/// handler with `output = "inherit"` shares the open file description, and can set `O_NONBLOCK` on it.
#[derive(Debug, Clone, Copy)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        loop {
            match stderr().write(text) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => wait_for_room()?,
                ended => return ended,
            }
        }
    }

    fn write_all(&mut self, mut text: &[u8]) -> io::Result<()> {
        // Hold the lock until all parts are written, so that no line of another thread comes between the parts.
        let _whole = stderr().lock();
        while !text.is_empty() {
            match self.write(text) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => text = &text[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        stderr().flush()
    }
}

/// Waits until stderr accepts more bytes, or its reader has closed it.
fn wait_for_room() -> io::Result<()> {
    match poll(&mut [PollFd::new(&stderr(), PollFlags::OUT)], None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
