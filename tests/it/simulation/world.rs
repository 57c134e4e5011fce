//! [`World`]: the simulated servers and network, with their faults and records. `live` runs one seed: a phase with faults, and
//! then a calm phase. In the calm phase, all workers must end, and so must all jobs that can still end.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fastrand::Rng;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use zizq_worker::stream::StreamLimits;
use zizq_worker::{Backoff, WorkerConfig};

use super::bounds;
use super::checks::{Book, Run, Talk};
use super::draw::{chance, millis, one_of};
use super::life::Life;
use super::network::{MAX_LATENCY, Network};
use super::script::Script;
use super::server::{MAX_JOB_SIZE, Malformed, NewJob, PRIORITIES, Record, Server, Status, longest_backoff};
use super::trace::Trace;
use super::weather::{Answer, Call, Fault, KINDS, Weather};

/// The names of the queues.
const QUEUES: [&str; 3] = ["q0", "q1", "q2"];

/// The interval between checks in the calm phase.
const LOOK: Duration = Duration::from_millis(500);

/// A simulated world. Clones share it.
#[derive(Clone)]
pub struct World {
    /// The network between the workers and the servers.
    pub network: Network,
    /// The first server, with the host names `a` and `b`, and the second server, with the host name `c`.
    pub servers: [Server; 2],
    /// The faults injected into requests.
    pub weather: Weather,
    /// The record of runs and reports.
    pub book: Book,
    /// The trace that a failed test prints.
    pub trace: Trace,
    /// The start time of the world.
    pub start: Instant,
    calm: CancellationToken,
    workers: Arc<AtomicUsize>,
}

impl World {
    /// Returns a world without faults. The rates of faults can be set in `weather` and `network`.
    pub fn new(rng: &mut Rng, trace: Trace) -> Self {
        let book = Book::new(trace.clone());
        let kinds = KINDS.into_iter().filter(|_| rng.bool()).collect();
        let weather = Weather::new(rng.fork(), kinds, book.clone());
        let network = Network::new(rng.fork(), book.clone(), trace.clone());
        let servers = ["a", "c"].map(|name| {
            let server = Server::new(name, rng.fork(), weather.clone(), book.clone(), trace.clone());
            network.name(name, &server);
            server
        });
        network.name("b", &servers[0]);
        let (calm, workers) = (CancellationToken::new(), Arc::default());
        Self { network, servers, weather, book, trace, start: Instant::now(), calm, workers }
    }

    /// Returns an unused name for a worker.
    pub fn next_name(&self) -> String {
        format!("w{}", self.workers.fetch_add(1, Ordering::Relaxed))
    }

    /// Returns the server at a worker's configured url.
    fn server_of(&self, life: &Life) -> Server {
        self.network.server(life.config.url.host())
    }

    fn jobs(&self) -> impl Iterator<Item = (String, Record)> {
        self.servers.iter().flat_map(Server::jobs)
    }

    /// Reports whether any unfinished job can still end.
    fn is_open(&self) -> bool {
        self.servers.iter().any(Server::has_open)
    }
}

/// Runs one seed. Violations are recorded in the world's `book`.
pub async fn live(world: &World, mut rng: Rng) {
    let lasting = millis(&mut rng, 30_000..150_000);
    let mut acting = JoinSet::new();
    acting.spawn(put_in(world.clone(), rng.fork(), lasting));
    acting.spawn(make_trouble(world.clone(), rng.fork()));
    let mut lives = JoinSet::new();
    for _ in 0..rng.usize(1..4) {
        lives.spawn(employ(world.clone(), rng.fork()));
    }
    sleep(lasting).await;
    world.trace.note("world", format_args!("calm"));
    world.calm.cancel();
    acting.shutdown().await;
    world.weather.clear();
    world.network.calm();
    world.book.listen_anew();
    world.servers.iter().for_each(|server| {
        if !server.is_up() {
            server.come_up();
        }
    });
    let left: Vec<Life> = lives.join_all().await.into_iter().flatten().collect();
    calm(world, &mut rng, left).await;
}

