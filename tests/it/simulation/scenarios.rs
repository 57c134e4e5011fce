//! Tests in a simulated world: scripted scenarios, and seeds that once failed.

use std::num::{NonZeroU64, NonZeroUsize};
use std::time::Duration;

use fastrand::Rng;
use tokio::time::{Instant, sleep, sleep_until};
use zizq_worker::{Backoff, Summary, WorkerConfig};

use super::life::Life;
use super::network::MAX_LATENCY;
use super::script::{End, Script, Step};
use super::server::{NewJob, Record, Status};
use super::trace::Trace;
use super::weather::{Answer, Call, Fault};
use super::world::{World, until_violated};
use super::{in_virtual_time, judge, seed};

/// Plays a scenario in a world without random faults, and panics with the trace if there are violations.
#[track_caller]
fn scene(play: impl AsyncFnOnce(&World)) {
    let (trace, violations) = in_virtual_time(0, async {
        let trace = Trace::on();
        let _listening = trace.listen();
        let world = World::new(&mut Rng::with_seed(0), trace.clone());
        until_violated(&world, play(&world)).await;
        (trace.lines(), world.book.violations())
    });
    judge(&trace, &violations);
}

/// Returns settings with a concurrency of one, a prefetch of two, and backoff waits from 1 s to 30 s.
fn settings() -> WorkerConfig {
    WorkerConfig { url: "http://a".parse().unwrap(), ..WorkerConfig::default() }
}

fn wide(fibers: usize, prefetch: usize) -> WorkerConfig {
    let count = |count| NonZeroUsize::new(count).unwrap();
    WorkerConfig { fibers: count(fibers), prefetch: count(prefetch), ..settings() }
}

fn start(world: &World, config: WorkerConfig) -> Life {
    Life::start(world, config, Duration::ZERO)
}

impl World {
    /// Enqueues a job at the first server, and returns its id.
    fn put(&self, priority: u32, script: Script) -> String {
        let job = NewJob { queue: "q0".to_owned(), priority, retry_limit: 9, malformed: None, script };
        self.servers[0].enqueue(job)
    }

    fn put_all(&self, count: usize, script: &Script) -> Vec<String> {
        self.put_all_at(0, count, script)
    }

    fn put_all_at(&self, server: usize, count: usize, script: &Script) -> Vec<String> {
        let job = |script| NewJob { queue: "q0".to_owned(), priority: 1, retry_limit: 9, malformed: None, script };
        (0..count).map(|_| self.servers[server].enqueue(job(script.clone()))).collect()
    }

    fn job(&self, id: &str) -> Record {
        self.servers.iter().find_map(|server| server.job(id)).unwrap()
    }

    fn is_completed(&self, id: &str) -> bool {
        self.job(id).status == Status::Completed
    }

    fn has_failed(&self, id: &str) -> bool {
        self.job(id).attempts > 0
    }

    fn are_completed(&self, ids: &[String]) -> bool {
        ids.iter().all(|id| self.is_completed(id))
    }

