//! The official client enqueues, this worker works, and the official client reads what became of it.

use serde::{Deserialize, Serialize};
use zizq::{Client, Format, JobKind, ZizqError};

use crate::support::{Api, Daemon, Server, runtime};

#[derive(Serialize, Deserialize, JobKind)]
#[zizq(name = "charge_card", queue = "billing")]
struct ChargeCard {
    customer: u64,
    cents: u64,
}

/// Charges whoever can pay.
const CHARGE: &str = "payload=$(cat)
case $payload in
    *'\"customer\":13,'*) echo 'asking the bank' >&2; echo 'card declined' >&2; exit 3 ;;
esac
echo \"$payload\" >> $DIR/charged";

fn client(server: &Api) -> Client {
    Client::builder().url(&server.url).format(Format::Json).build().unwrap()
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
    assert_eq!(daemon.assert_exit(0).read("charged"), "{\"customer\":1,\"cents\":4200}\n");
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
