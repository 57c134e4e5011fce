//! An in-memory Zizq server, for `--embedded` and for tests.
//!
//! The server implements the part of the HTTP API that a worker, its tests and its tools need: the take stream with
//! prefetch and heartbeats, reports by job id, retries with backoff, and lookups. In this part, the server behaves like a
//! real server of version [`PROTOCOL_VERSION`]. Nothing is written to disk.
//!
//! The jobs are in a [`Store`], which outlives the [`EmbeddedServer`]. A test restarts a server by stopping it and
//! binding a new one to the same store.
//!
//! - [`Store`]: a lock, a clock and wake-up signals around `jobs`, which is the pure state machine with its
//!   `ready` queue and its `lease`s.
//! - `api`: one function per `endpoint`. The function parses the request, which is an `order` with its `payload`,
//!   a `patch`, a `report`, or a `query` with its `page`. Then it returns an `answer` in a `format`.
//! - `take`: the take stream.
//!
//! Crons, batched jobs and jq filters need a real server. This server rejects them with 404, 403 and 400 respectively.

mod answer;
mod api;
mod endpoint;
mod format;
mod id;
mod job;
mod jobs;
mod lease;
mod options;
mod order;
mod page;
mod patch;
mod payload;
mod query;
mod ready;
mod report;
mod server;
mod start;
mod store;
mod take;

pub use job::JobStatus;
pub use options::{Options, ServerBackoff};
pub use server::EmbeddedServer;
pub(crate) use start::prepare;
pub use start::start;
pub use store::Store;

/// The version of the real server that this server imitates. `GET /version` returns this version.
pub const PROTOCOL_VERSION: &str = "0.6.1";
