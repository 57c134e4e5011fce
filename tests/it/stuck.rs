//! Reports that are delayed by odd proxies, by silent or stale streams, or by replaced certificates. Each report is sent in the
//! end.

use std::fs;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    Authority, Call, Daemon, Fault, Proxy, RawRequest, RawServer, Running, Server, UNTIL_GO, eventually,
};

const QUICK: [&str; 4] = ["--retry-min-wait", "10ms", "--retry-max-wait", "50ms"];

/// The JSON body of a 404 from a gateway that has no backend.
const GATEWAY: &str = r#"{"timestamp":"2026-01-01T00:00:00Z","status":404,"error":"Not Found","path":"/jobs"}"#;

fn job(job_type: &str) -> Value {
    json!({"queue": "q", "type": job_type, "payload": null})
}

/// Returns a script that runs until the file `go` exists, and then fails only for jobs of type `bad`.
fn until_go() -> String {
    format!("{UNTIL_GO}; [ $ZIZQ_JOB_TYPE != bad ]")
}

fn has(running: &Running, message: &str) -> bool {
    running.log().iter().any(|line| line.contains(message))
}

#[test]
fn a_silent_stream_is_noticed_while_other_jobs_end() {
    const SCRIPT: &str = "echo $ZIZQ_JOB_ID >> $DIR/started
        [ $ZIZQ_JOB_TYPE = tick ] && { sleep 0.3; exit 0; }
        until [ -e $DIR/go -o ! -d $DIR ]; do sleep 0.01; done";
    let server = RawServer::start();
    let args = ["--prefetch", "64", "--stream-idle-timeout", "1s"];
    let running = Daemon::at(&server.url()).args(QUICK).threads(2).args(args).sh(SCRIPT).start();
    let mut stream = server.take();
    stream.typed_job("long", "long");
    for number in 0..60 {
        stream.typed_job(&format!("tick{number}"), "tick");
    }
    running.wait_for_lines(2, "started");
    running.signal(Signal::USR2);
    server.answer_until("the loss", |request| {
        request.answer("204 No Content", "");
        has(&running, "stream lost while its last jobs were finished").then_some(())
    });
    let started = fs::read_to_string(running.dir().join("started")).unwrap();
    assert!(started.lines().count() < 60, "no job has ended since the pause");
}

#[test]
fn a_late_line_of_a_dead_stream_strands_no_failure() {
    let server = RawServer::start();
    let daemon = Daemon::bare().args(["--log-format", "json"]).args(QUICK);
    daemon.script("script.sh", &until_go());
    let toml = |prefetch: u32| {
        let worker = format!("worker.threads = 3\nworker.prefetch = {prefetch}");
        format!("url = '{}'\n{worker}\n[handler]\nexec = ['$DIR/script.sh']", server.url())
    };
    let running = daemon.handlers(&toml(8)).start();
    let mut old = server.take();
    old.typed_job("long", "long");
    running.wait_for_lines(1, "started");
    let dir = running.dir().to_str().unwrap();
    fs::write(running.dir().join("zizq-worker.toml"), toml(9).replace("$DIR", dir)).unwrap();
    running.signal(Signal::HUP);
    let mut new = server.take();
    new.typed_job("j", "bad");
    running.wait_for_lines(2, "started");
    old.typed_job("j", "bad");
    running.wait_for_message("job received again while it is here, not started");
    old.end();
    running.wait_for_message("stream lost while its last jobs were finished");
    new.typed_job("long", "long");
    running.wait_for_messages(2, "job received again while it is here, not started");
    running.go();
    server.answer_until("the failure", |request| match request.line() {
        line if line.contains("/jobs/j/failure") => Some(()),
        _ => {
            request.answer("204 No Content", "");
            None
        }
    });
}

