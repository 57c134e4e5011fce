//! [`TakeStream`]: the body of `GET /jobs/take` as jobs, and its [`Decoder`], which does no I/O.

use std::error::Error;
use std::fmt;

use bytes::{Buf, Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio_util::task::AbortOnDropHandle;

use crate::job::Job;

/// An open take stream on a connection of its own. The server holds its jobs for this worker until it closes.
#[derive(Debug)]
pub struct TakeStream {
    body: Incoming,
    decoder: Decoder,
    connection: AbortOnDropHandle<()>,
}

impl TakeStream {
    pub(crate) fn new(body: Incoming, connection: AbortOnDropHandle<()>) -> Self {
        Self { body, decoder: Decoder::default(), connection }
    }

    /// Waits for the next job. Nothing is lost when the wait is given up.
    ///
    /// # Errors
    /// Once the stream can give no more jobs; it must be closed then.
    pub async fn next(&mut self) -> Result<Job, StreamError> {
        loop {
            while let Some(line) = self.decoder.next_line() {
                if !is_heartbeat(&line) {
                    return Job::from_line(&line).map_err(StreamError::NotAJob);
                }
            }
            let frame = self.body.frame().await.ok_or(StreamError::Ended)?.map_err(StreamError::Broken)?;
            if let Ok(chunk) = frame.into_data() {
                self.decoder.push(chunk);
            }
        }
    }

    /// Closes the connection, and returns once it is closed here.
    pub async fn close(self) {
        self.connection.abort();
        // An error here says that it was aborted, as it should be.
        let _ = self.connection.await;
    }
}

/// The server keeps an idle stream alive with empty lines.
fn is_heartbeat(line: &Bytes) -> bool {
    line.is_empty()
}

/// Why a take stream gives no more jobs.
#[derive(Debug)]
pub enum StreamError {
    /// The server ended the stream.
    Ended,
    /// The connection failed.
    Broken(hyper::Error),
    /// A line was not a job.
    NotAJob(serde_json::Error),
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended => f.write_str("the server ended the stream"),
            Self::Broken(_) => f.write_str("the stream broke"),
            Self::NotAJob(_) => f.write_str("the stream carried a line that is no job"),
        }
    }
}

impl Error for StreamError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Ended => None,
            Self::Broken(error) => Some(error),
            Self::NotAJob(error) => Some(error),
        }
    }
}

/// Cuts body bytes into lines, wherever the chunks were cut. A line within one chunk is a slice of it, not a copy.
#[derive(Debug, Default)]
pub struct Decoder {
    /// What has arrived and was not searched yet.
    chunk: Bytes,
    /// The start of a line whose end has not arrived.
    partial: BytesMut,
}

impl Decoder {
    /// Adds bytes of the body.
    pub fn push(&mut self, chunk: Bytes) {
        if !self.chunk.is_empty() {
            let mut joined = BytesMut::from(std::mem::take(&mut self.chunk));
            joined.extend_from_slice(&chunk);
            self.chunk = joined.freeze();
            return;
        }
        self.chunk = chunk;
    }

    /// The next whole line without its end, if one has arrived.
    pub fn next_line(&mut self) -> Option<Bytes> {
        let Some(end) = memchr::memchr(b'\n', &self.chunk) else {
            self.partial.extend_from_slice(&self.chunk);
            self.chunk.clear();
            return None;
        };
        let line = self.chunk.split_to(end);
        self.chunk.advance(1);
        if self.partial.is_empty() {
            return Some(line);
        }
        self.partial.extend_from_slice(&line);
        Some(std::mem::take(&mut self.partial).freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut decoder = Decoder::default();
        let mut lines = Vec::new();
        for chunk in chunks {
            decoder.push(Bytes::copy_from_slice(chunk));
            while let Some(line) = decoder.next_line() {
                lines.push(line.to_vec());
            }
        }
        lines
    }

    #[test]
    fn lines_are_the_same_wherever_the_chunks_are_cut() {
        let text = "{\"é\":1}\n\n\n{\"b\":2}\nrest".as_bytes();
        let whole = lines(&[text]);
        assert_eq!(whole, [&b"{\"\xc3\xa9\":1}"[..], b"", b"", b"{\"b\":2}"]);
        for cut in 0..=text.len() {
            let (head, tail) = text.split_at(cut);
            assert_eq!(lines(&[head, tail]), whole, "cut at {cut}");
        }
        assert_eq!(lines(&text.chunks(1).collect::<Vec<_>>()), whole);
    }

    #[test]
    fn bytes_pushed_before_the_last_were_read_are_kept() {
        let mut decoder = Decoder::default();
        decoder.push(Bytes::from_static(b"a\nb"));
        decoder.push(Bytes::from_static(b"c\n"));
        assert_eq!(decoder.next_line().unwrap(), "a");
        assert_eq!(decoder.next_line().unwrap(), "bc");
        assert_eq!(decoder.next_line(), None);
    }

    #[test]
    fn a_line_within_one_chunk_is_not_copied() {
        let chunk = Bytes::from_static(b"one\ntwo\n");
        let mut decoder = Decoder::default();
        decoder.push(chunk.clone());
        decoder.next_line();
        assert_eq!(decoder.next_line().unwrap().as_ptr(), chunk[4..].as_ptr());
    }
}
