//! The official client enqueues jobs for this worker and reads their results. It also works with the embedded server.

use std::time::Duration;

use futures_util::TryStreamExt;
use serde::{Deserialize, Serialize};
use serde_json::json;
use zizq::{BackoffConfig, Client, Job, JobKind, JobPatch, JobStatus, RetentionPatch, TakeStream, Worker, ZizqError};

use crate::support::{Api, Daemon, PATIENCE, Running, Server, runtime, unused_address};

#[derive(Serialize, Deserialize, JobKind)]
#[zizq(name = "charge_card", queue = "billing")]
struct ChargeCard {
    customer: u64,
    cents: u64,
}

/// A script that charges every customer except number 13, whose card is declined.
const CHARGE: &str = "payload=$(cat)
case $payload in
    *'\"customer\":13}'*) echo 'asking the bank' >&2; echo 'card declined' >&2; exit 3 ;;
esac
echo \"$payload\" >> $DIR/charged";

/// Returns a client with default settings, which speaks MessagePack.
fn client(server: &Api) -> Client {
    Client::builder().url(&server.url).build().unwrap()
}

#[test]
fn jobs_enqueued_singly_run_and_show_their_errors() {
    let server = Server::start();
    let client = client(&server);
    let enqueue = |customer, cents| runtime().block_on(client.enqueue(ChargeCard { customer, cents }).into_future());
    let good = enqueue(1, 4200).unwrap();
    let bad = enqueue(13, 100).unwrap();
    let daemon = Daemon::of(&server).args(["--queues", "billing"]).sh(CHARGE).start();
    server.wait_until_done(&good.id);
    server.wait_for_error(&bad.id, 1);

    let errors = runtime().block_on(client.list_errors(&bad.id).into_future()).unwrap().errors;
    assert_eq!(errors.len(), 1);
    assert_eq!(errors[0].attempt, 1);
    assert_eq!(errors[0].message, "handle.sh exited with status 3: card declined");
    assert_eq!(errors[0].error_type.as_deref(), Some("ExitStatus"));
    assert_eq!(errors[0].backtrace.as_deref(), Some("asking the bank\ncard declined\n"));
    assert!(errors[0].failed_at >= errors[0].dequeued_at);
    let gone = runtime().block_on(client.get_job(&good.id));
    assert!(matches!(gone, Err(ZizqError::Response { status: 404, .. })), "{gone:?}");
    daemon.sigterm();
    assert_eq!(daemon.assert_exit(0).read("charged"), "{\"cents\":4200,\"customer\":1}\n");
}

#[test]
fn jobs_enqueued_in_bulk_run_and_show_their_errors() {
    let server = Server::start();
    let client = client(&server);
    let mut bulk = client.enqueue_bulk();
    for customer in 1..=20 {
        bulk.push(client.enqueue(ChargeCard { customer, cents: 100 }));
    }
    let jobs = runtime().block_on(bulk.into_future()).unwrap();
    let daemon = Daemon::of(&server).threads(4).sh(CHARGE).start();
    for (job, customer) in jobs.iter().zip(1..) {
        match customer {
            13 => drop(server.wait_for_error(&job.id, 1)),
            _ => server.wait_until_done(&job.id),
        }
    }
    let error = runtime().block_on(client.get_error(&jobs[12].id, 1)).unwrap();
    assert_eq!(error.message, "handle.sh exited with status 3: card declined");
    let job = runtime().block_on(client.get_job(&jobs[12].id)).unwrap();
    assert_eq!(job.attempts, 1);
    daemon.sigterm();
    assert_eq!(daemon.assert_exit(0).read("charged").lines().count(), 19);
}

/// Defines two tests for each case: one against `zizq-worker --embedded`, and an ignored one against a real server at `ZIZQ_URL`.
macro_rules! cases {
    ($($case:ident)*) => {
        mod against_embedded {
            $(#[test] fn $case() {
                let (_daemon, server) = super::embedded();
                super::runtime().block_on(super::$case(&super::client(&server), &super::queue()));
            })*
        }
        mod real_server {
            $(#[test] #[ignore = "needs a Zizq server at ZIZQ_URL"] fn $case() {
                let url = std::env::var("ZIZQ_URL").expect("ZIZQ_URL names the server");
                let client = super::client(&super::Api::new(url.trim_end_matches('/')));
                super::runtime().block_on(super::$case(&client, &super::queue()));
            })*
        }
    };
}

cases! {
    jobs_are_enqueued_taken_and_reported
    jobs_are_listed_counted_patched_and_deleted
    a_patched_job_is_taken_as_it_is_now
    the_clients_own_worker_runs_jobs
}

