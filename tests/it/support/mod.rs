//! What the tests are made of: a server, the daemon as a real process, and handlers as real scripts.

mod authority;
mod daemon;
mod proxy;
mod raw;
mod recorder;
mod restartable;
mod server;
mod terminal;

use std::time::{Duration, Instant};

pub use authority::{Authority, Identity};
pub use daemon::{Daemon, Finished, Running};
pub use proxy::{BodyFault, Call, Event, Fault, Gate, Proxy};
pub use raw::RawServer;
pub use recorder::Recorder;
pub use restartable::Restartable;
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
