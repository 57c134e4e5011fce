//! [`TakeStream`]: the stream of jobs that answers `GET /jobs/take`. `Decoder`: splits that answer into lines, without I/O.

use std::collections::VecDeque;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::job::{Job, JobId};

/// The number of bytes kept from a line that is too long. This is enough to find the job's id, which comes first.
const BEGINNING_BYTES: usize = 64 * 1024;

/// The limits of a take stream and its lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamLimits {
    /// The time without a received byte after which the connection counts as dead. Heartbeats count as received bytes.
    pub idle_timeout: Duration,
    /// The maximum length of a job's line, in bytes.
    pub max_job_size: usize,
}

/// The default idle timeout: ten heartbeat intervals of the server, so that only a dead connection is silent for that long.
pub const DEFAULT_STREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// The default maximum length of a job's line: far more than a job needs, and small enough to fit into a worker's memory.
pub const DEFAULT_MAX_JOB_SIZE: usize = 64 * 1024 * 1024;

impl Default for StreamLimits {
    fn default() -> Self {
        Self { idle_timeout: DEFAULT_STREAM_IDLE_TIMEOUT, max_job_size: DEFAULT_MAX_JOB_SIZE }
    }
}

/// An open take stream on a connection of its own. The server holds the stream's jobs for this worker until the stream closes.
#[derive(Debug)]
pub struct TakeStream {
    body: Incoming,
    decoder: Decoder,
    idle_timeout: Duration,
    /// The total time of all waits since the last byte, cancelled waits included. The time between waits does not count, because
    /// the connection is not read then.
    waited: Duration,
    connection: AbortOnDropHandle<()>,
}

/// A guard that adds its lifetime to a sum when it is dropped, so that a cancelled wait counts too.
struct Stopwatch<'a> {
    sum: &'a mut Duration,
    begun: Instant,
}

impl Drop for Stopwatch<'_> {
    fn drop(&mut self) {
        *self.sum += self.begun.elapsed();
    }
}

/// An item of a take stream.
#[derive(Debug)]
pub enum Received {
    /// A job.
    Job(Job),
    /// A line that contains a job's id but is not a valid job.
    Malformed {
        /// The id in the line.
        id: JobId,
        /// The parse error, or a message that the line is too long.
        reason: String,
    },
}

impl TakeStream {
    pub(crate) fn new(body: Incoming, connection: AbortOnDropHandle<()>, limits: StreamLimits) -> Self {
        let StreamLimits { idle_timeout, max_job_size } = limits;
        Self { body, decoder: Decoder::new(max_job_size), idle_timeout, waited: Duration::ZERO, connection }
    }

    /// Waits for the next item. The wait is cancel safe.
    ///
    /// # Errors
    /// When the stream can yield no more jobs. The caller then closes the stream.
    pub async fn next(&mut self) -> Result<Received, StreamError> {
        loop {
            while let Some(line) = self.decoder.next_line() {
                if !line.is_heartbeat() {
                    return line.read();
                }
                self.decoder.free_buffers();
            }
            let left = self.idle_timeout.saturating_sub(self.waited);
            let frame = {
                let _stopwatch = Stopwatch { sum: &mut self.waited, begun: Instant::now() };
                tokio::time::timeout(left, self.body.frame()).await
            };
            if frame.is_ok() {
                self.waited = Duration::ZERO;
            }
            let frame = frame.map_err(|_| StreamError::Silent(self.idle_timeout))?.ok_or(StreamError::Ended)?;
            if let Ok(chunk) = frame.map_err(StreamError::Broken)?.into_data() {
                self.decoder.push(chunk);
            }
        }
    }

    /// Closes the connection, and returns once this side of the connection is closed.
    pub async fn close(self) {
        self.connection.abort();
        // Ignore the error, which only says that the task was aborted.
        let _ = self.connection.await;
    }
}

/// The reason why a take stream can yield no more jobs.
#[derive(Debug)]
pub enum StreamError {
    /// The server ended the stream.
    Ended,
    /// The connection failed.
    Broken(hyper::Error),
    /// Nothing arrived within the idle timeout, so the connection counts as dead.
    Silent(Duration),
    /// A line was not a valid job, and contained no id under which to report a failure.
    NotAJob(String),
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended => f.write_str("the server ended the stream"),
            Self::Broken(_) => f.write_str("the stream broke"),
            Self::Silent(limit) => write!(f, "nothing came for {}", humantime::format_duration(*limit)),
            Self::NotAJob(reason) => write!(f, "the stream carried a line that is no job, and has no id: {reason}"),
        }
    }
}