/// Enqueues random jobs, either at random times or all at the start.
async fn put_in(world: World, mut rng: Rng, lasting: Duration) {
    let has_second = chance(&mut rng, 0.25);
    let mut times: Vec<Duration> = (0..rng.usize(90..160)).map(|_| lasting.mul_f64(rng.f64() * 0.9)).collect();
    if rng.bool() {
        // Enqueue all jobs at the start, so that there is a backlog.
        times.iter_mut().for_each(|time| *time = Duration::ZERO);
    }
    times.sort();
    for time in times {
        sleep_until(world.start + time).await;
        let server = usize::from(has_second && chance(&mut rng, 0.2));
        world.servers[server].enqueue(draw_job(&mut rng));
    }
}

fn draw_job(rng: &mut Rng) -> NewJob {
    let malformed = chance(rng, 0.03).then(|| one_of(rng, &[Malformed::Field, Malformed::TooLong]));
    NewJob {
        queue: one_of(rng, &QUEUES).to_owned(),
        priority: rng.u32(0..PRIORITIES),
        retry_limit: if malformed.is_some() { 1 } else { rng.u32(0..4) },
        malformed,
        script: Script::draw(rng),
    }
}

/// Changes the rates of faults, and restarts servers, at random times.
async fn make_trouble(world: World, mut rng: Rng) {
    loop {
        world.weather.set_level(one_of(&mut rng, &[0.0, 0.0, 0.05, 0.2, 0.5, 1.0]));
        world.network.set_trouble(one_of(&mut rng, &[0.0, 0.1, 0.3, 0.7]));
        sleep(millis(&mut rng, 1000..25_000)).await;
        if chance(&mut rng, 0.3) {
            let server = &world.servers[rng.usize(0..2)];
            world.book.fault("server restarted");
            server.go_down();
            world.network.cut_server(server);
            sleep(millis(&mut rng, 0..8000)).await;
            server.come_up();
        }
    }
}

fn draw_settings(rng: &mut Rng) -> WorkerConfig {
    let (threads, fibers) = (rng.usize(1..3), rng.usize(1..4));
    let concurrency = threads * fibers;
    let prefetch = one_of(rng, &[1, 2, concurrency, 2 * concurrency, 2 * concurrency, 8, 32]);
    let min_wait = Duration::from_millis(one_of(rng, &[100, 500, 1000]));
    let max_wait = Duration::from_secs(one_of(rng, &[2, 5, 30]));
    WorkerConfig {
        url: one_of(rng, &["http://a", "http://b"]).parse().unwrap(),
        queues: draw_queues(rng),
        threads: NonZeroUsize::new(threads).unwrap(),
        fibers: NonZeroUsize::new(fibers).unwrap(),
        prefetch: NonZeroUsize::new(prefetch).unwrap(),
        backoff: Backoff::try_new(min_wait, max_wait, 2.0).unwrap(),
        stream_limits: StreamLimits {
            idle_timeout: Duration::from_secs(one_of(rng, &[7, 10, 30])),
            max_job_size: MAX_JOB_SIZE,
        },
        shutdown_deadline: Duration::from_secs(one_of(rng, &[2, 10, 30])),
        ..WorkerConfig::default()
    }
}

fn draw_queues(rng: &mut Rng) -> Vec<String> {
    let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    match rng.u8(0..4) {
        0 => named(&[one_of(rng, &QUEUES)]),
        1 => named(&QUEUES[..2]),
        _ => Vec::new(),
    }
}

fn draw_bounds(rng: &mut Rng, config: &mut WorkerConfig) {
    match rng.u8(0..12) {
        0 => config.max_jobs = NonZeroU64::new(rng.u64(1..20)),
        1 => config.max_time = Some(millis(rng, 1000..40_000)),
        2 => config.exit_when_idle = Some(millis(rng, 500..5000)),
        _ => {}
    }
}

