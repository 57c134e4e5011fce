//! What the tests are made of: a server, the daemon as a real process, and handlers as real scripts.

mod daemon;
mod proxy;
mod raw;
mod server;

use std::time::{Duration, Instant};

pub use daemon::{Daemon, Finished, Running};
pub use proxy::{Call, Event, Fault, Proxy};
pub use raw::RawServer;
pub use server::{Api, Server, runtime, unused_address};

/// How long a test waits for something that must happen: far longer than it ever takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Looks until `look` finds something. Panics with `what` when it never does.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