#[test]
fn a_malformed_job_redelivered_before_the_answer_costs_no_place() {
    let server = RawServer::start();
    let running = Daemon::at(&server.url()).args(QUICK).args(["--prefetch", "1"]).sh("true").start();
    let mut stream = server.take();
    stream.chunk("{\"id\":\"m\",\"type\":7,\"attempts\":0}\n");
    let first = server.request();
    assert!(first.line().contains("/jobs/m/failure"), "{}", first.line());
    // The server has counted the failure, and delivers the next attempt before the worker gets the answer to the report.
    stream.chunk("{\"id\":\"m\",\"type\":7,\"attempts\":1}\n");
    running.wait_for_messages(2, "malformed job, reported as failed");
    first.answer("200 OK", r#"{"id":"m"}"#);
    assert!(server.request().line().contains("/jobs/m/failure"));
}

/// A proxy lets reports through, but refuses each `GET` of a job.
#[test]
fn a_failure_in_doubt_leaves_though_looks_are_refused() {
    for refusal in ["403 Forbidden", "404 Not Found", "405 Method Not Allowed"] {
        let server = RawServer::start();
        let running = Daemon::at(&server.url()).args(QUICK).args(["--prefetch", "1"]).sh("exit 1").start();
        let mut old = server.take();
        old.job("1");
        let report = server.request();
        assert!(report.line().contains("/jobs/1/failure"), "{}", report.line());
        report.answer("502 Bad Gateway", "<html>");
        let mut new = server.answer_until("another stream", |request| {
            if request.line().starts_with("GET /jobs/take") {
                return Some(request.open());
            }
            assert!(request.line().starts_with("GET /jobs/1 "), "{}", request.line());
            request.answer(refusal, "<html>");
            None
        });
        old.wait_until_closed();
        new.job("1");
        server.answer_until("the report", |request| {
            let is_report = request.line().contains("/jobs/1/failure");
            request.answer(if is_report { "200 OK" } else { refusal }, r#"{"id":"1"}"#);
            is_report.then_some(())
        });
        assert!(!has(&running, "report dropped"), "{refusal}");
    }
}

#[test]
fn a_gateways_json_404_to_successes_runs_no_job_twice() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault_times(1, Call::Successes, Fault::Answer(404, GATEWAY));
    let running = Daemon::of(&proxy).args(QUICK).sh("echo $ZIZQ_JOB_ID >> $DIR/started").start();
    let id = server.enqueue_with(job("good"));
    server.wait_until_done(&id);
    let finished = running.stop();
    assert_eq!(finished.read("started").lines().count(), 1);
    assert!(!finished.has("report dropped"));
}

#[test]
fn a_gateways_json_404_to_failures_strands_none() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault_times(2, Call::Failure, Fault::Answer(404, GATEWAY));
    proxy.fault_times(1, Call::Job, Fault::Answer(404, GATEWAY));
    let _running = Daemon::of(&proxy).args(QUICK).sh("exit 1").start();
    let ids = server.enqueue_all(vec![job("bad"); 6]);
    ids.iter().for_each(|id| _ = server.wait_for_error(id, 1));
}

#[test]
fn a_success_that_always_gets_a_500_holds_up_no_other() {
    let server = RawServer::start();
    let _running = Daemon::at(&server.url()).args(QUICK).args(["--prefetch", "8"]).sh("true").start();
    let mut stream = server.take();
    stream.job("bad1").job("good1").job("bad2").job("good2").job("good3");
    let (mut open, mut later) = (vec!["good1", "good2", "good3"], vec!["good4", "good5"]);
    server.answer_until("the others", |request| {
        if request.body.contains("bad") {
            request.answer("500 Internal Server Error", "");
            return None;
        }
        open.retain(|id| !request.body.contains(id));
        request.answer("204 No Content", "");
        if open.is_empty() {
            // Deliver two more jobs. Their successes must not join the bulk requests that fail.
            later.iter().for_each(|id| _ = stream.job(id));
            open = std::mem::take(&mut later);
        }
        open.is_empty().then_some(())
    });
}