/// Runs one worker after another until the calm phase, and applies random actions to each. Returns the worker that is running
/// when the calm phase begins, if any.
async fn employ(world: World, mut rng: Rng) -> Option<Life> {
    loop {
        let mut config = draw_settings(&mut rng);
        draw_bounds(&mut rng, &mut config);
        let grace = millis(&mut rng, 0..2500);
        let mut life = Life::start(&world, config, grace);
        loop {
            let pause = millis(&mut rng, 500..40_000);
            tokio::select! {
                biased;
                () = world.calm.cancelled() => return Some(life),
                () = life.ended() => break,
                () = sleep(pause) => {}
            }
            match act(life, &mut rng).await {
                Some(same) => life = same,
                None => break,
            }
        }
        tokio::select! {
            biased;
            () = world.calm.cancelled() => return None,
            () = sleep(millis(&mut rng, 0..15_000)) => {}
        }
    }
}

/// Applies a random action to a worker: pause, resume, reload, stop, kill with or without a grace period, crash, or nothing.
/// Returns the worker unless it has crashed.
async fn act(mut life: Life, rng: &mut Rng) -> Option<Life> {
    match rng.u8(0..20) {
        0..4 if life.is_paused => life.resume(),
        0..4 => life.pause(),
        4..9 => life.reload(|config| reload(config, rng)),
        9..14 => life.stop(),
        14 | 15 => life.kill(),
        16 => life.force(),
        17 => {
            life.crash().await;
            return None;
        }
        _ => {}
    }
    Some(life)
}

fn reload(config: &mut WorkerConfig, rng: &mut Rng) {
    match rng.u8(0..4) {
        0 => config.queues = draw_queues(rng),
        1 => config.prefetch = NonZeroUsize::new(one_of(rng, &[1, 2, 4, 8, 32])).unwrap(),
        2 => config.url = one_of(rng, &["http://a", "http://b"]).parse().unwrap(),
        _ => config.url = one_of(rng, &["http://a", "http://b", "http://c"]).parse().unwrap(),
    }
}

/// Changes a worker's prefetch, or changes the host name in its url to the other name of the same server.
fn reload_in_place(config: &mut WorkerConfig, rng: &mut Rng) {
    match config.url.host() {
        "a" if rng.bool() => config.url = "http://b".parse().unwrap(),
        "b" if rng.bool() => config.url = "http://a".parse().unwrap(),
        _ => config.prefetch = NonZeroUsize::new(one_of(rng, &[2, 4, 8, 32])).unwrap(),
    }
}

/// Runs the calm phase, and checks that stopping workers end, pending outcomes are reported, and all jobs end.
async fn calm(world: &World, rng: &mut Rng, mut lives: Vec<Life>) {
    leave_with_a_cut(world, rng, &mut lives).await;
    let (ending, mut lives): (Vec<_>, Vec<_>) = lives.into_iter().partition(Life::is_ending);
    if rng.bool() {
        employ_the_healthy(world, &mut lives);
    }
    for mut life in ending {
        let bound = bounds::recovery(&life.config, &world.weather) + bounds::own_drain(&life, &held_by(world, &life));
        life.ends_within(bound, "drain").await;
    }
    if rng.bool() {
        hear_the_paused(world, &lives).await;
    }
    lives.iter_mut().filter(|life| life.is_paused).for_each(Life::resume);
    employ_the_healthy(world, &mut lives);
    let recovery = lives.iter().map(|life| bounds::recovery(&life.config, &world.weather)).max().unwrap_or_default();
    let recovered = Instant::now() + recovery;
    finish_all(world, rng, &mut lives, recovered).await;
    // Wait until requests that were in flight at the end of the faults have failed and been retried.
    sleep_until(recovered).await;
    // All jobs are finished, but a worker may still run a job that another worker has already finished.
    while lives.iter().any(|life| !life.running().is_empty()) {
        sleep(LOOK).await;
    }
    if chance(rng, 0.5) {
        fail_beside_stuck_failures(world, rng, &mut lives).await;
    }
    probe_each(world, &mut lives).await;
    for life in &mut lives {
        life.stop();
        life.ends_within(bounds::idle_drain(&life.config), "drain of an idle worker").await;
    }
    sleep(MAX_LATENCY * 4).await;
    for (id, _) in world.jobs().filter(|(_, record)| matches!(record.status, Status::InFlight(_))) {
        world.book.violation(format!("{id} is in flight though every worker has ended"));
    }
}

