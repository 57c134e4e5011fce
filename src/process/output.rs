//! The output of a child: lines for the log, and the [`Tail`] that a failure report carries. Both are bounded.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use crate::lock::lock;

/// The maximum number of bytes kept of a line. The rest of a longer line is cut.
const MAX_LINE_BYTES: usize = 64 * 1024;

/// The number of bytes kept from the beginning of an output, because the first error often explains the others.
const HEAD_BYTES: usize = 4 * 1024;

/// The number of bytes kept from the end of an output.
const TAIL_BYTES: usize = 28 * 1024;

/// The maximum number of bytes per read, which is also the default capacity of a pipe.
pub(super) const READ_BYTES: usize = 64 * 1024;

/// The size of the first read, in bytes. The size then doubles up to `READ_BYTES`, or halves down to `SMALLEST_READ_BYTES` if a
/// read takes longer than [`TURN`].
const FIRST_READ_BYTES: usize = 16 * 1024;
const SMALLEST_READ_BYTES: usize = 1024;

/// The target duration of one read, including the handling of its lines. All other tasks of this thread wait during that time.
const TURN: Duration = Duration::from_millis(1);

/// The capacity that a line buffer keeps after a long line.
const KEPT_FOR_LINES: usize = 16 * 1024;

/// The poll interval of a pipe whose registration with epoll has failed. The failure must not fail the job, which is already
/// running.
const PAUSE_WITHOUT_REACTOR: Duration = Duration::from_millis(10);

/// The output stream that a line comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Channel {
    Stdout,
    Stderr,
}

/// The consumer of a child's output.
pub(crate) trait Printer {
    /// Reports whether lines of `channel` are printed now. If not, the output is not even split into lines.
    fn wants(&self, channel: Channel) -> bool;

    /// Prints a line. `line` does not contain the newline.
    fn print(&self, channel: Channel, line: &str);
}

/// Reads a non-blocking pipe, if there is one, line by line to its end. Adds the number of bytes to `read`, and the bytes to
/// `tail` if there is one.
pub(super) async fn read_lines(
    pipe: Option<&OwnedFd>,
    read: &AtomicU64,
    (printer, channel): (&impl Printer, Channel),
    mut tail: Option<&mut Tail>,
) {
    let Some(pipe) = pipe else { return };
    let mut lines = LineSplitter::default();
    let on_line = |line: &str| printer.print(channel, line);
    let mut take = |chunk: &[u8]| {
        read.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        if printer.wants(channel) {
            lines.push(chunk, &on_line);
        } else {
            lines = LineSplitter::default();
        }
        if let Some(tail) = &mut tail {
            tail.push(chunk);
        }
    };
    read_chunks(pipe, |portion| read_some(pipe, portion, &mut take)).await;
    lines.finish(&on_line);
}

/// Reads a non-blocking pipe to its end. `read` is called with the maximum number of bytes to read, and returns the number of
/// bytes that it has read.
async fn read_chunks(pipe: &OwnedFd, mut read: impl FnMut(usize) -> Result<usize, Errno>) {
    let (mut watched, mut in_a_row, mut portion) = (None, 0, FIRST_READ_BYTES);
    loop {
        let begun = Instant::now();
        let count = read(portion);
        // Many short lines take longer to log than a few long ones, so the size of the next read depends on the time that this
        // one took.
        if begun.elapsed() > TURN {
            portion = (portion / 2).max(SMALLEST_READ_BYTES);
        } else if count == Ok(portion) {
            portion = READ_BYTES.min(portion * 2);
        }
        match count {
            Ok(0) => break,
            // If a child prints without pause, its pipe is always readable. Without this yield, the other futures of this task
            // would starve, above all the one that waits for a termination.
            Ok(_) if in_a_row == 1 => {
                in_a_row = 0;
                tokio::task::yield_now().await;
            }
            // The first read does not yield, because a short job needs two reads: one for its output and one for end of file.
            Ok(_) => in_a_row = 1,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                in_a_row = 0;
                readable(watched.get_or_insert_with(|| watch(pipe))).await;
            }
            Err(_) => break,
        }
        // Yield now and then, because a child that prints as fast as its pipe is read would starve the other tasks of this thread.
        tokio::task::coop::consume_budget().await;
    }
}

