//! [`Starting`]: a process that has been started, until it connects.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::UnixListener;

use super::member::{Doing, End, Member, Stop};
use super::wire::Wire;
use super::{Busy, Pool};
use crate::dispatch::brake::Begin;
use crate::dispatch::outcome;
use crate::places::Place;

/// The path of a socket, which is removed with this: a process connects once.
pub(super) struct Socket(pub(super) PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        // The end of the directory removes what cannot be removed now.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A process that has been started, and is to connect. Dropped before, it is killed.
pub(in crate::dispatch) struct Starting {
    pub(super) pool: Arc<Pool>,
    pub(super) member: Arc<Member>,
    pub(super) listener: UnixListener,
    pub(super) _socket: Socket,
    pub(super) wire: Mutex<Option<Wire>>,
}

impl Starting {
    /// The process, which has connected.
    pub(in crate::dispatch) fn busy(self, place: Place) -> Option<Busy> {
        let wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(Busy { pool: Arc::clone(&self.pool), member: Arc::clone(&self.member), wire: Some(wire), _place: place })
    }
}

impl Starting {
    /// Ends the process, which has connected. Returns how long it took from its start until now.
    pub(in crate::dispatch) async fn end(self) -> Duration {
        let took = self.member.started.elapsed();
        drop(self.wire.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.member.stop(Stop::Retire);
        self.member.ended().await;
        took
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        // It has been taken if the process has a job.
        if self.wire.get_mut().is_ok_and(|wire| wire.is_some()) || self.member.work().doing == Doing::Starting {
            self.member.stop(Stop::Kill);
        }
    }
}

impl Begin for Starting {
    /// Waits until it connects.
    async fn begun(&self) -> io::Result<()> {
        if self.wire.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Ok(());
        }
        let limit = self.pool.settings.start_timeout;
        tokio::select! {
            biased;
            connected = self.listener.accept() => {
                *self.wire.lock().unwrap_or_else(PoisonError::into_inner) = Some(Wire::new(connected?.0));
                self.member.work().doing = Doing::Idle;
                Ok(())
            }
            end = self.member.ended() => Err(self.not_connected(&end)),
            () = tokio::time::sleep_until(self.member.started + limit) => {
                self.member.stop(Stop::Kill);
                self.member.ended().await;
                let limit = humantime::format_duration(limit);
                Err(StartError::of(format!("did not connect to ZIZQ_SOCKET within {limit}"), self.member.last_line()))
            }
        }
    }

    async fn overdue(&self) {
        std::future::pending::<()>().await;
    }
}

impl Starting {
    fn not_connected(&self, end: &End) -> io::Error {
        let what = match &end.status {
            // The brake tells by the error whether it may pass.
            Err(error) if end.never_ran => match error.raw_os_error() {
                Some(errno) => return io::Error::from_raw_os_error(errno),
                None => format!("could not be started: {error}"),
            },
            Err(error) => format!("ended before it connected to ZIZQ_SOCKET: {error}"),
            Ok((status, _)) => format!("{} before it connected to ZIZQ_SOCKET", outcome::in_words(*status)),
        };
        StartError::of(what, self.member.last_line())
    }
}

/// Why a process has not connected.
#[derive(Debug)]
pub(in crate::dispatch) struct StartError(String);

impl StartError {
    fn of(what: String, last_line: Option<String>) -> io::Error {
        let text = match last_line {
            Some(line) => format!("{what}: {line}"),
            None => what,
        };
        io::Error::other(Self(text))
    }
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StartError {}