/// Drains or pauses some workers, and then cuts the connections of some workers. These cuts are the last random faults.
async fn leave_with_a_cut(world: &World, rng: &mut Rng, lives: &mut [Life]) {
    for life in lives.iter_mut() {
        match rng.u8(0..4) {
            0 if !life.is_ending() => life.stop(),
            1 | 2 if !life.is_ending() => life.pause(),
            _ => {}
        }
    }
    sleep(millis(rng, 0..4000)).await;
    for life in lives.iter() {
        if rng.bool() {
            world.network.cut_worker(&life.name);
        }
    }
}

fn held_by(world: &World, life: &Life) -> Vec<Record> {
    let held = world.servers.iter().flat_map(|server| server.held_by(&life.name));
    held.filter_map(|id| world.servers.iter().find_map(|server| server.job(&id))).collect()
}

/// Ensures that each server has an unpaused worker that takes from all queues and does not stop by itself.
fn employ_the_healthy(world: &World, lives: &mut Vec<Life>) {
    for url in ["http://a", "http://c"] {
        let is_healthy = |life: &Life| {
            let WorkerConfig { url: taken, queues, .. } = &life.config;
            *taken == url.parse().unwrap() && queues.is_empty() && !life.is_bounded() && !life.is_paused
        };
        if !lives.iter().any(is_healthy) {
            let four = NonZeroUsize::new(4).unwrap();
            let config = WorkerConfig {
                url: url.parse().unwrap(),
                fibers: four,
                prefetch: four.saturating_add(4),
                stream_limits: StreamLimits { max_job_size: MAX_JOB_SIZE, ..StreamLimits::default() },
                ..WorkerConfig::default()
            };
            lives.push(Life::start(world, config, Duration::ZERO));
        }
    }
}

/// Waits until the paused workers have reported their outcomes. Records a violation if this takes too long, because a paused
/// worker must still report, although it takes no new jobs.
async fn hear_the_paused(world: &World, lives: &[Life]) {
    for life in lives.iter().filter(|life| life.is_paused) {
        let running = life.running().iter().map(|run| run.lasts).max().unwrap_or_default();
        let bound = Instant::now() + bounds::recovery(&life.config, &world.weather) + running + bounds::SLACK;
        while let Some(withheld) = withheld_by(world, life) {
            if Instant::now() > bound {
                let text = format!("{} is paused, and does not report how {withheld} ended", life.name);
                return world.book.violation(text);
            }
            sleep(LOOK).await;
        }
    }
}

/// Returns the id of a job that is ready for redelivery although this worker still runs the job or has not reported its outcome.
/// Skips jobs of queues from which the worker does not take, and jobs with a report that was refused permanently.
fn withheld_by(world: &World, life: &Life) -> Option<String> {
    let server = world.server_of(life);
    let is_withheld = |run: &&Run| {
        let waits = server.job(&run.id).is_some_and(|record| {
            let Record { job, status, attempts, .. } = record;
            let fits = life.config.queues.is_empty() || life.config.queues.contains(&job.queue);
            status == Status::Ready && attempts == run.attempts && fits
        });
        waits && !world.book.is_exempt(&life.name, &run.id)
    };
    let here = [world.book.untold_by(&life.name), life.running()].concat();
    here.iter().find(is_withheld).map(|run| run.id.clone())
}

/// Waits until all jobs are finished. While waiting, reloads workers at random, and checks that no worker idles or withholds
/// reports.
async fn finish_all(world: &World, rng: &mut Rng, lives: &mut [Life], recovered: Instant) {
    let bound = recovered + bounds::work(&world.servers.iter().flat_map(Server::open_records).collect::<Vec<_>>());
    let mut idle_since: Vec<(usize, Instant)> = lives.iter().map(|_| (0, recovered)).collect();
    while world.is_open() {
        if Instant::now() > bound {
            let open: Vec<String> = world.servers.iter().flat_map(Server::open_jobs).collect();
            return world.book.violation(format!("not over in time: {open:?}"));
        }
        if chance(rng, 0.03) {
            let at = rng.usize(0..lives.len());
            lives[at].reload(|config| reload_in_place(config, rng));
        }
        sleep(LOOK).await;
        for (life, idle) in lives.iter().zip(&mut idle_since) {
            check_that_it_works(world, life, idle);
            check_that_it_reports(world, life);
        }
    }
}