impl Error for StreamError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Broken(error) => Some(error),
            Self::Ended | Self::Silent(_) | Self::NotAJob(_) => None,
        }
    }
}

/// A line of the stream, without its newline.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Line {
    Whole(Bytes),
    /// The beginning of a line that exceeds the limit.
    TooLong(Bytes),
}

impl Line {
    /// Reports whether the line is a heartbeat, which the server sends as an empty line.
    fn is_heartbeat(&self) -> bool {
        matches!(self, Self::Whole(line) if line.is_empty() || &line[..] == b"\r")
    }

    fn read(&self) -> Result<Received, StreamError> {
        let (text, reason) = match self {
            Self::Whole(line) => match Job::from_line(line) {
                Ok(job) => return Ok(Received::Job(job)),
                Err(error) => (line, error.to_string()),
            },
            Self::TooLong(beginning) => (beginning, "it is larger than max_job_size".to_owned()),
        };
        match JobId::find(text) {
            Some(id) => Ok(Received::Malformed { id, reason }),
            None => Err(StreamError::NotAJob(reason)),
        }
    }
}

/// The length beyond which a line that arrives in several chunks is collected in a buffer from [`Buffers`].
const LONG_LINE_BYTES: usize = 64 * 1024;

/// The maximum number of buffers that [`Buffers`] keeps.
const MAX_BUFFERS: usize = 8;

/// Large buffers that are kept for reuse. In a new buffer, the first write to each memory page causes a page fault, which costs
/// more than copying the data to the page.
#[derive(Debug, Default)]
struct Buffers {
    /// The buffers of the last long lines, oldest first. A buffer is reused only after its line has been dropped.
    last: VecDeque<BytesMut>,
    /// The length of the last long line. The next buffer has at least this capacity, because lines of one stream are often of
    /// similar length.
    usual: usize,
}

impl Buffers {
    /// Returns an empty buffer for at least `length` bytes.
    fn take(&mut self, length: usize) -> BytesMut {
        let wanted = length.max(self.usual);
        let free = self.last.iter_mut().position(|buffer| buffer.try_reclaim(wanted));
        // Allocate twice the length, so that a line that outgrows the usual length is not copied again at each chunk.
        free.and_then(|at| self.last.remove(at)).unwrap_or_else(|| BytesMut::with_capacity(wanted.max(2 * length)))
    }

    /// Returns the line in `buffer`, and keeps the buffer for reuse if the line is long.
    fn freeze(&mut self, mut buffer: BytesMut) -> Bytes {
        if buffer.len() <= LONG_LINE_BYTES {
            return buffer.freeze();
        }
        self.usual = buffer.len();
        let line = buffer.split().freeze();
        if self.last.len() == MAX_BUFFERS {
            self.last.pop_front();
        }
        self.last.push_back(buffer);
        line
    }
}

/// A decoder that splits the body into lines, regardless of the boundaries between chunks. A line that lies within one chunk is
/// returned as a slice of the chunk, not a copy.
#[derive(Debug)]
struct Decoder {
    max_line: usize,
    /// The bytes that have arrived and have not been searched for a newline yet.
    chunk: Bytes,
    /// The beginning of a line whose end has not arrived.
    partial: BytesMut,
    buffers: Buffers,
    /// Whether the line in `partial` already exceeds `max_line`. Its bytes after the first `BEGINNING_BYTES` are dropped.
    too_long: bool,
}

impl Decoder {
    /// Returns a decoder for lines of at most `max_line` bytes.
    fn new(max_line: usize) -> Self {
        Self { max_line, chunk: Bytes::new(), partial: BytesMut::new(), buffers: Buffers::default(), too_long: false }
    }

    /// Adds the next chunk of the body. All lines of the previous chunk must have been read.
    fn push(&mut self, chunk: Bytes) {
        debug_assert!(self.chunk.is_empty());
        self.chunk = chunk;
    }

