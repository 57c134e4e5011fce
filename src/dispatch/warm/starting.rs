//! [`Starting`]: a started process until it has connected and been given to a job or to the pool.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::time::Instant;
use tracing::warn;

use super::member::{End, Member, ProcessState, StopRequest};
use super::wire::Wire;
use super::{Idle, Pool};
use crate::dispatch::brake::Begin;
use crate::dispatch::outcome;

/// The time after a process's start at which a warning is logged if the process has not connected.
const SLOW_START: Duration = Duration::from_secs(5);

/// The path of a process's socket. Dropping this removes the socket file, because a process connects only once.
pub(super) struct Socket(pub(super) PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        // If this fails, the file is removed later with its directory.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A started process that has not connected yet, or whose connection has not been given to a job or the pool yet. Dropping this
/// kills the process, unless a job or the pool has the connection.
pub(in crate::dispatch) struct Starting {
    pub(super) pool: Arc<Pool>,
    pub(super) member: Arc<Member>,
    pub(super) listener: UnixListener,
    pub(super) _socket: Socket,
    pub(super) wire: OnceLock<Wire>,
}

impl Starting {
    /// Returns the connected process, or `None` if the process has not connected.
    pub(in crate::dispatch) fn connected(mut self) -> Option<Idle> {
        let wire = self.wire.take()?;
        Some(Idle { member: Arc::clone(&self.member), wire, since: Instant::now() })
    }

    /// Returns the time at which the process was started.
    pub(in crate::dispatch) fn started(&self) -> Instant {
        self.member.started
    }

    /// Ends the connected process. Returns the time from the start of the process to this call.
    pub(in crate::dispatch) async fn end(mut self) -> Duration {
        let took = self.member.started.elapsed();
        drop(self.wire.take());
        self.member.stop(StopRequest::Retire);
        self.member.ended().await;
        took
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        // The wire of a connected process is `None` once the process has been given to a job or the pool.
        if self.wire.get().is_some() || self.member.work().state == ProcessState::Starting {
            self.member.stop(StopRequest::Kill);
        }
    }
}

impl Begin for Starting {
    /// Waits until the process connects. Kills the process if it does not connect within `start_timeout`.
    async fn begun(&self) -> io::Result<()> {
        if self.wire.get().is_some() {
            return Ok(());
        }
        let limit = self.pool.settings.start_timeout;
        tokio::select! {
            biased;
            connected = self.listener.accept() => {
                let (stream, _) = connected?;
                self.wire.get_or_init(|| Wire::new(stream));
                self.member.work().state = ProcessState::Idle;
                Ok(())
            }
            end = self.member.ended() => Err(self.not_connected(&end)),
            never = self.warn_of_slow_start() => match never {},
            () = tokio::time::sleep_until(self.member.started + limit) => {
                self.member.stop(StopRequest::Kill);
                self.member.ended().await;
                let limit = humantime::format_duration(limit);
                let what = format!("did not connect to ZIZQ_SOCKET within {limit}");
                Err(StartError::of(what, &self.member))
            }
        }
    }

    async fn overdue(&self) {
        std::future::pending::<()>().await;
    }
}

impl Starting {
    /// Logs one warning if the process does not connect within [`SLOW_START`] of its start. Never returns.
    async fn warn_of_slow_start(&self) -> Infallible {
        let (due, limit) = (self.member.started + SLOW_START, self.pool.settings.start_timeout);
        // With a shorter start timeout, no warning is needed: the process is killed soon, and the failed start is logged.
        if due > Instant::now() && limit >= 2 * SLOW_START {
            tokio::time::sleep_until(due).await;
            let start_timeout = humantime::format_duration(limit).to_string();
            warn!(
                handler = self.pool.name,
                pid = self.member.pid,
                start_timeout,
                "handler process has not connected to ZIZQ_SOCKET yet, its jobs wait"
            );
        }
        std::future::pending().await
    }

    fn not_connected(&self, end: &End) -> io::Error {
        let what = match &end.status {
            // Return the bare errno, because the brake uses it to decide whether the error may be temporary.
            Err(error) if end.never_ran => match error.raw_os_error() {
                Some(errno) => return io::Error::from_raw_os_error(errno),
                None => format!("could not be started: {error}"),
            },
            Err(error) => format!("ended before it connected to ZIZQ_SOCKET: {error}"),
            Ok((status, _)) => format!("{} before it connected to ZIZQ_SOCKET", outcome::in_words(*status)),
        };
        StartError::of(what, &self.member)
    }
}

/// The reason why a process did not connect.
#[derive(Debug)]
pub(in crate::dispatch) struct StartError {
    text: String,
    /// The time at which the process was started.
    pub(in crate::dispatch) started: Instant,
}

impl StartError {
    fn of(what: String, member: &Member) -> io::Error {
        let text = match member.last_line() {
            Some(line) => format!("{what}: {line}"),
            None => what,
        };
        io::Error::other(Self { text, started: member.started })
    }
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for StartError {}