/// While the worker is paused, it loses the stream that delivered a long job and a short one. Then the short job fails, and the
/// long job still runs.
#[test]
fn a_search_for_a_running_job_holds_few_others() {
    const SCRIPT: &str = "echo $ZIZQ_JOB_ID >> $DIR/started
        [ $ZIZQ_JOB_TYPE = bad ] || until [ -e $DIR/go -o ! -d $DIR ]; do sleep 0.01; done
        until [ -e $DIR/short ]; do sleep 0.01; done
        [ $ZIZQ_JOB_TYPE != bad ]";
    let server = RawServer::start();
    let running = Daemon::at(&server.url()).args(QUICK).threads(2).sh(SCRIPT).start();
    let mut stream = server.take();
    stream.typed_job("long", "long").typed_job("short", "bad");
    running.wait_for_lines(2, "started");
    running.signal(Signal::USR2);
    running.wait_for_message("paused");
    stream.end();
    running.wait_for_message("stream lost while its last jobs were finished");
    fs::write(running.dir().join("short"), "").unwrap();
    running.wait_for_message("failure parked until its job is redelivered");
    let (mut greatest, mut rounds) = (0, 0);
    let mut search = |request: RawRequest, is_over: &dyn Fn(usize, usize) -> bool| {
        if !request.line().starts_with("GET /jobs/take") {
            request.answer("200 OK", r#"{"status":"ready","attempts":0}"#);
            return None;
        }
        let prefetch: usize = request.line().split(['=', ' ', '&']).nth(2).unwrap().parse().unwrap();
        (greatest, rounds) = (greatest.max(prefetch), rounds + 1);
        let mut stream = request.open();
        (0..prefetch).for_each(|number| _ = stream.job(&format!("other{number}")));
        stream.wait_until_closed();
        is_over(greatest, rounds).then_some(greatest)
    };
    let greatest = server.answer_until("six rounds", |request| search(request, &|_, rounds| rounds >= 6));
    assert_eq!(greatest, 4, "the prefetch of two loops");
    // Once both jobs have ended, a search stream withholds jobs only briefly, so its prefetch can grow to 512.
    running.go();
    server.answer_until("a deep round", |request| search(request, &|greatest, _| greatest >= 512));
}

/// A forwarder of connections to a target port that can change.
struct Forwarder {
    port: u16,
    target: Arc<AtomicU16>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Forwarder {
    fn to(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (target, open) = (Arc::new(AtomicU16::new(target)), Arc::new(Mutex::new(Vec::new())));
        let (to, all) = (Arc::clone(&target), Arc::clone(&open));
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let (near, far) =
                    (near.unwrap(), TcpStream::connect(("127.0.0.1", to.load(Ordering::SeqCst))).unwrap());
                all.lock().unwrap().push(near.try_clone().unwrap());
                for (mut from, mut into) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                    std::thread::spawn(move || {
                        // A cut connection ends the copy with an error, which the test expects.
                        let _ = std::io::copy(&mut from, &mut into);
                        let _ = into.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        Self { port, target, open }
    }

    /// Forwards new connections to another port, and cuts all open connections except the first, which carries the take stream.
    fn move_to(&self, target: u16) {
        self.target.store(target, Ordering::SeqCst);
        for stream in self.open.lock().unwrap().iter().skip(1) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// The server changes to a certificate from another authority. The worker's take stream stays open on a connection that was made
/// before the change, but reports need new connections.
#[test]
fn a_reload_of_certificates_helps_waiting_reports() {
    let (server, one, two) = (Server::start(), Authority::new(), Authority::new());
    let (first_port, _first) = server.with_tls(one.issue(&["localhost"]).server(&["http/1.1"], None));
    let (second_port, _second) = server.with_tls(two.issue(&["localhost"]).server(&["http/1.1"], None));
    let forwarder = Forwarder::to(first_port);
    let daemon = Daemon::bare().args(["--log-format", "json"]).args(QUICK);
    daemon.script("script.sh", UNTIL_GO);
    let ca = daemon.file("ca.pem", &one.pem());
    let url = format!("https://localhost:{}", forwarder.port);
    let toml = format!("url = '{url}'\n[handler]\nexec = ['$DIR/script.sh']\n[tls]\nca = '{}'", ca.display());
    let running = daemon.handlers(&toml).start();
    let id = server.enqueue_with(job("good"));
    running.wait_for_lines(1, "started");
    forwarder.move_to(second_port);
    running.go();
    running.wait_for_messages(3, "report failed, trying again");
    fs::write(&ca, two.pem()).unwrap();
    running.signal(Signal::HUP);
    server.wait_until_done(&id);
}

#[test]
fn an_environment_that_is_too_long_slows_its_jobs_down() {
    let server = Server::start();
    let toml = format!("[handler]\nexec = ['true']\n[handler.env]\nBIG = '{}'", "x".repeat(200_000));
    let running = Daemon::of(&server).handlers(&toml).start();
    let ids = server.enqueue_all(vec![job("good"); 20]);
    running.wait_for_messages(2, "job failed");
    running.wait_for_message("handler cannot be started, its jobs are slowed down");
    let failed = eventually("a look", || Some(ids.iter().filter(|id| !server.errors(id).is_empty()).count()));
    assert!(failed < 10, "{failed}");
}