    /// Returns the next line, if all of it has arrived.
    fn next_line(&mut self) -> Option<Line> {
        let Some(end) = memchr::memchr(b'\n', &self.chunk) else {
            let rest = std::mem::take(&mut self.chunk);
            self.keep(&rest);
            return None;
        };
        let line = self.chunk.split_to(end);
        self.chunk.advance(1);
        if self.partial.is_empty() && line.len() <= self.max_line {
            return Some(Line::Whole(line));
        }
        self.keep(&line);
        let line = self.buffers.freeze(std::mem::take(&mut self.partial));
        Some(if std::mem::take(&mut self.too_long) { Line::TooLong(line) } else { Line::Whole(line) })
    }

    /// Frees the buffers that are kept for reuse.
    fn free_buffers(&mut self) {
        self.buffers = Buffers::default();
    }

    /// Moves `partial` into a large buffer if `additional` more bytes do not fit into `partial`, and would make the line longer
    /// than `LONG_LINE_BYTES`.
    fn make_room(&mut self, additional: usize) {
        let length = self.partial.len() + additional;
        if length > self.partial.capacity() && length > LONG_LINE_BYTES {
            let mut buffer = self.buffers.take(length);
            buffer.extend_from_slice(&self.partial);
            self.partial = buffer;
        }
    }

