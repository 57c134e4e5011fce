//! Tests of the whole daemon. Most of them run the real binary with real processes and real sockets. Each file tests one promise
//! of the worker.

#![expect(
    unreachable_pub,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests are no library: they start processes, wait, read the environment, and panic when they fail"
)]

mod support;

mod admin;
mod alerts;
mod bounds;
mod check;
mod contract;
mod dashboard;
mod deadlines;
mod deploy;
mod dispatch;
mod docs;
mod embedded;
mod example;
mod faults;
mod formats;
mod generated;
mod groups;
mod handlers;
mod hung_starts;
mod library;
mod lifecycle;
mod liveness;
mod logs;
mod mistakes;
mod newborns;
mod official_client;
mod once;
mod orphans;
mod output;
mod page;
mod producer;
mod protocol;
mod quiet;
mod real_server;
mod reload;
mod reports;
mod result_file;
mod routes;
mod sandbox;
mod settings;
mod simulation;
mod soak;
mod starts;
mod stuck;
mod supervisor;
mod terminal;
mod tls;
mod version;
mod warm;
mod warm_faults;
mod warm_handlers;
mod warm_life;
mod warm_starts;
mod warm_stop;
