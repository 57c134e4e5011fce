//! Runs a command for each job of a [Zizq](https://zizq.io) queue server, and reports how it ended.
//!
//! ```text
//! server ── GET /jobs/take ──▶ producer ──▶ dispatch queue ──▶ worker loop t:f ──▶ dispatcher ──▶ process ──▶ Outcome
//!                                                                                                              │
//! server ◀── POST /jobs/success (bulk) · /jobs/{id}/failure ◀── ack processor ◀── ack queue (2 × prefetch) ◀───┘
//! ```
//!
//! One way, no way back: a loop runs one job at a time and hands its outcome on before it takes the next, so a full ack
//! queue holds back the loops, and they hold back the server.
//!
//! | room | what is in it |
//! | --- | --- |
//! | [`cli`] | what was typed: flags, variables, help |
//! | [`config`] | what was resolved: each setting from flag or variable, else file, else default |
//! | [`logging`] | the log |
//! | [`job`] | the vocabulary: a job, an outcome, a failure |
//! | [`client`] | the calls of the server's API |
//! | [`stream`] | the take stream: body bytes to lines to jobs |
//! | [`backoff`] | how long to wait between tries |
//! | [`lifecycle`] | how far the worker is on its way to a stop |
//! | [`worker`] | producer, dispatch queue, worker loops, and the order in which they end |
//! | [`handler`] | what is run for a job, and how |
//! | [`dispatch`] | a job to a process to an outcome |
//! | `process` | one child in its own process group |
//! | `watch` | a value that changes, and its waiters, woken in order |
//! | `ledger` | the jobs that are here, so that none runs twice |
//! | `fate` | the one decision about an outcome: send, ask, retry, park, settle or drop |
//! | `ack` | the reports |
//! | [`daemon`] | a worker with all that watches and steers it; `admin`: over HTTP; `supervisor`: the service manager |
//! | `metrics` | what is counted, for Prometheus |
//! | [`check`] | `--check`; [`version`]: which servers fit |
//! | [`embedded`] | the in-memory server |
//!
//! A worker for work that is not a process is a [`Dispatcher`] of your own:
//!
//! ```no_run
//! use zizq_worker::{Dispatcher, Ended, Failure, Job, Lifecycle, Outcome, Worker, WorkerConfig};
//!
//! struct Greeter;
//!
//! impl Dispatcher for Greeter {
//!     async fn dispatch(&self, job: &Job, _lifecycle: &Lifecycle) -> Ended {
//!         match std::str::from_utf8(&job.payload) {
//!             Ok(payload) => { println!("{}: {payload}", job.job_type); Outcome::Success.into() }
//!             Err(error) => Outcome::Failure(Failure::new("BadPayload", error.to_string())).into(),
//!         }
//!     }
//! }
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let worker = Worker::new(WorkerConfig::default(), Greeter);
//! let lifecycle = Lifecycle::new();
//! let handle = lifecycle.clone(); // `handle.stop()` or `handle.kill()`, from anywhere
//! # handle.stop();
//! let summary = worker.run(&lifecycle).await?;
//! println!("{} jobs done", summary.succeeded);
//! # Ok(()) }
//! ```

mod ack;
mod admin;
pub mod backoff;
pub mod chain;
pub mod check;
pub mod cli;
pub mod client;
pub mod config;
pub mod daemon;
pub mod dispatch;
#[cfg(feature = "embedded")]
pub mod embedded;
mod fate;
pub mod handler;
pub mod job;
mod ledger;
pub mod lifecycle;
pub mod logging;
mod metrics;
mod places;
mod process;
pub mod stream;
mod supervisor;
pub mod version;
mod watch;
pub mod worker;

pub use backoff::Backoff;
pub use client::{Connector, ServerUrl, WorkerId};
pub use config::{Config, ConfigError, WorkerConfig};
pub use dispatch::{Dispatcher, Ended, ExecDispatcher};
pub use handler::{Handler, Handlers};
pub use job::{Failure, Job, JobId, Outcome};
pub use lifecycle::{Lifecycle, Phase, Request, WorkerSignals};
pub use process::{Output, Program, ResourceUsage, Signal};
pub use worker::{Controls, Status, Summary, Unready, Worker, WorkerError};
