//! The pipes of a child: its stdin, filled as far as possible before the start, and its outputs.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use bytes::{Buf, Bytes};
use rustix::fs::{Mode, OFlags};
use rustix::io::ioctl_fionbio;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe::Sender;

use super::{Input, Output};

/// The default capacity of a pipe (pipe(7)).
const USUAL_PIPE: usize = 64 * 1024;

/// The capacity of a pipe for large payloads and outputs. A larger one would be a risk: an unprivileged user whose pipes exceed
/// 64 MiB in total gets tiny pipes (`/proc/sys/fs/pipe-user-pages-soft`).
const LARGE_PIPE: usize = 256 * 1024;

/// The smallest capacity of a pipe. A user who has many pipes gets new pipes of this capacity.
const SMALLEST_PIPE: usize = 4096;

/// Opens a child's stdin. Returns the child's end, and also the worker's end with the rest of the input if the pipe cannot hold
/// all of the input. The first part is written before the child starts, without the reactor. For most jobs, the first part is the
/// whole input.
pub(super) fn open_stdin(input: Input) -> io::Result<(OwnedFd, Option<(Sender, Bytes)>)> {
    let Input::Bytes(mut input) = input else {
        return Ok((open_null(OFlags::RDONLY)?, None));
    };
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
    if input.len() > USUAL_PIPE {
        enlarge(&write_end);
    }
    if input.len() > SMALLEST_PIPE {
        ioctl_fionbio(&write_end, true)?;
    }
    fill(&write_end, &mut input)?;
    let unread = if input.is_empty() { None } else { Some((Sender::from_owned_fd_unchecked(write_end)?, input)) };
    Ok((read_end, unread))
}

/// Enlarges a pipe, so that the reader and the writer block less often. The error is ignored, because a smaller pipe works too.
fn enlarge(pipe: &OwnedFd) {
    let _ = fcntl_setpipe_size(pipe, LARGE_PIPE);
}

/// Opens the destination of a child's output. Returns the worker's end if the worker reads the output, and the child's end unless
/// the child inherits the worker's own file.
pub(super) fn open_output(output: Output, is_large: bool) -> io::Result<(Option<OwnedFd>, Option<OwnedFd>)> {
    match output {
        Output::Log => {
            let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
            if is_large {
                enlarge(&write_end);
            }
            ioctl_fionbio(&read_end, true)?;
            Ok((Some(read_end), Some(write_end)))
        }
        Output::Inherit => Ok((None, None)),
        Output::Null => Ok((None, Some(open_null(OFlags::WRONLY)?))),
    }
}

fn open_null(flags: OFlags) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/null", flags | OFlags::CLOEXEC, Mode::empty())?)
}

/// Writes as much of the input as fits into the pipe.
fn fill(pipe: &OwnedFd, input: &mut Bytes) -> io::Result<()> {
    while !input.is_empty() {
        match rustix::io::write(pipe.as_fd(), input) {
            Ok(written) => input.advance(written),
            Err(rustix::io::Errno::AGAIN) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes the rest of the input. Errors are ignored, because a child may exit or close its stdin without reading all of the
/// input.
pub(super) async fn feed(stdin: Option<(Sender, Bytes)>) {
    if let Some((mut pipe, mut input)) = stdin {
        let _ = pipe.write_all_buf(&mut input).await;
    }
}
