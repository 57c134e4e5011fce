//! The daemon as a whole: the real binary, real processes, real sockets. One file for each promise.

#![expect(
    unreachable_pub,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests are no library: they start processes, wait, read the environment, and panic when they fail"
)]

mod support;

mod contract;
mod dashboard;
mod deploy;
mod dispatch;
mod embedded;
mod example;
mod faults;
mod generated;
mod groups;
mod handlers;
mod library;
mod lifecycle;
mod logs;
mod mistakes;
mod official_client;
mod once;
mod output;
mod producer;
mod protocol;
mod real_server;
mod reports;
mod result_file;
mod routes;
mod settings;
mod soak;
mod starts;
mod tls;
