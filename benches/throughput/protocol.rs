//! The cost of the protocol alone, measured with zizq-worker and a dispatcher that starts no process. Without processes, jobs
//! and reports travel in large batches, so the measured cost is a lower bound.

use tokio::signal::unix::{SignalKind, signal};
use zizq_worker::{Dispatcher, Ended, Job, Lifecycle, Outcome, Worker, WorkerConfig};

use crate::Result;
use crate::bench::Bench;
use crate::contender::{Contender, Contest};
use crate::report::{Row, Section, Target};
use crate::throughput::{PAYLOAD_BYTES, compete_among};

pub(crate) const ROLE: &str = "contender:protocol";

const AT_ONCE: [usize; 2] = [4, 8];

const CONTENDERS: [Contender; 2] = [Contender::Bare, Contender::Protocol];

const JOBS: usize = 4000;

struct DoesNothing;

impl Dispatcher for DoesNothing {
    async fn dispatch(&self, _job: &Job, _lifecycle: &Lifecycle) -> Ended {
        Outcome::Success.into()
    }
}

/// Runs the worker. `words` are the url, the queue, and the concurrency.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let [url, queue, at_once] = words else { return Err("not three words".into()) };
    let threads: std::num::NonZeroUsize = at_once.parse()?;
    let config = WorkerConfig {
        url: url.parse()?,
        queues: vec![(*queue).to_owned()],
        threads,
        prefetch: threads.saturating_add(threads.get()),
        ..WorkerConfig::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(work(Worker::new(config, DoesNothing)))
}

async fn work(worker: Worker<DoesNothing>) -> Result<()> {
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
        rows.extend(compete_among(bench, &CONTENDERS, &contest, "/bin/true")?);
    }
    let targets = rows.chunks(CONTENDERS.len()).filter_map(floor).collect();
    Ok(Section::new(rows, targets))
}

/// Returns a lower bound for a worker's own CPU time, relative to the bare loop. The bound is the sum of the own CPU times of the
/// bare loop and of the protocol alone, divided by the own CPU time of the bare loop.
fn floor(rows: &[Row]) -> Option<Target> {
    let [bare, protocol] = rows else { return None };
    let about = format!("(own CPU of the bare loop and of the protocol alone / bare loop), {} at once", bare.at_once);
    let ratio = protocol.ratio_to(bare, |sample| sample.own_cpu);
    Some(Target::figure(about, ratio.map(|ratio| 1.0 + ratio)))
}
