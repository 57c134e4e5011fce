//! [`Wire`]: the connection to a warm process. A job is one line of JSON, and so is its reply.

use std::io;
use std::io::IoSlice;

use bytes::{Buf, Bytes};
use memchr::memmem;
use serde::Deserialize;
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::dispatch::result_file::{NumberOrText, Verdict, WrittenVerdict};
use crate::job::{Job, JobId};

/// The maximum size of a reply in bytes.
const MAX_REPLY_BYTES: usize = 1024 * 1024;

/// The buffer capacity that an idle connection keeps for replies.
const KEPT_BYTES: usize = 4096;

/// The minimum free space in the buffer before a read.
const READ_BYTES: usize = 4096;

/// The first two bytes of U+2028 and U+2029 in UTF-8. Node's readline splits lines at these characters.
const SEPARATOR: &[u8] = b"\xe2\x80";

/// A process's reply to its job.
#[derive(Debug, PartialEq)]
pub(super) struct Reply {
    /// The failure, or `None` for a success.
    pub(super) failure: Option<Verdict>,
    /// Whether the process announced that it takes no more jobs.
    pub(super) is_last: bool,
}

/// The reason for a missing reply.
#[derive(Debug)]
pub(super) enum NoReply {
    /// The process has closed the connection.
    Closed,
    /// The process has closed the connection, or ended, before it had read the whole job.
    Unread,
    /// The process has sent something other than a reply to its job.
    Invalid(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReplyLine {
    id: Option<String>,
    ok: Option<bool>,
    #[serde(default)]
    last: bool,
    message: Option<String>,
    error_type: Option<String>,
    backtrace: Option<String>,
    retry_in: Option<NumberOrText>,
    retry_at: Option<NumberOrText>,
    kill: Option<bool>,
}

/// The connection, and the bytes received over it.
#[derive(Debug)]
pub(super) struct Wire {
    stream: UnixStream,
    received: Vec<u8>,
    /// The number of bytes at the start of `received` that are known to contain no line end.
    searched: usize,
}

impl Wire {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, received: Vec::new(), searched: 0 }
    }