/// Checks that a worker with free capacity starts a job within a few round trips if jobs are ready.
fn check_that_it_works(world: &World, life: &Life, (progress, since): &mut (usize, Instant)) {
    let now = Instant::now();
    let concurrency = life.config.threads.get() * life.config.fibers.get();
    let wanted = concurrency.min(life.config.prefetch.get());
    let (running, progress_now) = world.book.progress_of(&life.name);
    let is_busy = running >= wanted || progress_now != *progress;
    if is_busy || life.is_ending() || !world.server_of(life).has_ready(&life.config.queues) {
        (*progress, *since) = (progress_now, now.max(*since));
    } else if now > *since + MAX_LATENCY * 8 + bounds::SLACK {
        let name = &life.name;
        world.book.violation(format!("{name} has {running} runs of {wanted}, though jobs have been ready for a while"));
    }
}

/// Checks that a worker reports its outcomes soon after a server has answered the worker again. The time limit is the first
/// backoff wait plus a round trip. It is counted from the worker's latest traffic or from the end of the last `Retry-After`,
/// whichever is later.
fn check_that_it_reports(world: &World, life: &Life) {
    let Talk { under_way, silent_since, heard, reported } = world.book.talk_of(&life.name);
    let (Some(heard), Some(silent_since), 0) = (heard, silent_since, under_way) else { return };
    let from = [Some(heard), Some(silent_since), reported, world.weather.retry_after()].into_iter().flatten().max();
    let allowance = bounds::first_wait(&life.config) + MAX_LATENCY * 2 + bounds::SLACK;
    let due = from.unwrap_or(heard) + allowance;
    // If `prefetch` jobs are waiting in a worker, the worker stops reading its stream, so it may not know of a redelivery. The
    // server may still send a redelivery to this worker, because some of the waiting jobs may already be finished on the server.
    let reads = world.book.waiting_in(&life.name) < life.config.prefetch.get();
    if Instant::now() <= due || !reads {
        return;
    }
    let server = world.server_of(life);
    let held = server.held_by(&life.name);
    let is_due = |run: &&Run| {
        run.ended.is_some_and(|(since, _)| since < heard)
            && held.contains(&run.id)
            && server.job(&run.id).is_some_and(|job| {
                let is_held = job.delivered.is_some_and(|delivered| delivered + allowance < Instant::now());
                job.attempts == run.attempts && is_held
            })
            && !world.book.is_exempt(&life.name, &run.id)
            && !world.book.is_running(&life.name, &run.id)
    };
    if let Some(run) = world.book.untold_by(&life.name).iter().find(is_due) {
        let (name, id) = (&life.name, &run.id);
        world.book.violation(format!("{name} has had a proper answer, but does not report how {id} ended"));
    }
}

/// The number of failure reports that a worker sends concurrently.
const FAILURES_AT_ONCE: usize = 8;