/// Starts a worker with an embedded server. The worker takes from another queue, so it leaves the test's jobs alone.
fn embedded() -> (Running, Api) {
    let url = format!("http://{}", unused_address());
    let daemon = Daemon::at(&url).args(["--embedded", "--queues", "another"]).sh("true").start();
    daemon.wait_for_message("connected, listening for jobs");
    (daemon, Api::new(url))
}

/// Returns the name of a queue that no other test uses.
fn queue() -> String {
    format!("zizq-worker-test-{:x}", fastrand::u64(..))
}

async fn next(stream: &mut TakeStream) -> Job {
    let job = tokio::time::timeout(PATIENCE, stream.try_next()).await.expect("no job came");
    job.unwrap().expect("the stream has ended")
}

async fn enqueue(client: &Client, queue: &str, customer: u64) -> String {
    let builder = client.enqueue(ChargeCard { customer, cents: 100 }).queue(queue);
    builder.await.unwrap().id
}

fn status_of<T: std::fmt::Debug>(answer: Result<T, ZizqError>) -> Option<u16> {
    answer.unwrap_err().status()
}

async fn jobs_are_enqueued_taken_and_reported(client: &Client, queue: &str) {
    let first = enqueue(client, queue, 1).await;
    let mut bulk = client.enqueue_bulk();
    for customer in 2..=5 {
        bulk.push(client.enqueue(ChargeCard { customer, cents: 100 }).queue(queue));
    }
    let rest = bulk.await.unwrap();
    assert!(rest.iter().all(|job| job.status == JobStatus::Ready && job.payload.is_none()));

    let mut stream = client.take().queues([queue]).prefetch(5).await.unwrap();
    let mut taken = Vec::new();
    for customer in 1..=5 {
        let job = next(&mut stream).await;
        assert_eq!((job.status, job.job_type.as_str(), job.attempts), (JobStatus::InFlight, "charge_card", 0));
        assert_eq!(job.payload, Some(json!({"customer": customer, "cents": 100})));
        taken.push(job.id);
    }
    assert_eq!((&taken[0], &taken[4]), (&first, &rest[3].id));

    client.report_success(&taken[0]).await.unwrap();
    assert_eq!(status_of(client.report_success(&taken[0]).await), Some(404));
    // The server answers the repeated report with a body, which the client ignores.
    client.report_success_bulk(&taken[1..3]).await.unwrap();
    client.report_success_bulk(&taken[1..3]).await.unwrap();
    let failed = client.report_failure(&taken[3], "declined").error_type("Bank").backtrace("here\n");
    let failed = failed.retry_in(Duration::from_secs(3600)).await.unwrap();
    assert_eq!((failed.status, failed.attempts), (JobStatus::Scheduled, 1));
    let dead = client.report_failure(&taken[4], "stolen").kill().await.unwrap();
    assert_eq!((dead.status, dead.attempts), (JobStatus::Dead, 1));

    for id in &taken[..3] {
        assert_eq!(status_of(client.get_job(id).await), Some(404));
    }
    let errors = client.list_errors(&taken[3]).await.unwrap().errors;
    assert_eq!((errors.len(), errors[0].message.as_str(), errors[0].attempt), (1, "declined", 1));
    let error = client.get_error(&taken[3], 1).await.unwrap();
    assert_eq!((error.error_type.as_deref(), error.backtrace.as_deref()), (Some("Bank"), Some("here\n")));
    assert_eq!(status_of(client.get_error(&taken[3], 2).await), Some(404));
    assert_eq!(client.delete_all_jobs().queue([queue]).await.unwrap(), 2);
}

