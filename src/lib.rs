//! Runs a command for each job of a [Zizq](https://zizq.io) queue server, and reports the outcome to the server.
//!
//! ```text
//! server ── GET /jobs/take ──▶ producer ──▶ dispatch queue ──▶ worker loop ──────▶ dispatcher ──▶ process ──▶ Outcome
//!                                                                                                              │
//! server ◀── POST /jobs/success (bulk) · /jobs/{id}/failure ◀── reporter ◀─────── ack queue (2 × prefetch) ◀───┘
//! ```
//!
//! Jobs flow in one direction. A worker loop runs one job at a time, and queues the job's outcome before it takes the next job.
//! A full ack queue blocks the loops. The server then stops sending jobs once `prefetch` jobs are unreported.
//!
//! | module | content |
//! | --- | --- |
//! | [`worker`] | the worker: producer, dispatch queue, worker loops |
//! | [`dispatch`] | the [`Dispatcher`] trait, which does the work of a job, and its implementation that runs commands |
//! | [`handler`] | the command for a job, and its settings |
//! | [`job`] | a job, an outcome, a failure |
//! | [`lifecycle`] | the phases of a stop, and signals |
//! | [`config`] | the settings, each from its flag, else its environment variable, else the file, else its default |
//! | [`client`] | the calls to the server's API |
//! | [`stream`] | the take stream and its limits |
//! | [`backoff`] | the waits between retries |
//! | [`daemon`] | a worker with signals, service manager, admin server and terminal |
//! | [`embedded`] | the in-memory server |
//!
//! `docs/architecture.md` has the map of all modules, and the path of a job through them.
//!
//! To do the work of a job without a process, implement [`Dispatcher`]:
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
pub mod client;
pub mod config;
pub mod daemon;
pub mod dispatch;
#[cfg(feature = "embedded")]
pub mod embedded;
mod fate;
pub mod job;
mod ledger;
pub mod lifecycle;
mod lock;
mod metrics;
mod places;
mod process;
pub mod stream;
mod supervisor;
mod watch;
pub mod worker;

// These modules are public only for the binary, its tests and its generated files. They are not part of the library's API.
#[doc(hidden)]
pub mod chain;
#[doc(hidden)]
pub mod check;
#[doc(hidden)]
pub mod cli;
#[doc(hidden)]
pub mod logging;
#[doc(hidden)]
pub mod version;

pub use backoff::Backoff;
pub use client::{Connector, ServerUrl, WorkerId};
pub use config::{Config, ConfigError, WorkerConfig, handler};
pub use dispatch::{Dispatcher, Ended, ExecDispatcher};
pub use handler::{Handler, Handlers};
pub use job::{Failure, Job, JobId, Outcome};
pub use lifecycle::{Lifecycle, Phase, Request, WorkerSignals};
pub use process::{Output, Program, ResourceUsage, Signal};
pub use worker::{Controls, Status, Summary, Unready, Worker, WorkerError};
