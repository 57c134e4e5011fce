//! The time from enqueue to the handler's first instruction, on an idle worker, compared with a bare spawn.

use std::thread::sleep;
use std::time::Duration;

use crate::bench::Bench;
use crate::contender::Contender;
use crate::report::{Line, Section, Target};
use crate::sample::{millis, percentile, sorted};
use crate::stamp::{Stamps, now};
use crate::throughput::PAYLOAD_BYTES;
use crate::{Result, bare, server};

const JOBS: usize = 200;

/// The pause before each job. It is long enough for all processes to become idle again.
const GAP: Duration = Duration::from_millis(20);

pub(crate) fn measure(bench: &Bench) -> Result<Section> {
    let stamps = Stamps::listen(bench.dir())?;
    let mut contenders = vec![Contender::Bare, Contender::Baseline];
    contenders.extend(bench.workers());
    let mut times = vec![Vec::new(); contenders.len()];
    for _ in 0..bench.plan.rounds {
        for (contender, times) in contenders.iter().zip(&mut times) {
            times.extend(one_round(bench, contender, &stamps)?);
        }
    }
    let times: Vec<Vec<f64>> = times.into_iter().map(sorted).collect();
    let lines = contenders.iter().zip(&times).map(|(contender, times)| line(contender, times));
    let over_bare = percentile(&times[2], 0.5) - percentile(&times[0], 0.5);
    let target = Target::at_most("latency, p50, over the bare spawn, ms".to_owned(), 1.0, Some(over_bare));
    Ok(Section::of_lines(lines.collect(), vec![target]))
}

fn line(contender: &Contender, times: &[f64]) -> Line {
    let at = |part| format!("{:.2} ms", percentile(times, part));
    Line::new(contender.name(), format!("p50 {}, p99 {}, of {}", at(0.5), at(0.99), times.len()))
}

fn one_round(bench: &Bench, contender: &Contender, stamps: &Stamps) -> Result<Vec<f64>> {
    let (jobs, payload) = (bench.scaled(JOBS), server::payload(PAYLOAD_BYTES));
    let handler = stamps.handler(&bench.exe);
    if *contender == Contender::Bare {
        let words: Vec<&str> = handler.iter().map(String::as_str).collect();
        return (0..jobs).map(|_| timed(stamps, || bare::one(&payload, &words))).collect();
    }
    let worker = contender.start(bench, 4, &handler, &[])?;
    // Do not time the first job, because it also opens the connections.
    bench.server.enqueue_one(&payload)?;
    stamps.receive()?;
    let times = (0..jobs).map(|_| timed(stamps, || bench.server.enqueue_one(&payload))).collect();
    bench.server.wait_until_done()?;
    worker.stop()?;
    times
}

fn timed(stamps: &Stamps, begin: impl FnOnce() -> Result<()>) -> Result<f64> {
    sleep(GAP);
    let begun = now();
    begin()?;
    Ok(millis(stamps.receive()?.saturating_sub(begun)))
}
