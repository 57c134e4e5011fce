//! Building blocks for tests: servers, the daemon as a real process, and handlers as real scripts.

mod admin;
mod authority;
mod browser;
mod daemon;
mod hung;
mod lease;
mod proxy;
mod raw;
mod restartable;
mod seccomp;
mod server;
mod terminal;
mod warm;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

pub use admin::Admin;
pub use authority::{Authority, Identity};
pub use browser::Browser;
use serde_json::{Value, json};

pub use daemon::{Daemon, Finished, Running};
pub use hung::HungFileSystem;
pub use lease::Lease;
pub use proxy::{BodyFault, Call, Event, Fault, Gate, Proxy};
pub use raw::{RawRequest, RawServer};
pub use restartable::Restartable;
pub use seccomp::Refused;
pub use server::{Api, Server, runtime, unused_address};
pub use warm::{
    Warm, assert_dead, assert_none_failed, enqueue_many, handler as warm_handler, replace, wait_until_dead,
};

/// The time limit of each wait for an event, far longer than any event takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Polls `look` until it returns a value. Panics with `what` after [`PATIENCE`].
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

/// A script that appends the job's id to the file `started`, and runs until the test's directory has a file `go` or is deleted.
pub const UNTIL_GO: &str = "echo $ZIZQ_JOB_ID >> $DIR/started; until [ -e $DIR/go -o ! -d $DIR ]; do sleep 0.01; done";

/// Returns `count` identical jobs.
pub fn jobs(count: usize) -> Vec<Value> {
    vec![json!({"queue": "q", "type": "t", "payload": null}); count]
}

/// Reports whether a process is alive. A zombie does not count as alive.
pub fn is_alive(pid: &str) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.trim()).join("stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z") && !rest.starts_with(" X"))
}