/// Makes the server refuse as many failure reports as one worker sends concurrently, and checks that the worker still
/// reports another failure.
async fn fail_beside_stuck_failures(world: &World, rng: &mut Rng, lives: &mut [Life]) {
    let has_room = |life: &&mut Life| life.config.prefetch.get() > FAILURES_AT_ONCE && !life.is_bounded();
    let able: Vec<String> = lives.iter_mut().filter(has_room).map(|life| life.name.clone()).collect();
    let Some(name) = rng.choice(&able) else { return };
    let (chosen, mut others): (Vec<_>, Vec<_>) = lives.iter_mut().partition(|life| life.name == *name);
    others.iter_mut().for_each(|life| life.pause());
    sleep(MAX_LATENCY * 4).await;
    let (server, config) = (world.server_of(chosen[0]), &chosen[0].config);
    let queue = config.queues.first().map_or(QUEUES[0], String::as_str);
    let fail = || {
        let (script, queue) = (Script::bad_then_good(), queue.to_owned());
        server.enqueue(NewJob { queue, priority: 0, retry_limit: 3, malformed: None, script })
    };
    let has_failed = |id: &String| server.job(id).is_none_or(|job| job.attempts > 0);
    let stuck: Vec<String> = (0..FAILURES_AT_ONCE).map(|_| fail()).collect();
    let refusal = Fault::Instead(Answer::of(503));
    stuck.iter().for_each(|id| world.weather.lay_for(id, Call::Failure, refusal));
    // Wait until each of the stuck reports has been refused at least once.
    sleep(bounds::runs(&server.open_records()) + MAX_LATENCY * 8 + bounds::SLACK).await;
    let other = fail();
    sleep(MAX_LATENCY * 8 + bounds::SLACK).await;
    if !has_failed(&other) {
        world.book.violation(format!("{name} does not report how {other} ended beside failures that are refused"));
    }
    world.weather.clear();
    // Other calls succeeded during the refusals, so the worker detects no recovery now. It therefore does not retry all stuck
    // reports at once, but one by one.
    let turns = u32::try_from(FAILURES_AT_ONCE + 2).unwrap();
    sleep((bounds::first_wait(config) + MAX_LATENCY * 2) * turns + bounds::SLACK).await;
    if let Some(id) = stuck.iter().find(|id| !has_failed(id)) {
        world.book.violation(format!("{name} does not report how {id} ended after the refusals"));
    }
    sleep(longest_backoff(1) + MAX_LATENCY * 8 + bounds::SLACK).await;
    others.iter_mut().for_each(|life| life.resume());
}

/// Enqueues jobs for each worker in turn while all other workers are paused, and checks that the worker finishes the jobs within
/// a time limit. A worker that has leaked part of its prefetch would be too slow.
async fn probe_each(world: &World, lives: &mut [Life]) {
    const LASTS: Duration = Duration::from_millis(100);
    for at in 0..lives.len() {
        lives.iter_mut().enumerate().filter(|(other, _)| *other != at).for_each(|(_, life)| life.pause());
        sleep(MAX_LATENCY * 4).await;
        let (server, config) = (world.server_of(&lives[at]), &lives[at].config);
        let count = if lives[at].is_bounded() { 0 } else { 2 * config.prefetch.get() };
        let queue = config.queues.first().map_or(QUEUES[0], String::as_str).to_owned();
        // If the server refuses a job's report permanently, the job becomes ready again when its stream closes. The worker may
        // therefore run unfinished jobs other than the probes.
        let others: Vec<Record> = server.open_jobs().iter().filter_map(|id| server.job(id)).collect();
        let probes: Vec<String> = (0..count)
            .map(|_| {
                let (script, queue) = (Script::good(100), queue.clone());
                server.enqueue(NewJob { queue, priority: 0, retry_limit: 0, malformed: None, script })
            })
            .collect();
        let bound = Instant::now() + bounds::probe(config, count, LASTS) + bounds::runs(&others);
        let is_open = |id: &String| server.job(id).is_some_and(|probe| probe.status != Status::Completed);
        while probes.iter().any(is_open) {
            if Instant::now() > bound {
                return world.book.violation(format!("{} does not run the jobs that only it can take", lives[at].name));
            }
            sleep(LASTS).await;
        }
        lives.iter_mut().filter(|life| life.is_paused).for_each(Life::resume);
    }
}

/// Runs `living` until it ends, or until the first violation. Records a violation if `living` takes longer than an hour of virtual
/// time.
pub async fn until_violated(world: &World, living: impl Future<Output = ()>) {
    tokio::select! {
        biased;
        () = world.book.violated() => {}
        ended = timeout(Duration::from_secs(3600), living) => if ended.is_err() {
            world.book.violation("the world has not ended within an hour".to_owned());
        }
    }
}
