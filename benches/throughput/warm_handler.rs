//! The compiled handler for the `warm` part of the benchmark. It runs in warm mode and in spawn mode.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::{Result, stamp};

pub(crate) const ROLE: &str = "handler:warm";

/// The option to send the current time for each job. The next argument is the path of the socket that receives the times.
pub(crate) const STAMP: &str = "stamp";
/// The option to sleep for `A_WHILE` in each job.
pub(crate) const PAUSE: &str = "pause";

/// The duration of a job with `PAUSE`. It is longer than the time in which all processes start, so that all processes have a job
/// at the same time.
const A_WHILE: Duration = Duration::from_secs(4);

#[derive(Deserialize)]
struct Job {
    id: String,
    payload: Value,
}

/// Runs the jobs from the worker's socket one after another. In spawn mode, runs one job with the payload from stdin.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let Ok(socket) = std::env::var("ZIZQ_SOCKET") else {
        return handle(&serde_json::from_reader(std::io::stdin().lock())?, words);
    };
    let mut stream = UnixStream::connect(socket)?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while lines.read_line(&mut line)? > 0 {
        let job: Job = serde_json::from_str(&line)?;
        handle(&job.payload, words)?;
        stream.write_all(format!("{{\"id\":\"{}\",\"ok\":true}}\n", job.id).as_bytes())?;
        line.clear();
    }
    Ok(())
}

fn handle(payload: &Value, words: &[&str]) -> Result<()> {
    match words {
        [STAMP, socket] => stamp::send(socket, stamp::now())?,
        [PAUSE] => sleep(A_WHILE),
        _ => {}
    }
    std::hint::black_box(payload);
    Ok(())
}