    /// Sends a job, and waits for the reply. If the future is dropped before the reply, the connection must not be used again.
    pub(super) async fn exchange(&mut self, job: &Job) -> Result<Reply, NoReply> {
        // The job's bytes are copied only if a character in them has to be escaped.
        let mut line = escape_separators(&job.object).chain(&b"\n"[..]);
        loop {
            self.send(&mut line)?;
            if let Some(end) = self.receive()? {
                if line.has_remaining() {
                    return Err(NoReply::Invalid("it replied before it had read its job".to_owned()));
                }
                let reply = parse(&self.received[..end], &job.id).map_err(NoReply::Invalid)?;
                self.received.drain(..end);
                self.searched = 0;
                if !self.received.is_empty() {
                    let rest = excerpt(&self.received);
                    return Err(NoReply::Invalid(format!("it sent more than one reply: {rest}")));
                }
                return Ok(reply);
            }
            let wanted =
                if line.has_remaining() { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
            // `ready` fails only after the runtime has shut down, which drops this task as well.
            self.stream.ready(wanted).await.map_err(|_| NoReply::Closed)?;
        }
    }

    /// Reports whether the process is still connected and has sent nothing since its last reply.
    pub(super) fn is_idle(&mut self) -> bool {
        self.receive().is_ok_and(|line| line.is_none()) && self.received.is_empty()
    }

    /// Writes as much of the line as the socket accepts without blocking.
    fn send(&self, line: &mut impl Buf) -> Result<(), NoReply> {
        while line.has_remaining() {
            let mut slices = [IoSlice::new(&[]); 2];
            let filled = line.chunks_vectored(&mut slices);
            match self.stream.try_write_vectored(&slices[..filled]) {
                Ok(written) => line.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The line is incomplete, so the process cannot have begun the job.
                Err(_) => return Err(NoReply::Unread),
            }
        }
        Ok(())
    }

    /// Reads until the socket is empty or a line is complete. Returns the end of the line, or `None` if no line is complete.
    fn receive(&mut self) -> Result<Option<usize>, NoReply> {
        loop {
            if let Some(end) = memchr::memchr(b'\n', &self.received[self.searched..]) {
                // Return without another read, which would rarely find more bytes. The caller checks for bytes after this line.
                return Ok(Some(self.searched + end + 1));
            }
            self.searched = self.received.len();
            if self.searched > MAX_REPLY_BYTES {
                return Err(NoReply::Invalid(format!("it sent a reply of more than {MAX_REPLY_BYTES} bytes")));
            }
            self.received.reserve(READ_BYTES);
            match self.stream.try_read_buf(&mut self.received) {
                Ok(0) => return Err(NoReply::Closed),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.received.shrink_to(KEPT_BYTES);
                    return Ok(None);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel resets a Unix socket if its peer closes the connection with data left unread.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(NoReply::Unread),
                Err(_) => return Err(NoReply::Closed),
            }
        }
    }
}

/// Escapes U+2028 and U+2029. JSON allows these characters only in strings, where an escape stands for the same character.
fn escape_separators(json: &Bytes) -> Bytes {
    let mut found =
        memmem::find_iter(json, SEPARATOR).filter(|at| matches!(json.get(at + 2), Some(0xa8 | 0xa9))).peekable();
    if found.peek().is_none() {
        return json.clone();
    }
    let (mut escaped, mut from) = (Vec::with_capacity(json.len() + 64), 0);
    for at in found {
        escaped.extend_from_slice(&json[from..at]);
        escaped.extend_from_slice(if json[at + 2] == 0xa8 { br"\u2028" } else { br"\u2029" });
        from = at + 3;
    }
    escaped.extend_from_slice(&json[from..]);
    escaped.into()
}

fn parse(line: &[u8], id: &JobId) -> Result<Reply, String> {
    let line_of = |problem: String| format!("{problem}: {}", excerpt(line));
    let parsed: ReplyLine =
        serde_json::from_slice(line).map_err(|error| line_of(format!("its reply is invalid: {error}")))?;
    let ReplyLine { id: named, ok, last, message, error_type, backtrace, retry_in, retry_at, kill } = parsed;
    let named = named.ok_or_else(|| line_of("its reply has no id".to_owned()))?;
    if named != id.as_str() {
        return Err(line_of("it replied for another job".to_owned()));
    }
    let ok = ok.ok_or_else(|| line_of("its reply has no ok".to_owned()))?;
    let written = WrittenVerdict { message, error_type, backtrace, retry_in, retry_at, kill };
    let failure =
        if ok { None } else { Some(Verdict::of(written).map_err(|problem| format!("in its reply {problem}"))?) };
    Ok(Reply { failure, is_last: last })
}

/// Returns the beginning of an invalid reply, for messages.
fn excerpt(bytes: &[u8]) -> String {
    const CHARS: usize = 200;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * CHARS)]);
    let text = text.trim_end();
    match text.char_indices().nth(CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(line: &str) -> Result<Reply, String> {
        parse(line.as_bytes(), &"a".into())
    }

    #[test]
    fn a_reply_needs_the_jobs_id_and_ok() {
        assert_eq!(reply(r#"{"id":"a","ok":true}"#), Ok(Reply { failure: None, is_last: false }));
        assert!(reply(r#"{"id":"a","ok":true,"last":true}"#).unwrap().is_last);
        for invalid in ["", "null", "[]", "hello", r#"{"id":"a"}"#, r#"{"ok":true}"#, r#"{"id":"b","ok":true}"#] {
            assert!(reply(invalid).is_err(), "{invalid}");
        }
    }

    #[test]
    fn a_failure_has_the_fields_of_a_result_file() {
        let failed =
            r#"{"id":"a","ok":false,"message":"bank busy","error_type":"BankBusy","retry_in":"5m","kill":false}"#;
        assert!(reply(failed).unwrap().failure.is_some());
        assert!(reply(r#"{"id":"a","ok":false}"#).unwrap().failure.is_some());
        assert!(reply(r#"{"id":"a","ok":false,"mesage":"typo"}"#).unwrap_err().contains("mesage"));
        assert!(reply(r#"{"id":"a","ok":false,"retry_in":1,"retry_at":2}"#).unwrap_err().contains("retry_in"));
    }

    #[test]
    fn line_separators_in_a_job_are_escaped() {
        let json = Bytes::from("{\"a\":\"one\u{2028}two\u{2029}, … and — dashes\"}");
        assert_eq!(escape_separators(&json), "{\"a\":\"one\\u2028two\\u2029, … and — dashes\"}");
        let plain = Bytes::from("{\"a\":\"… —\"}");
        assert_eq!(escape_separators(&plain).as_ptr(), plain.as_ptr());
    }
}
