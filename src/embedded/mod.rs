//! A Zizq server in memory, for `--embedded` and for tests.
//!
//! The server implements the part of the HTTP API that a worker, its tests and its tools need, as
//! a real server of version [`PROTOCOL_VERSION`] does: the take stream with prefetch and heartbeats,
//! reports by job id, retries with backoff, and the look-ups. Nothing is kept on disk.
//!
//! The jobs live in a [`Store`], which outlives the [`EmbeddedServer`]: stopping the server and
//! binding a new one to the same store is a restart.
//!
//! - [`Store`]: the lock, the clock and the wake-ups around `state`, which is the pure state
//!   machine with its `ready` queue and its `lease`s;
//! - `api`: one function per `route`, which parses an `order` with its `payload`, a `patch`, a `report`
//!   or a `query` and its `page`, and returns an `answer` in a `format`;
//! - `take`: the stream.
//!
//! Crons, batched jobs and jq filters need a real server. This one answers 404, 403 and 400 to them.

mod answer;
mod api;
mod format;
mod id;
mod job;
mod lease;
mod options;
mod order;
mod page;
mod patch;
mod payload;
mod query;
mod ready;
mod report;
mod route;
mod server;
mod start;
mod state;
mod store;
mod take;

pub use job::Status;
pub use options::{Backoff, Options};
pub use server::EmbeddedServer;
pub(crate) use start::prepare;
pub use start::start;
pub use store::Store;

/// The version of the real server that this one reproduces, and the answer to `GET /version`.
pub const PROTOCOL_VERSION: &str = "0.6.1";
