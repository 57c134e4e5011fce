//! The daemon as a whole: the real binary, real processes, real sockets. One file for each promise.

#![expect(
    unreachable_pub,
    clippy::disallowed_methods,
    reason = "tests are no library, and start processes, sleep and read the environment"
)]

mod support;

mod dispatch;
mod protocol;