    fn keep(&mut self, piece: &[u8]) {
        self.too_long |= self.partial.len() + piece.len() > self.max_line;
        if !self.too_long {
            self.make_room(piece.len());
            self.partial.extend_from_slice(piece);
            return;
        }
        let room = BEGINNING_BYTES.saturating_sub(self.partial.len());
        self.partial.extend_from_slice(&piece[..piece.len().min(room)]);
        if self.partial.len() > BEGINNING_BYTES {
            // Free the memory of the dropped bytes now, because the rest of the line may take a long time to arrive.
            self.partial = BytesMut::from(&self.partial[..BEGINNING_BYTES]);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Pushes a line of `length` bytes in two chunks, and returns the decoded line.
    fn long_line(decoder: &mut Decoder, byte: u8, length: usize) -> Bytes {
        let mut text = vec![byte; length];
        text.push(b'\n');
        for chunk in text.chunks(length / 2 + 1) {
            assert_eq!(decoder.next_line(), None);
            decoder.push(Bytes::copy_from_slice(chunk));
        }
        let Some(Line::Whole(line)) = decoder.next_line() else { panic!("no line") };
        assert!(line.len() == length && line.iter().all(|found| *found == byte));
        line
    }

    #[test]
    fn the_buffer_of_a_long_line_is_used_again_after_the_line() {
        let mut decoder = Decoder::new(usize::MAX);
        let length = LONG_LINE_BYTES * 3;
        let first = long_line(&mut decoder, b'a', length);
        let used = first.as_ptr();
        let second = long_line(&mut decoder, b'b', length);
        assert!(first.iter().all(|byte| *byte == b'a'), "a line in use keeps its buffer");
        assert_ne!(second.as_ptr(), used);
        drop(first);
        assert_eq!(long_line(&mut decoder, b'c', length - 1).as_ptr(), used);
        for byte in 0..9 {
            long_line(&mut decoder, byte, length * usize::from(byte % 3 + 1));
        }
        assert!(decoder.buffers.last.len() <= MAX_BUFFERS);
        decoder.free_buffers();
        assert!(decoder.buffers.last.is_empty());
    }

    #[test]
    fn a_line_within_one_chunk_is_not_copied() {
        let chunk = Bytes::from_static(b"one\ntwo\n");
        let mut decoder = Decoder::new(1024);
        decoder.push(chunk.clone());
        decoder.next_line();
        let Some(Line::Whole(line)) = decoder.next_line() else { panic!("no line") };
        assert_eq!(line.as_ptr(), chunk[4..].as_ptr());
    }

    #[test]
    fn an_endless_line_is_not_held_in_memory() {
        let mut decoder = Decoder::new(100_000);
        for _ in 0..1000 {
            decoder.push(Bytes::from(vec![b'x'; 10_000]));
            assert_eq!(decoder.next_line(), None);
            assert!(decoder.partial.capacity() <= 200_000, "{}", decoder.partial.capacity());
        }
        decoder.push(Bytes::from_static(b"\n"));
        assert!(matches!(decoder.next_line(), Some(Line::TooLong(line)) if line.len() == BEGINNING_BYTES));
    }

    /// Returns the lines that the decoder must return, computed from the whole text at once.
    fn expected(max_line: usize, text: &[u8]) -> Vec<Line> {
        let mut lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
        lines.pop();
        let line = |line: &[u8]| {
            if line.len() <= max_line {
                Line::Whole(Bytes::copy_from_slice(line))
            } else {
                Line::TooLong(Bytes::copy_from_slice(&line[..line.len().min(BEGINNING_BYTES)]))
            }
        };
        lines.into_iter().map(line).collect()
    }

    /// Returns the decoded lines of a text that is pushed in pieces of the given lengths, which are repeated cyclically.
    fn lines_in_pieces(max_line: usize, text: &[u8], lengths: &[usize]) -> Vec<Line> {
        let (mut decoder, mut found, mut rest) = (Decoder::new(max_line), Vec::new(), text);
        for length in lengths.iter().cycle() {
            let (piece, left) = rest.split_at(rest.len().min(*length));
            decoder.push(Bytes::copy_from_slice(piece));
            rest = left;
            found.extend(std::iter::from_fn(|| decoder.next_line()));
            if rest.is_empty() {
                break;
            }
        }
        found
    }

    /// Returns a strategy for texts of arbitrary bytes and long runs of one byte.
    fn any_text() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![1 => Just(b'\n'), 6 => any::<u8>(), 2 => Just(b'"'), 1 => Just(0xc3)];
        let long = (0..2 * BEGINNING_BYTES).prop_map(|length| vec![b'x'; length]);
        let piece = prop_oneof![20 => proptest::collection::vec(byte, 0..60), 1 => long];
        proptest::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
    }

    fn any_lengths(most: usize) -> impl Strategy<Value = Vec<usize>> {
        proptest::collection::vec(1..most, 1..20)
    }

    fn any_job() -> impl Strategy<Value = (String, String, u32)> {
        (".{0,8}", ".{0,40}", any::<u32>())
    }

    proptest! {
        #[test]
        fn any_split_of_any_bytes_gives_the_same_lines(
            text in any_text(),
            lengths in prop_oneof![any_lengths(40), any_lengths(100_000)],
            max_line in prop_oneof![0usize..80, 0usize..200_000],
        ) {
            let found = lines_in_pieces(max_line, &text, &lengths);
            prop_assert_eq!(&found, &expected(max_line, &text));
            // No line makes the parser hang or panic.
            found.iter().for_each(|line| drop(line.read()));
        }

        #[test]
        fn any_split_of_a_stream_gives_the_same_jobs(
            jobs in proptest::collection::vec(any_job(), 0..12),
            lengths in any_lengths(200),
        ) {
            let mut text = String::new();
            for (job_type, payload, attempts) in &jobs {
                let job = serde_json::json!({
                    "id": payload, "type": job_type, "queue": "q", "priority": 1, "attempts": attempts, "ready_at": 1,
                    "payload": payload,
                });
                text.push_str(&format!("\n{job}\n"));
            }
            let lines = lines_in_pieces(1024, text.as_bytes(), &lengths);
            let found: Vec<(String, String, u32)> = lines.iter().filter(|line| !line.is_heartbeat()).map(|line| {
                let Ok(Received::Job(job)) = line.read() else { panic!("no job: {line:?}") };
                (job.job_type, serde_json::from_slice(&job.payload).unwrap(), job.attempts)
            }).collect();
            prop_assert_eq!(found, jobs);
        }
    }

    #[test]
    fn a_malformed_job_is_known_by_its_id_or_not_at_all() {
        let read = |line: &'static str| Line::Whole(line.into()).read();
        assert!(matches!(read(r#"{"id":"a","type":7}"#), Ok(Received::Malformed { id, .. }) if id.as_str() == "a"));
        assert!(matches!(read(r#"{"type":"t"}"#), Err(StreamError::NotAJob(_))));
        let cut = Line::TooLong(r#"{"id":"a","payload":"xxxxxx"#.into()).read();
        assert!(matches!(cut, Ok(Received::Malformed { id, .. }) if id.as_str() == "a"));
    }
}
