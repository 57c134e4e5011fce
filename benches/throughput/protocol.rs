//! The protocol: this worker with another dispatcher, in two ways. One starts nothing: jobs come and reports leave many at a
//! time then, and that is what the protocol costs at the least. The other does for each job what the bare loop does, in a
//! thread for each, and nothing of what the worker does beside it: no group, no environment, no limit, no result file. That is
//! what a worker costs which takes jobs one by one, as they end.

use tokio::signal::unix::{SignalKind, signal};
use zizq_worker::{Dispatcher, Ended, Failure, Job, Lifecycle, Outcome, Worker, WorkerConfig};

use crate::bench::Bench;
use crate::contender::{Contender, Contest};
use crate::report::{Row, Section, Target};
use crate::throughput::{PAYLOAD_BYTES, compete_among};
use crate::{Result, bare};

pub(crate) const ROLE: &str = "contender:protocol";

/// More threads than jobs at once: each job holds one, as in the bare loop, and the runtime has one over.
const THREADS_OVER: usize = 2;

const AT_ONCE: [usize; 2] = [4, 8];

const CONTENDERS: [Contender; 3] = [Contender::Bare, Contender::Protocol, Contender::BareOnProtocol];

const JOBS: usize = 4000;

/// What it does for a job is what the bare loop does, if it is given a handler.
struct Plain {
    handler: Vec<String>,
}

impl Dispatcher for Plain {
    async fn dispatch(&self, job: &Job, _lifecycle: &Lifecycle) -> Ended {
        if self.handler.is_empty() {
            return Outcome::Success.into();
        }
        let handler: Vec<&str> = self.handler.iter().map(String::as_str).collect();
        // It blocks the thread, as it does there.
        match bare::one(&String::from_utf8_lossy(&job.payload), &handler) {
            Ok(()) => Outcome::Success.into(),
            Err(error) => Outcome::Failure(Failure::new("Bench", error.to_string())).into(),
        }
    }
}

/// Words: url, queue, how many at once, and the handler, if it is to be run.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let [url, queue, at_once, handler @ ..] = words else { return Err("too few words".into()) };
    let threads: std::num::NonZeroUsize = at_once.parse()?;
    let config = WorkerConfig {
        url: url.parse()?,
        queues: vec![(*queue).to_owned()],
        threads,
        prefetch: threads.saturating_add(threads.get()),
        ..WorkerConfig::default()
    };
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if !handler.is_empty() {
        runtime.worker_threads(threads.get() + THREADS_OVER);
    }
    let handler = handler.iter().map(|word| (*word).to_owned()).collect();
    runtime.enable_all().build()?.block_on(work(Worker::new(config, Plain { handler })))
}

async fn work(worker: Worker<Plain>) -> Result<()> {
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
    let targets = rows.chunks(CONTENDERS.len()).flat_map(floors).collect();
    Ok(Section::new(rows, targets))
}

/// What own CPU is at the least, over the bare loop's.
fn floors(rows: &[Row]) -> Vec<Target> {
    let [bare, protocol, both] = rows else { return Vec::new() };
    let own = |row: &Row| row.ratio_to(bare, |sample| sample.own_cpu);
    let about = |what: &str| format!("({what}), {} at once", bare.at_once);
    vec![
        Target::figure(
            about("own CPU of the bare loop and of the protocol alone / bare loop"),
            own(protocol).map(|ratio| 1.0 + ratio),
        ),
        Target::figure(about("own CPU of the bare loop on the protocol / bare loop"), own(both)),
    ]
}