    /// Waits until a condition holds. Records a violation if this takes longer than `seconds`.
    async fn within(&self, seconds: u64, what: &str, is_so: impl Fn() -> bool) {
        let due = Instant::now() + Duration::from_secs(seconds);
        while !is_so() {
            if Instant::now() > due {
                return self.book.violation(format!("not within {seconds} s: {what}"));
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn bad(ms: u64) -> Script {
    Script(vec![Step { ms, end: End::Bad }, Step { ms: 0, end: End::Good }])
}

/// Enqueues a job and waits until it runs. Then enqueues eight jobs with a more urgent priority, and cuts the worker's
/// connections. The server delivers the eight jobs before it redelivers the first job. Returns the first job's id.
async fn run_one_that_is_not_redelivered_soon(world: &World, life: &Life) -> String {
    let id = world.put(1, Script::good(5000));
    world.within(1, "its start", || !life.running().is_empty()).await;
    sleep(seconds(1)).await;
    for _ in 0..8 {
        world.put(0, Script::good(0));
    }
    world.network.cut_worker(&life.name);
    id
}

#[test]
fn a_bounded_run_ends_though_its_last_job_is_not_redelivered() {
    scene(async |world| {
        let mut life = start(world, WorkerConfig { max_jobs: NonZeroU64::new(1), ..settings() });
        run_one_that_is_not_redelivered_soon(world, &life).await;
        life.ends_within(seconds(60), "bounded run").await;
    });
}

#[test]
fn a_drain_does_not_wait_for_its_deadline_without_a_reason() {
    scene(async |world| {
        let mut life = start(world, WorkerConfig { shutdown_deadline: seconds(120), ..settings() });
        let id = world.put(1, Script::good(5000));
        world.within(1, "its start", || !life.running().is_empty()).await;
        life.stop();
        for _ in 0..8 {
            world.put(0, Script::good(0));
        }
        world.network.cut_worker(&life.name);
        life.ends_within(seconds(60), "drain").await;
        if let Some(Summary { killed: true, .. }) = life.summary {
            world.book.violation("the drain was cut short".to_owned());
        }
        start(world, settings());
        world.within(30, "the job's end", || world.is_completed(&id)).await;
    });
}

#[test]
fn failures_that_a_proxy_denies_cost_no_place() {
    scene(async |world| {
        world.weather.lay(Call::Failure, 2, Fault::Instead(Answer::page(404)));
        let ids = [world.put_all(2, &bad(0)), world.put_all(8, &Script::good(0))].concat();
        let _life = start(world, settings());
        world.within(20, "all jobs' ends", || world.are_completed(&ids)).await;
    });
}

#[test]
fn a_404_of_a_proxy_settles_nothing() {
    scene(async |world| {
        world.weather.lay(Call::Failure, 1, Fault::Instead(Answer::page(404)));
        world.weather.lay(Call::Look, 1, Fault::Instead(Answer::page(404)));
        let id = world.put(1, bad(0));
        let _life = start(world, settings());
        world.within(20, "the failure", || world.has_failed(&id)).await;
    });
}

#[test]
fn a_page_with_200_settles_no_success() {
    scene(async |world| {
        world.weather.lay(Call::Successes, 2, Fault::Instead(Answer::page(200)));
        let ids = world.put_all(6, &Script::good(0));
        let _life = start(world, settings());
        world.within(20, "all jobs' ends", || world.are_completed(&ids)).await;
    });
}

#[test]
fn a_page_with_200_settles_no_failure() {
    scene(async |world| {
        world.weather.lay(Call::Failure, 2, Fault::Instead(Answer::page(200)));
        let ids = world.put_all(6, &bad(0));
        let _life = start(world, settings());
        world.within(40, "all jobs' ends", || world.are_completed(&ids)).await;
    });
}

#[test]
fn refusals_that_pass_are_waited_for() {
    scene(async |world| {
        let refusal = Answer { retry_after: Some(2), ..Answer::of(429) };
        world.weather.lay(Call::Successes, 2, Fault::Instead(refusal));
        let ids = world.put_all(20, &Script::good(10));
        let mut life = start(world, WorkerConfig { exit_when_idle: Some(seconds(1)), ..settings() });
        life.ends_within(seconds(60), "bounded run").await;
        world.within(0, "all jobs' ends", || world.are_completed(&ids)).await;
    });
}

#[test]
fn a_retry_after_is_waited_for() {
    scene(async |world| {
        let refusal = Answer { retry_after: Some(20), ..Answer::of(429) };
        world.weather.lay(Call::Failure, 1, Fault::Instead(refusal));
        let id = world.put(1, bad(0));
        let _life = start(world, settings());
        sleep(seconds(19)).await;
        if world.has_failed(&id) {
            world.book.violation("the report came before its time".to_owned());
        }
        world.within(10, "the failure", || world.has_failed(&id)).await;
    });
}

#[test]
fn reports_that_are_refused_for_good_cost_no_place() {
    scene(async |world| {
        world.weather.lay(Call::Successes, 4, Fault::Instead(Answer::of(400)));
        world.put_all(20, &Script::good(10));
        let _life = start(world, settings());
        world.within(60, "the others' ends", || !world.servers[0].has_open()).await;
    });
}

#[test]
fn a_paused_worker_reports_though_its_stream_was_lost() {
    scene(async |world| {
        let mut life = start(world, settings());
        let id = world.put(0, Script::good(5000));
        world.within(1, "its start", || !life.running().is_empty()).await;
        life.pause();
        let other = world.put(1, Script::good(0));
        world.network.cut_worker(&life.name);
        world.within(15, "the report", || world.is_completed(&id)).await;
        if world.is_completed(&other) {
            world.book.violation("a paused worker took a job".to_owned());
        }
    });
}

#[test]
fn all_reports_leave_soon_after_a_recovery() {
    scene(async |world| {
        world.weather.lay(Call::Failure, 1000, Fault::Instead(Answer::of(503)));
        let ids = world.put_all(4, &bad(0));
        let life = start(world, wide(4, 8));
        sleep(seconds(20)).await;
        world.weather.clear();
        world.network.cut_worker(&life.name);
        // 3 s are enough for the first backoff wait of the stream plus the first backoff wait of the reports.
        world.within(3, "the reports", || ids.iter().all(|id| world.has_failed(id))).await;
    });
}

/// Reloads a worker while it runs a long job, and checks that the worker soon completes new jobs beside the long job.
#[track_caller]
fn reload_stalls_nothing(change: impl FnOnce(&mut WorkerConfig)) {
    scene(async |world| {
        let mut life = start(world, wide(4, 8));
        world.put(1, Script::good(40_000));
        world.within(1, "its start", || !life.running().is_empty()).await;
        life.reload(change);
        let ids = world.put_all(3, &Script::good(0));
        world.within(3, "the new jobs' ends", || world.are_completed(&ids)).await;
    });
}

#[test]
fn a_reload_of_prefetch_stalls_nothing() {
    reload_stalls_nothing(|config| config.prefetch = NonZeroUsize::new(6).unwrap());
}

#[test]
fn a_reload_of_queues_stalls_nothing() {
    reload_stalls_nothing(|config| config.queues = vec!["q0".to_owned()]);
}

#[test]
fn a_reload_of_the_url_stalls_nothing() {
    scene(async |world| {
        let mut life = start(world, wide(4, 8));
        world.put(1, Script::good(40_000));
        world.within(1, "its start", || !life.running().is_empty()).await;
        life.reload(|config| config.url = "http://c".parse().unwrap());
        let ids = world.put_all_at(1, 3, &Script::good(0));
        world.within(3, "the new jobs' ends", || world.are_completed(&ids)).await;
    });
}

#[test]
fn failures_that_wait_hold_up_no_other() {
    scene(async |world| {
        let stuck = world.put_all(8, &bad(0));
        let answer = Fault::Instead(Answer::of(503));
        stuck.iter().for_each(|id| world.weather.lay_for(id, Call::Failure, answer));
        let backoff = Backoff::try_new(seconds(5), seconds(30), 2.0).unwrap();
        let _life = start(world, WorkerConfig { backoff, ..wide(4, 32) });
        sleep(seconds(1)).await;
        let id = world.put(0, bad(0));
        world.within(2, "the ninth failure", || world.has_failed(&id)).await;
    });
}

#[test]
fn a_job_that_another_stream_brings_after_its_report_runs_once() {
    scene(async |world| {
        world.network.set_latency(Duration::ZERO);
        let mut life = start(world, wide(1, 4));
        world.put(0, Script::good(5000));
        world.within(1, "its start", || !life.running().is_empty()).await;
        world.network.set_latency(MAX_LATENCY / 2);
        life.reload(|config| config.url = "http://b".parse().unwrap());
        // The server loses the old stream shortly before the run's end, so that the redelivery over the new stream is still on
        // its way to the worker when the report reaches the server.
        sleep_until(life.running()[0].begun + Duration::from_millis(4980)).await;
        world.network.lose_at_server(world.servers[0].streams_of(&life.name)[0]);
        sleep(seconds(5)).await;
    });
}

#[test]
fn a_smaller_prefetch_forgets_no_outcome() {
    scene(async |world| {
        world.weather.lay(Call::Successes, 1000, Fault::Instead(Answer::of(503)));
        let ids = world.put_all(32, &Script::good(0));
        let mut life = start(world, wide(1, 32));
        world.within(5, "all runs", || world.book.untold_by(&life.name).len() == 32).await;
        life.reload(|config| config.prefetch = NonZeroUsize::MIN);
        world.network.cut_worker(&life.name);
        world.weather.clear();
        world.within(60, "all jobs' ends", || world.are_completed(&ids)).await;
    });
}

/// The number of the first connection that the first worker opens for a stream.
const FIRST_STREAM: u64 = 1;
/// The number of the first connection that the first worker opens for reports.
const FIRST_OF_REPORTS: u64 = 2;

#[test]
fn a_failure_waiting_for_a_connection_spares_later_attempts() {
    scene(async |world| {
        let snoozed = Step { ms: 2000, end: End::Snooze(100) };
        let id = world.put(0, Script(vec![snoozed, Step { ms: 30_000, end: End::Good }]));
        let slow = start(world, settings());
        world.within(1, "its start", || !slow.running().is_empty()).await;
        let _other = start(world, settings());
        sleep(seconds(1)).await;
        world.network.set_opening(Some(seconds(8)));
        world.network.cut_connection(FIRST_OF_REPORTS);
        world.within(2, "the first run's end", || !world.book.untold_by(&slow.name).is_empty()).await;
        sleep(MAX_LATENCY).await;
        world.network.cut_worker(&slow.name);
        world.within(5, "the second attempt", || world.has_failed(&id)).await;
        world.within(40, "the job's end", || world.is_completed(&id)).await;
    });
}

#[test]
fn a_failure_denied_after_the_redelivery_is_sent_again() {
    scene(async |world| {
        world.network.set_latency(seconds(3));
        let id = world.put(0, bad(9000));
        let life = start(world, settings());
        world.within(30, "the run's end", || !world.book.untold_by(&life.name).is_empty()).await;
        // The report is sent over a connection with a latency of 3 s, and reaches the server while no stream is open. The server
        // rejects the report, and the job is redelivered before the rejection reaches the worker.
        world.network.set_latency(Duration::ZERO);
        world.network.set_opening(Some(Duration::from_millis(2500)));
        world.network.cut_connection(FIRST_STREAM);
        world.within(15, "the failure", || world.has_failed(&id)).await;
    });
}

#[test]
fn a_retry_after_does_not_hide_the_recovery_that_follows() {
    seed(100_945);
}

#[test]
fn a_job_that_ends_in_a_drain_is_searched_for_at_once() {
    seed(304_054);
}

#[test]
fn a_job_redelivered_after_its_report_runs_once() {
    seed(202_698);
}

#[test]
fn a_report_is_remembered_while_another_stream_is_on_its_way() {
    seed(408_712);
}

#[test]
fn a_released_failure_leaves_once_looks_are_answered() {
    seed(51_287);
    seed(53_652);
    seed(72_347);
}

#[test]
fn a_later_attempt_ends_the_hold_of_the_stream_before() {
    seed(51_489);
    seed(52_278);
}