/// One output pipe of a process that runs one task after another. The output is read as it arrives, and the pipe is emptied
/// between two tasks.
#[derive(Debug)]
pub(super) struct SharedOutput {
    pipe: OwnedFd,
    channel: Channel,
    lines: Mutex<LineSplitter>,
}

impl SharedOutput {
    /// Wraps a non-blocking pipe.
    pub(super) fn of(pipe: OwnedFd, channel: Channel) -> Self {
        Self { pipe, channel, lines: Mutex::default() }
    }

    /// Reads the output line by line to its end.
    pub(super) async fn read(&self, on_line: impl Fn(Channel, &str)) {
        let on_line = |line: &str| on_line(self.channel, line);
        read_chunks(&self.pipe, |portion| {
            // Lock before the read. Otherwise `read_present` could run between the read and the push, and the bytes would be
            // missing from the output of the task that printed them.
            let mut lines = lock(&self.lines);
            read_some(&self.pipe, portion, |chunk| lines.push(chunk, &on_line))
        })
        .await;
        lock(&self.lines).finish(&on_line);
    }

    /// Reads the bytes that are in the pipe now, or none if `is_readable` is false. A last line without a newline is passed to
    /// `on_line` too.
    fn read_present(&self, is_readable: bool, on_line: impl Fn(Channel, &str)) {
        let on_line = |line: &str| on_line(self.channel, line);
        let mut left = if is_readable { ioctl_fionread(&self.pipe).unwrap_or_default() } else { 0 };
        let mut lines = lock(&self.lines);
        while left > 0 {
            let portion = READ_BYTES.min(usize::try_from(left).unwrap_or(READ_BYTES));
            match read_some(&self.pipe, portion, |chunk| lines.push(chunk, &on_line)) {
                Ok(0) => break,
                Ok(count) => left = left.saturating_sub(count as u64),
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        lines.finish(&on_line);
    }
}

/// Reads the bytes that are in the pipes of `outputs` now. Usually all pipes are empty, so one system call checks them together.
pub(super) fn read_present(outputs: &[SharedOutput; 2], on_line: impl Fn(Channel, &str)) {
    let mut looks = outputs.each_ref().map(|output| PollFd::new(&output.pipe, PollFlags::IN));
    // After a failed poll, every pipe counts as readable.
    let is_known = poll(&mut looks, Some(&Timespec::default())).is_ok();
    let are_readable = looks.map(|look| !is_known || !look.revents().is_empty());
    for (output, is_readable) in outputs.iter().zip(are_readable) {
        output.read_present(is_readable, &on_line);
    }
}

/// A pipe that is registered with the reactor, or the error of the registration. A pipe is registered once a read finds it empty.
/// Most jobs end before that, which saves two system calls per pipe.
type Watched<'a> = io::Result<AsyncFd<BorrowedFd<'a>>>;

#[expect(unsafe_code, reason = "the reactor has no safe way in for a descriptor that is borrowed")]
fn watch(pipe: &OwnedFd) -> Watched<'_> {
    // SAFETY: an `OwnedFd` stays open, under the same number, for as long as it is borrowed.
    Ok(unsafe { AsyncFd::register_with_interest(pipe.as_fd(), Interest::READABLE) }?)
}

/// Waits until the pipe may be readable. Call this after a read has found the pipe empty.
async fn readable(pipe: &Watched<'_>) {
    match pipe {
        Ok(pipe) => match pipe.readable().await {
            Ok(mut ready) => ready.clear_ready(),
            // The runtime is shutting down, and drops this task.
            Err(_) => std::future::pending().await,
        },
        Err(_) => sleep(PAUSE_WITHOUT_REACTOR).await,
    }
}

thread_local! {
    /// The read buffer of a thread. All tasks of the thread share it, because none keeps data in it across an `await`.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into());
}

fn read_some(pipe: &OwnedFd, portion: usize, take: impl FnOnce(&[u8])) -> Result<usize, Errno> {
    BUFFER.with_borrow_mut(|buffer| {
        let count = rustix::io::read(pipe, &mut buffer[..portion])?;
        take(&buffer[..count]);
        Ok(count)
    })
}

/// A splitter of bytes into lines. Invalid UTF-8 is replaced, and a line longer than `MAX_LINE_BYTES` is cut.
#[derive(Debug, Default)]
struct LineSplitter {
    partial: Vec<u8>,
    left_out: usize,
}

impl LineSplitter {
    fn push(&mut self, mut chunk: &[u8], on_line: &impl Fn(&str)) {
        while let Some(end) = memchr::memchr(b'\n', chunk) {
            let (line, rest) = (&chunk[..end], &chunk[end + 1..]);
            // Most lines arrive whole, and need no copy.
            if self.partial.is_empty() && line.len() <= MAX_LINE_BYTES {
                emit(line, 0, on_line);
            } else {
                self.keep(line);
                self.emit(on_line);
            }
            chunk = rest;
        }
        self.keep(chunk);
    }

