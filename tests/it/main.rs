//! The daemon as a whole: the real binary, real processes, real sockets. One file for each promise.

#![expect(
    unreachable_pub,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests are no library: they start processes, wait, read the environment, and panic when they fail"
)]

mod support;

mod dispatch;
mod embedded;
mod library;
mod lifecycle;
mod official_client;
mod producer;
mod protocol;
mod real_server;
mod reports;