async fn jobs_are_listed_counted_patched_and_deleted(client: &Client, queue: &str) {
    let mut ids = Vec::new();
    for customer in 1..=5 {
        ids.push(enqueue(client, queue, customer).await);
    }
    assert!(client.list_queues().await.unwrap().contains(&queue.to_owned()));
    let page = client.list_jobs().queue([queue]).limit(2).await.unwrap();
    assert_eq!(page.jobs.iter().map(|job| job.id.clone()).collect::<Vec<_>>(), ids[..2]);
    let all: Vec<Job> = client.list_jobs().queue([queue]).limit(2).stream().try_collect().await.unwrap();
    assert_eq!(all.iter().map(|job| job.id.clone()).collect::<Vec<_>>(), ids);
    assert_eq!(all[2].payload, Some(json!({"customer": 3, "cents": 100})));
    assert_eq!(client.count_jobs().queue([queue]).await.unwrap(), 5);

    let backoff = BackoffConfig { exponent: 2.0, base_ms: 1500, jitter_ms: 0 };
    let patch = JobPatch::new().priority(3).retry_limit(1).backoff(backoff);
    let patch = patch.retention(RetentionPatch::new().completed_ms(60_000));
    let job = client.patch_job(&ids[0], patch).await.unwrap();
    assert_eq!((job.priority, job.retry_limit), (3, Some(1)));
    assert_eq!(job.backoff.unwrap().base_ms, 1500);
    assert_eq!(job.retention.unwrap().completed_ms, Some(60_000));
    let job = client.patch_job(&ids[0], JobPatch::new().clear_retry_limit().clear_backoff().clear_retention());
    let job = job.await.unwrap();
    assert_eq!((job.priority, job.retry_limit), (3, None));
    assert!(job.backoff.is_none() && job.retention.is_none());

    let later = JobPatch::new().ready_at(99_999_999_999_999);
    let patched = client.patch_all_jobs().queue([queue]).priority(4..).patch(later).await.unwrap();
    assert_eq!((patched, client.count_jobs().queue([queue]).status([JobStatus::Scheduled]).await.unwrap()), (4, 4));
    let now = client.patch_job(&ids[4], JobPatch::new().ready_now()).await.unwrap();
    assert_eq!(now.status, JobStatus::Ready);
    assert_eq!(status_of(client.patch_job("nope", JobPatch::new()).await), Some(404));
    let dead = client.patch_all_jobs().status([JobStatus::Dead]).patch(JobPatch::new()).await;
    assert_eq!(status_of(dead), Some(422));

    client.delete_job(&ids[0]).await.unwrap();
    assert_eq!(status_of(client.delete_job(&ids[0]).await), Some(404));
    assert_eq!(client.delete_all_jobs().queue([queue]).status([JobStatus::Scheduled]).await.unwrap(), 3);
    assert_eq!(client.delete_all_jobs().queue([queue]).await.unwrap(), 1);
}

async fn a_patched_job_is_taken_as_it_is_now(client: &Client, queue: &str) {
    let mut ids = Vec::new();
    for customer in 1..=3 {
        ids.push(enqueue(client, queue, customer).await);
    }
    let other = format!("{queue}-other");
    client.patch_job(&ids[2], JobPatch::new().priority(1)).await.unwrap();
    client.patch_job(&ids[0], JobPatch::new().move_to_queue(&other)).await.unwrap();
    let mut stream = client.take().queues([queue]).prefetch(3).await.unwrap();
    assert_eq!((next(&mut stream).await.id, next(&mut stream).await.id), (ids[2].clone(), ids[1].clone()));
    // When the stream closes, the patched job in flight returns to the queue that the patch has set.
    client.patch_job(&ids[1], JobPatch::new().move_to_queue(&other).priority(1)).await.unwrap();
    drop(stream);
    let mut stream = client.take().queues([&other]).prefetch(3).await.unwrap();
    let mut taken = [next(&mut stream).await, next(&mut stream).await].map(|job| job.id);
    taken.sort();
    assert_eq!(taken, ids[..2]);
    client.report_success_bulk(taken).await.unwrap();
    client.delete_all_jobs().queue([queue]).await.unwrap();
}

async fn the_clients_own_worker_runs_jobs(client: &Client, queue: &str) {
    let good = enqueue(client, queue, 1).await;
    let bad = enqueue(client, queue, 13).await;
    let (seen, mut reports) = tokio::sync::mpsc::unbounded_channel();
    let handler = move |job: Job| {
        let seen = seen.clone();
        async move {
            let is_declined = job.payload.as_ref().is_some_and(|payload| payload["customer"] == 13);
            seen.send(job.id).unwrap();
            if is_declined { Err(std::io::Error::other("declined")) } else { Ok(()) }
        }
    };
    let worker = Worker::builder().client(client.clone()).handler(handler).queues([queue]).build().unwrap();
    let both = async {
        let first = reports.recv().await.unwrap();
        [first, reports.recv().await.unwrap()]
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(worker.run(async { stopped.await.unwrap_or_default() }));
    let seen = tokio::time::timeout(PATIENCE, both).await.expect("the jobs were not run");
    assert_eq!(seen, [good.clone(), bad.clone()]);
    // The client's worker sends its outstanding reports before it ends.
    stop.send(()).unwrap();
    running.await.unwrap().unwrap();
    assert_eq!(status_of(client.get_job(&good).await), Some(404));
    assert_eq!(client.get_error(&bad, 1).await.unwrap().message, "declined");
    client.delete_job(&bad).await.unwrap();
}

#[test]
fn a_jq_filter_is_refused_as_needing_a_real_server() {
    let server = Server::start();
    let answer = runtime().block_on(client(&server).count_jobs().filter(".a").into_future());
    let Err(ZizqError::Response { status: 400, message }) = answer else { panic!("{answer:?}") };
    assert!(message.contains("jq needs a real server"), "{message}");
}