    fn finish(&mut self, on_line: &impl Fn(&str)) {
        if !self.partial.is_empty() {
            self.emit(on_line);
        }
    }

    fn keep(&mut self, piece: &[u8]) {
        let room = MAX_LINE_BYTES - self.partial.len();
        let kept = piece.len().min(room);
        self.partial.extend_from_slice(&piece[..kept]);
        self.left_out += piece.len() - kept;
    }

    fn emit(&mut self, on_line: &impl Fn(&str)) {
        emit(&self.partial, self.left_out, on_line);
        self.left_out = 0;
        self.partial.clear();
        // Free the memory of a long line, which would otherwise stay allocated until the job ends.
        self.partial.shrink_to(KEPT_FOR_LINES);
    }
}

fn emit(line: &[u8], left_out: usize, on_line: &impl Fn(&str)) {
    let line = String::from_utf8_lossy(line);
    match left_out {
        0 => on_line(line.strip_suffix('\r').unwrap_or(&line)),
        count => on_line(&format!("{line}… [{count} bytes cut]")),
    }
}

/// The beginning and the end of an output. The middle of a long output is left out.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    head: Vec<u8>,
    end: VecDeque<u8>,
    left_out: u64,
}

impl Tail {
    /// Adds a line and its newline.
    pub(crate) fn push_line(&mut self, line: &str) {
        self.push(line.as_bytes());
        self.push(b"\n");
    }

    fn push(&mut self, chunk: &[u8]) {
        let (head, rest) = chunk.split_at(chunk.len().min(HEAD_BYTES - self.head.len()));
        self.head.extend_from_slice(head);
        let end = &rest[rest.len().saturating_sub(TAIL_BYTES)..];
        // Space is freed first, so that the buffer never exceeds its limit.
        let surplus = (self.end.len() + end.len()).saturating_sub(TAIL_BYTES);
        self.end.drain(..surplus);
        self.end.extend(end);
        self.left_out += (surplus + rest.len() - end.len()) as u64;
    }

    /// Returns the kept text. If bytes are left out, a line in their place says how many.
    pub(crate) fn text(&self) -> String {
        let end: Vec<u8> = self.end.iter().copied().collect();
        if self.left_out == 0 {
            return String::from_utf8_lossy(&[&self.head[..], &end].concat()).into_owned();
        }
        let (head, end) = (String::from_utf8_lossy(&self.head), String::from_utf8_lossy(&end));
        format!("{head}\n[{} bytes left out]\n{end}", self.left_out)
    }

