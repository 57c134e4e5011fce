//! The simulation: whole workers with the real client and codec, against a model of the server, on virtual time and an
//! in-memory network. One seed determines all events, so the same seed gives the same trace, byte for byte.
//!
//! Time is Tokio's paused clock. The clock stands still while a task can run, and otherwise jumps to the next timer, so minutes
//! of virtual time cost milliseconds. The turmoil crate is not used, because it advances all hosts in ticks of a millisecond.
//!
//! `cargo test simulation` runs 200 seeds. `cargo test --release -- --ignored simulation` runs `ZIZQ_SIM_SEEDS` seeds, starting
//! with `ZIZQ_SIM_FIRST`. Both print the trace of the lowest seed that fails. If `ZIZQ_SIM_SEED` is set, the first command runs
//! the seed in this variable instead of the 200 seeds. If a seed finds a bug, add a test to `scenarios.rs` that calls `seed(…)`.

mod api;
mod bounds;
mod checks;
mod draw;
mod life;
mod network;
mod player;
mod scenarios;
mod script;
mod server;
mod trace;
mod weather;
mod world;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use tokio::runtime::Builder;

use trace::Trace;
use world::{World, live, until_violated};

/// The number of seeds in an ordinary test run.
const SEEDS: u64 = 200;

/// The result of one seed.
struct Lived {
    violations: Vec<String>,
    jobs: usize,
    runs: usize,
    requests: u64,
    faults: BTreeMap<&'static str, u64>,
    lasted: Duration,
    trace: Vec<String>,
}

/// Runs a future on Tokio's paused clock. Seeds the thread's random generator, because the worker draws from this generator.
fn in_virtual_time<T>(seed: u64, living: impl Future<Output = T>) -> T {
    fastrand::seed(seed);
    Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(living)
}

/// Runs one seed. Records a trace only if `is_traced`.
fn run(seed: u64, is_traced: bool) -> Lived {
    in_virtual_time(seed, async {
        let trace = if is_traced { Trace::on() } else { Trace::off() };
        let _listening = trace.listen();
        let mut rng = Rng::with_seed(seed);
        let world = World::new(&mut rng, trace.clone());
        until_violated(&world, live(&world, rng)).await;
        let (jobs, runs, requests) = world.book.counts();
        Lived {
            violations: world.book.violations(),
            jobs,
            runs,
            requests,
            faults: world.book.faults(),
            lasted: world.start.elapsed(),
            trace: trace.lines(),
        }
    })
}

/// Panics with the trace if there are violations.
#[track_caller]
fn judge(trace: &[String], violations: &[String]) {
    assert!(violations.is_empty(), "{}\n{violations:#?}", trace.join("\n"));
}

/// Runs one seed, and panics with its trace if it fails.
#[track_caller]
fn seed(seed: u64) {
    println!("seed {seed}, alone: ZIZQ_SIM_SEED={seed} cargo test simulation::everything");
    let lived = run(seed, true);
    if number("ZIZQ_SIM_SEED").is_some() {
        println!("{}", lived.trace.join("\n"));
    }
    judge(&lived.trace, &lived.violations);
}

/// The combined results of many seeds.
#[derive(Default)]
struct Tally {
    failed: Vec<(u64, String)>,
    jobs: usize,
    runs: usize,
    requests: u64,
    faults: BTreeMap<&'static str, u64>,
    lasted: Duration,
}

impl Tally {
    fn add(&mut self, seed: u64, lived: Lived) {
        let Lived { violations, jobs, runs, requests, faults, lasted, trace: _ } = lived;
        self.failed.extend(violations.into_iter().next().map(|violation| (seed, violation)));
        self.jobs += jobs;
        self.runs += runs;
        self.requests += requests;
        self.lasted += lasted;
        faults.into_iter().for_each(|(name, count)| *self.faults.entry(name).or_default() += count);
    }
}

/// Runs `count` seeds, starting with `first`, on all cores.
fn run_all(first: u64, count: u64) -> Tally {
    let (next, tally) = (AtomicU64::new(first), Mutex::new(Tally::default()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        break;
                    }
                    let lived = run(seed, false);
                    tally.lock().unwrap().add(seed, lived);
                }
            });
        }
    });
    let mut tally = tally.into_inner().unwrap();
    tally.failed.sort();
    tally
}

fn report(tally: &Tally, seeds: u64, took: Duration) {
    let Tally { failed, jobs, runs, requests, faults, lasted } = tally;
    println!("{seeds} seeds in {took:.1?}: {:.1} seeds/s", seeds as f64 / took.as_secs_f64());
    println!("{jobs} jobs, {runs} runs, {requests} requests, {:.1} h of virtual time", lasted.as_secs_f64() / 3600.0);
    faults.iter().for_each(|(name, count)| println!("{count:>10} {name}"));
    println!("{} failed", failed.len());
    failed.iter().for_each(|(seed, violation)| println!("  seed {seed}: {violation}"));
}

/// Runs `count` seeds, starting with `first`. Panics with the trace of the lowest seed that fails.
fn check_all(first: u64, count: u64) {
    let began = Instant::now();
    let tally = run_all(first, count);
    report(&tally, count, began.elapsed());
    if let Some((first_failed, _)) = tally.failed.first() {
        seed(*first_failed);
        panic!("seed {first_failed} has failed, but not when it was traced");
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

#[test]
fn everything_that_can_end_does_after_the_faults() {
    match number("ZIZQ_SIM_SEED") {
        Some(only) => seed(only),
        None => check_all(0, SEEDS),
    }
}

#[test]
#[ignore = "takes as long as it is told to"]
fn many_seeds() {
    check_all(number("ZIZQ_SIM_FIRST").unwrap_or(SEEDS), number("ZIZQ_SIM_SEEDS").unwrap_or(3000));
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 0..5 {
        let [first, second] = [0, 1].map(|_| run(seed, true).trace);
        let differs = first.iter().zip(&second).position(|(one, other)| one != other);
        if let Some(at) = differs {
            panic!(
                "seed {seed}, line {at}:\n{}\nand then:\n{}",
                first[at.saturating_sub(5)..=at].join("\n"),
                second[at]
            );
        }
        assert_eq!(first.len(), second.len(), "seed {seed}");
    }
}
