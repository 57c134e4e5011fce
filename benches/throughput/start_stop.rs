//! The time from the worker's start to the first job's first instruction, the time from SIGTERM to the exit, and the
//! size of the binary.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::bench::Bench;
use crate::contender::Contender;
use crate::memory::mib;
use crate::report::{Line, Section, Target};
use crate::sample::{Spread, millis};
use crate::stamp::{Stamps, now};
use crate::throughput::PAYLOAD_BYTES;
use crate::{Result, server};

const STARTS: usize = 20;

/// The pause before SIGTERM, so that the worker is idle when it gets the signal.
const REST: Duration = Duration::from_millis(100);

pub(crate) fn measure(bench: &Bench) -> Result<Section> {
    let (mut lines, mut targets) = (Vec::new(), Vec::new());
    for contender in bench.workers() {
        let (start, stop) = start_and_stop(bench, &contender)?;
        let bytes = size(&contender)?;
        let text = format!("start to first job {start:.1} ms, SIGTERM to exit {stop:.1} ms, binary {}", mib(bytes));
        lines.push(Line::new(contender.name(), text));
        if contender.name() == "worker" {
            targets.push(Target::at_most("start to first job, ms".to_owned(), 50.0, Some(start)));
            targets.push(Target::at_most("SIGTERM to exit, idle, ms".to_owned(), 50.0, Some(stop)));
            let size = bytes as f64 / 1024.0 / 1024.0;
            targets.push(Target::at_most("release binary, MiB".to_owned(), 6.0, Some(size)));
        }
    }
    Ok(Section::of_lines(lines, targets))
}

/// Returns the median start time and the median stop time, in milliseconds.
fn start_and_stop(bench: &Bench, contender: &Contender) -> Result<(f64, f64)> {
    let stamps = Stamps::listen(bench.dir())?;
    let (mut starts, mut stops) = (Vec::new(), Vec::new());
    for _ in 0..bench.scaled(STARTS) {
        let (start, stop) = once(bench, contender, &stamps)?;
        starts.push(start);
        stops.push(stop);
    }
    let median = |times| Spread::of(times).map_or(f64::NAN, |spread| spread.median);
    Ok((median(starts), median(stops)))
}

fn once(bench: &Bench, contender: &Contender, stamps: &Stamps) -> Result<(f64, f64)> {
    bench.server.enqueue_one(&server::payload(PAYLOAD_BYTES))?;
    let begun = now();
    let worker = contender.start(bench, 4, &stamps.handler(&bench.exe), &[])?;
    let started = millis(stamps.receive()?.saturating_sub(begun));
    bench.server.wait_until_done()?;
    sleep(REST);
    let asked = Instant::now();
    worker.stop()?;
    Ok((started, millis(asked.elapsed())))
}

fn size(contender: &Contender) -> Result<u64> {
    match contender {
        Contender::Worker { path, .. } => Ok(fs::metadata(path)?.len()),
        _ => Ok(0),
    }
}