    /// Returns the last line that is not blank, shortened to 500 characters.
    pub(crate) fn last_line(&self) -> Option<String> {
        let text = self.text();
        let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
        Some(match line.char_indices().nth(500) {
            Some((end, _)) => format!("{}…", &line[..end]),
            None => line.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<String> {
        let seen = RefCell::new(Vec::new());
        let on_line = |line: &str| seen.borrow_mut().push(line.to_owned());
        let mut lines = LineSplitter::default();
        for chunk in chunks {
            lines.push(chunk, &on_line);
        }
        lines.finish(&on_line);
        seen.into_inner()
    }

    #[test]
    fn lines_end_at_newlines_for_any_chunking() {
        assert_eq!(lines(&[b"a\r\n\nb", b"c\n\xc3", b"\xa9"]), ["a", "", "bc", "é"]);
    }

    #[test]
    fn a_short_output_is_kept_whole() {
        let mut tail = Tail::default();
        tail.push(b"one\n");
        tail.push(b"two\n\n");
        assert_eq!(tail.text(), "one\ntwo\n\n");
        assert_eq!(tail.last_line().unwrap(), "two");
    }

    #[test]
    fn a_long_output_keeps_its_beginning_and_its_end() {
        let mut tail = Tail::default();
        tail.push(&vec![b'a'; HEAD_BYTES]);
        tail.push(&vec![b'b'; 1000]);
        tail.push(&vec![b'c'; TAIL_BYTES]);
        let text = tail.text();
        assert!(text.starts_with("aaaa") && text.ends_with("cccc"));
        assert!(text.contains("\n[1000 bytes left out]\n"), "{}", &text[HEAD_BYTES..HEAD_BYTES + 60]);
        assert!(tail.end.capacity() <= 2 * TAIL_BYTES);
    }

    /// A printer that accepts all lines, or none.
    struct Seen<F> {
        wants: bool,
        on_line: F,
    }

    impl<F: Fn(&str)> Printer for Seen<F> {
        fn wants(&self, _channel: Channel) -> bool {
            self.wants
        }

        fn print(&self, _channel: Channel, line: &str) {
            (self.on_line)(line);
        }
    }

    fn non_blocking_pipe() -> (OwnedFd, OwnedFd) {
        let (pipe, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&pipe, true).unwrap();
        (pipe, writer)
    }

    #[tokio::test]
    async fn lines_that_are_not_wanted_are_read_and_not_printed() {
        let (pipe, writer) = non_blocking_pipe();
        rustix::io::write(&writer, b"one\ntwo\n").unwrap();
        drop(writer);
        let printer = Seen { wants: false, on_line: |line: &str| panic!("{line}") };
        let (read, mut tail) = (AtomicU64::default(), Tail::default());
        read_lines(Some(&pipe), &read, (&printer, Channel::Stderr), Some(&mut tail)).await;
        assert_eq!((read.into_inner(), tail.text().as_str()), (8, "one\ntwo\n"));
    }

    #[tokio::test]
    async fn a_pipe_that_the_reactor_refuses_is_polled() {
        let (pipe, writer) = non_blocking_pipe();
        // The reactor refuses a descriptor that is already registered.
        let _watched = watch(&pipe).unwrap();
        assert!(watch(&pipe).is_err());
        let (lines, read) = (RefCell::new(Vec::new()), AtomicU64::default());
        let printer = Seen { wants: true, on_line: |line: &str| lines.borrow_mut().push(line.to_owned()) };
        let reading = read_lines(Some(&pipe), &read, (&printer, Channel::Stdout), None);
        // The lines are written after the first read has found the pipe empty.
        let printing = async move { rustix::io::write(&writer, b"one\ntwo\n").unwrap() };
        tokio::join!(reading, printing);
        assert_eq!(lines.into_inner(), ["one", "two"]);
        assert_eq!(read.into_inner(), 8);
    }

    #[tokio::test]
    async fn a_child_that_prints_without_pause_starves_no_other() {
        let (pipe, writer) = rustix::pipe::pipe().unwrap();
        let print = || rustix::io::write(&writer, b"again\n").unwrap();
        let (lines, read) = (std::cell::Cell::new(0), AtomicU64::default());
        let on_line = |_: &str| {
            lines.set(lines.get() + 1);
            print();
        };
        let printer = Seen { wants: true, on_line };
        print();
        let ended = read_lines(Some(&pipe), &read, (&printer, Channel::Stdout), None).now_or_never();
        assert!(ended.is_none() && lines.get() == 2, "{} reads in one turn", lines.get());
    }
}
