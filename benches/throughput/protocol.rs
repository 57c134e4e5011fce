//! The protocol alone: this worker with a dispatcher that starts nothing. What it costs per job, and what the bare loop does,
//! is the least that a worker can cost which takes its jobs from a server.

use tokio::signal::unix::{SignalKind, signal};
use zizq_worker::{Dispatcher, Ended, Job, Lifecycle, Outcome, Worker, WorkerConfig};

use crate::Result;
use crate::bench::Bench;
use crate::contender::{Contender, Contest};
use crate::report::{Row, Section, Target};
use crate::throughput::{PAYLOAD_BYTES, compete_among};

pub(crate) const ROLE: &str = "contender:protocol";

const AT_ONCE: [usize; 2] = [4, 8];

const JOBS: usize = 4000;

struct Nothing;

impl Dispatcher for Nothing {
    async fn dispatch(&self, _job: &Job, _lifecycle: &Lifecycle) -> Ended {
        Outcome::Success.into()
    }
}

/// Words: url, queue, and how many at once.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let [url, queue, at_once, ..] = words else { return Err("too few words".into()) };
    let threads: std::num::NonZeroUsize = at_once.parse()?;
    let config = WorkerConfig {
        url: url.parse()?,
        queues: vec![(*queue).to_owned()],
        threads,
        prefetch: threads.saturating_add(threads.get()),
        ..WorkerConfig::default()
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(work(Worker::new(config, Nothing)))
}

async fn work(worker: Worker<Nothing>) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let lifecycle = Lifecycle::new();
    let told_to_end = async {
        let _ = terminate.recv().await;
        lifecycle.stop();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = worker.run(&lifecycle) => drop(ended?),
        () = told_to_end => {}
    }
    Ok(())
}

pub(crate) fn measure(bench: &Bench) -> Result<Section> {
    let mut rows = Vec::new();
    for at_once in AT_ONCE {
        let handler = vec!["/bin/true".to_owned()];
        let contest = Contest { handler, at_once, jobs: bench.scaled(JOBS), payload_bytes: PAYLOAD_BYTES };
        rows.extend(compete_among(bench, &[Contender::Bare, Contender::Protocol], &contest, "/bin/true")?);
    }
    let targets = rows.chunks(2).map(floor).collect();
    Ok(Section::new(rows, targets))
}

/// The least that own CPU can be, over the bare loop's.
fn floor(rows: &[Row]) -> Target {
    let ratio = match rows {
        [bare, protocol] => protocol.ratio_to(bare, |sample| sample.own_cpu).map(|ratio| 1.0 + ratio),
        _ => None,
    };
    let at_once = rows.first().map_or(0, |row| row.at_once);
    Target::figure(format!("(own CPU of bare loop and protocol together / bare loop), {at_once} at once"), ratio)
}
