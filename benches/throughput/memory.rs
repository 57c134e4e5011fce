//! Peak memory by concurrency, and the growth of memory over many jobs.

use crate::bench::Bench;
use crate::contender::{Contender, Contest};
use crate::report::{Line, Section, Target};
use crate::throughput::PAYLOAD_BYTES;
use crate::{Result, server};

const MANY_AT_ONCE: usize = 1000;

pub(crate) fn measure(bench: &Bench) -> Result<Section> {
    let mut contenders = vec![Contender::Baseline];
    contenders.extend(bench.workers());
    let (mut lines, mut targets) = (Vec::new(), Vec::new());
    for contender in contenders {
        let (few, many) = (peak(bench, &contender, 4)?, peak(bench, &contender, MANY_AT_ONCE)?);
        let per_slot = many.saturating_sub(few) as f64 / MANY_AT_ONCE as f64 / 1024.0;
        let text = format!("{} at 4 at once, {} at {MANY_AT_ONCE}: {per_slot:.1} KiB per slot", mib(few), mib(many));
        lines.push(Line::new(contender.name(), text));
        if contender.name() == "worker" {
            let about = format!("memory per slot at {MANY_AT_ONCE} at once, KiB");
            targets.push(Target::at_most(about, 40.0, Some(per_slot)));
        }
    }
    Ok(Section::of_lines(lines, targets))
}

/// Returns the peak memory with all jobs running at once. Each job sleeps so long that the last job starts before any job ends.
fn peak(bench: &Bench, contender: &Contender, at_once: usize) -> Result<u64> {
    let handler = vec!["sleep".to_owned(), "6".to_owned()];
    let contest = Contest { handler, at_once, jobs: at_once, payload_bytes: PAYLOAD_BYTES };
    let sample = contender.run(bench, &contest)?;
    Ok(sample.peak_memory.unwrap_or_default())
}

/// The numbers of jobs that have run at the first and at the last measurement of the memory.
const FEW_JOBS: usize = 2000;
const MANY_JOBS: usize = 200_000;

pub(crate) fn measure_growth(bench: &Bench) -> Result<Section> {
    let (mut lines, mut targets) = (Vec::new(), Vec::new());
    for contender in bench.workers() {
        let (early, late) = growth(bench, &contender)?;
        let ratio = late as f64 / early as f64;
        let text = format!("{} after {FEW_JOBS} jobs, {} after {}", mib(early), mib(late), many_jobs(bench));
        lines.push(Line::new(contender.name(), text));
        if contender.name() == "worker" {
            targets.push(Target::at_most("memory after many jobs / after few".to_owned(), 1.05, Some(ratio)));
        }
    }
    Ok(Section::of_lines(lines, targets))
}

fn many_jobs(bench: &Bench) -> usize {
    bench.scaled(MANY_JOBS)
}

fn growth(bench: &Bench, contender: &Contender) -> Result<(u64, u64)> {
    let worker = contender.start(bench, 8, &["/bin/true".to_owned()], &[])?;
    let mut early = 0;
    // Enqueue in portions, so that the server never holds more than `FEW_JOBS` jobs, and the length of the queue does not affect
    // the run.
    for done in (0..many_jobs(bench)).step_by(FEW_JOBS) {
        bench.server.enqueue(FEW_JOBS, &server::payload(PAYLOAD_BYTES))?;
        bench.server.wait_until_done()?;
        if done == 0 {
            early = worker.process().memory_now()?;
        }
    }
    let late = worker.process().memory_now()?;
    worker.stop()?;
    Ok((early, late))
}

pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / 1024.0 / 1024.0)
}
