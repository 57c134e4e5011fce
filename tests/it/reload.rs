//! SIGHUP reloads the settings. Changes that need no restart take effect, and a bad file changes nothing.

use std::fs;

use rustix::process::Signal;
use serde_json::json;

use crate::support::{Admin, Api, Authority, Call, Daemon, Proxy, RawServer, Running, Server, UNTIL_GO, eventually};

/// Starts a daemon with `toml` as its configuration file, in which `$URL` stands for the server's url.
fn start(server: &Api, toml: &str) -> Running {
    start_with(server, toml, "true")
}

/// Starts a daemon as [`start`] does, with `script` in an additional file `script.sh`.
fn start_with(server: &Api, toml: &str, script: &str) -> Running {
    let daemon = Daemon::bare().args(["--log-format", "json", "--admin-listen", "127.0.0.1:0"]);
    daemon.script("old.sh", "echo old $ZIZQ_JOB_TYPE >> $DIR/ran");
    daemon.script("new.sh", "echo new $ZIZQ_JOB_TYPE >> $DIR/ran");
    daemon.script("wait.sh", UNTIL_GO);
    daemon.script("script.sh", script);
    let toml = toml.replace("$URL", &server.url);
    let running = daemon.handlers(&toml).start();
    running.wait_for_message("connected, listening for jobs");
    running
}

/// Replaces the text of the configuration file, and sends SIGHUP.
fn reload(running: &Running, server: &Api, toml: &str) {
    let toml = toml.replace("$URL", &server.url).replace("$DIR", running.dir().to_str().unwrap());
    fs::write(running.dir().join("zizq-worker.toml"), toml).unwrap();
    running.signal(Signal::HUP);
}

fn reloaded(running: &Running, server: &Api, toml: &str) {
    let before = running.log().iter().filter(|line| line.contains("configuration reloaded")).count();
    reload(running, server, toml);
    running.wait_for_messages(before + 1, "configuration reloaded");
}

#[test]
fn jobs_that_start_after_a_reload_are_run_by_the_new_handlers() {
    let server = Server::start();
    let old = "url = '$URL'\n[handler]\nexec = ['$DIR/old.sh']";
    let running = start(&server, old);
    let first = server.enqueue("q", "a", json!(null));
    server.wait_until_done(&first);
    let new = format!(
        "{old}\nsuccess_exit_codes = [7]\n[handlers.b]\nexec = ['$DIR/new.sh']\n[handlers.c]\nexec = 'sh -c \"exit 7\"'"
    );
    reloaded(&running, &server, &new);
    for job_type in ["a", "b", "c"] {
        server.wait_until_done(&server.enqueue("q", job_type, json!(null)));
    }
    let finished = running.stop();
    assert_eq!(finished.read("ran"), "old a\nold a\nnew b\n");
    assert_eq!(finished.all("connected, listening for jobs").len(), 1, "the stream was not touched");
}

#[test]
fn a_job_that_runs_keeps_the_limits_that_it_was_started_with() {
    let server = Server::start();
    let running = start(&server, "url = '$URL'\n[handler]\nexec = ['$DIR/wait.sh']");
    let first = server.enqueue("q", "t", json!(null));
    running.wait_for_lines(1, "started");
    reloaded(&running, &server, "url = '$URL'\n[handler]\nexec = ['$DIR/wait.sh']\ntimeout = '100ms'");
    running.go();
    server.wait_until_done(&first);
    fs::remove_file(running.dir().join("go")).unwrap();
    let second = server.enqueue("q", "t", json!(null));
    assert_eq!(server.wait_for_error(&second, 1)["error_type"], "Timeout");
    running.stop();
}

#[test]
fn the_log_level_changes_and_its_format_does_not() {
    let server = Server::start();
    let rest = "url = '$URL'\n[handler]\nexec = ['true']\n";
    let running = start(&server, &format!("{rest}[log]\nlevel = 'info,zizq_worker::jobs=warn'"));
    server.wait_until_done(&server.enqueue("q", "t", json!(null)));
    reloaded(&running, &server, &format!("{rest}[log]\nlevel = 'info'"));
    server.wait_until_done(&server.enqueue("q", "t", json!(null)));
    running.wait_for_message("job completed");
    assert_eq!(running.stop().all("job completed").len(), 1);
}

#[test]
fn a_bad_file_changes_nothing_and_is_reported() {
    let server = Server::start();
    let running = start(&server, "url = '$URL'\n[handler]\nexec = ['$DIR/old.sh']");
    let admin = Admin::of(&running);
    let missing = "url = '$URL'\n[handlers.t]\nexec = ['$DIR/new.sh']\n[handler]\nexec = ['$DIR/missing.sh']";
    for (count, bad) in ["url = '$URL'\nthreadz = 2", "url = ", missing].iter().enumerate() {
        reload(&running, &server, bad);
        let events = running.wait_for_messages(count + 1, "configuration not reloaded, everything stays as it was");
        let error = events[count]["error"].as_str().unwrap();
        assert!(error.contains("zizq-worker.toml:"), "{error}");
    }
    server.wait_until_done(&server.enqueue("q", "t", json!(null)));
    admin.wait_for_metric(r#"reloads_total{result="failed"}"#, "3");
    reloaded(&running, &server, "url = '$URL'\n[handler]\nexec = ['$DIR/new.sh']");
    admin.wait_for_metric(r#"reloads_total{result="ok"}"#, "1");
    server.wait_until_done(&server.enqueue("q", "t", json!(null)));
    assert_eq!(running.stop().read("ran"), "old t\nnew t\n");
}

/// A script that runs until the file `go` exists, unless the job's type is `quick`.
const WAIT_UNLESS_QUICK: &str = "echo $ZIZQ_JOB_ID >> $DIR/started
[ $ZIZQ_JOB_TYPE = quick ] || until [ -e $DIR/go -o ! -d $DIR ]; do sleep 0.01; done";

#[test]
fn other_queues_are_taken_at_once_while_the_old_stream_finishes() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let toml = |queue| {
        format!("url = '$URL'\nworker.queues = ['{queue}']\nworker.threads = 2\n[handler]\nexec = ['$DIR/script.sh']")
    };
    let running = start_with(&proxy, &toml("old"), WAIT_UNLESS_QUICK);
    let old = server.enqueue("old", "long", json!(null));
    running.wait_for_lines(1, "started");
    reloaded(&running, &proxy, &toml("new"));
    let unfit = server.enqueue("old", "quick", json!(null));
    let new = server.enqueue("new", "quick", json!(null));
    // A second reload of the same settings changes nothing while the old stream finishes.
    reloaded(&running, &proxy, &toml("new"));
    server.wait_until_done(&new);
    let take = proxy.calls(Call::Take)[0].connection;
    assert!(!proxy.has_closed(take), "the old stream closed over a running job");
    assert_eq!(server.job(&old).unwrap()["status"], "in_flight");
    running.go();
    server.wait_until_done(&old);
    proxy.wait_until_closed(take);
    let paths: Vec<String> = proxy.calls(Call::Take).iter().map(|seen| seen.path.clone()).collect();
    assert_eq!(paths, ["/jobs/take?prefetch=4&queue=old", "/jobs/take?prefetch=4&queue=new"]);
    assert_eq!(server.wait_for_status(&unfit, "ready")["attempts"], 0);
    assert_eq!(running.stop().read("started"), format!("{old}\n{new}\n"));
}

#[test]
fn a_job_that_comes_over_the_old_stream_is_run_if_it_still_fits() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let toml = |prefetch: u8| {
        format!("url = '$URL'\nworker.prefetch = {prefetch}\nworker.threads = 2\n[handler]\nexec = ['$DIR/script.sh']")
    };
    let running = start_with(&proxy, &toml(3), WAIT_UNLESS_QUICK);
    let long = server.enqueue("q", "long", json!(null));
    running.wait_for_lines(1, "started");
    let gate = proxy.hold(Call::Take);
    reloaded(&running, &proxy, &toml(4));
    gate.wait_for(1);
    // The new stream is not open yet, so these jobs arrive over the old one.
    let ids = [(); 3].map(|()| server.enqueue("q", "quick", json!(null)));
    ids.iter().for_each(|id| server.wait_until_done(id));
    gate.release();
    server.wait_until_done(&server.enqueue("q", "quick", json!(null)));
    running.go();
    server.wait_until_done(&long);
    proxy.wait_until_closed(proxy.calls(Call::Take)[0].connection);
    assert_eq!(running.stop().read("started").lines().count(), 5);
}

#[test]
fn an_old_stream_closes_though_jobs_come_over_it_without_pause() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let toml = |prefetch: u8| {
        format!("url = '$URL'\nworker.prefetch = {prefetch}\nworker.threads = 2\n[handler]\nexec = ['$DIR/script.sh']")
    };
    let running = start_with(&proxy, &toml(3), WAIT_UNLESS_QUICK);
    server.enqueue("q", "long", json!(null));
    running.wait_for_lines(1, "started");
    reloaded(&running, &proxy, &toml(4));
    running.wait_for_messages(2, "connected, listening for jobs");
    server.enqueue_all(vec![json!({"queue": "q", "type": "quick", "payload": null}); 300]);
    running.wait_for_lines(20, "started");
    running.go();
    proxy.wait_until_closed(proxy.calls(Call::Take)[0].connection);
    eventually("all jobs", || (server.count("ready") + server.count("in_flight") == 0).then_some(()));
    running.stop();
}

#[test]
fn reports_go_to_the_server_from_which_their_jobs_came() {
    let (here, there) = (Server::start(), Server::start());
    let (first, second) = (Proxy::before(&here), Proxy::before(&there));
    let toml = "url = '$URL'\nworker.threads = 2\n[handler]\nexec = ['$DIR/script.sh']";
    let running = start_with(&first, toml, WAIT_UNLESS_QUICK);
    let old = here.enqueue("q", "long", json!(null));
    running.wait_for_lines(1, "started");
    reloaded(&running, &second, &format!("worker.prefetch = 9\n{toml}"));
    let take = second.wait_for_calls(Call::Take, 1);
    assert_eq!(take[0].path, "/jobs/take?prefetch=9");
    let unfit = here.enqueue("q", "quick", json!(null));
    let new = there.enqueue("q", "quick", json!(null));
    there.wait_until_done(&new);
    running.go();
    here.wait_until_done(&old);
    assert_eq!((first.calls(Call::Successes).len(), second.calls(Call::Successes).len()), (1, 1));
    assert_eq!(here.wait_for_status(&unfit, "ready")["attempts"], 0);
    running.stop();
}

#[test]
fn limits_of_the_stream_take_effect_on_a_new_one() {
    let server = Server::start();
    let rest = "url = '$URL'\n[handler]\nexec = ['true']";
    let running = start(&server, rest);
    reloaded(&running, &server, &format!("worker.max_job_size = '2KiB'\n{rest}\ntimeout = '10m'"));
    running.wait_for_messages(2, "connected, listening for jobs");
    running.wait_for_message("timeout is longer than the shutdown deadline");
    let id = server.enqueue("q", "t", json!("x".repeat(3000)));
    assert_eq!(server.wait_for_error(&id, 1)["error_type"], "MalformedJob");
    running.stop();
}

#[test]
fn a_server_that_is_gone_does_not_keep_the_worker_from_the_next() {
    let (mut here, there) = (Server::start(), Server::start());
    let rest = "worker.retry_min_wait = '10m'\nworker.retry_max_wait = '10m'\nworker.shutdown_deadline = '500ms'\n[handler]\nexec = ['$DIR/wait.sh']";
    let running = start(&here, &format!("url = '$URL'\n{rest}"));
    let old = here.enqueue("q", "t", json!(null));
    running.wait_for_lines(1, "started");
    here.stop();
    running.wait_for("the wait for the old server", |event| event["reconnect_in"].is_string());
    // The reload cuts the wait for the old server short.
    reloaded(&running, &there, &format!("url = '$URL'\n{rest}"));
    running.wait_for_messages(2, "connected, listening for jobs");
    running.go();
    let id = there.enqueue("q", "t", json!(null));
    there.wait_until_done(&id);
    // The first job's report can only go to the old server, which is down. So the report is dropped at the shutdown deadline.
    running.sigterm();
    let finished = running.assert_exit(1);
    assert_eq!(finished.event("report dropped")["job"]["id"], old.as_str());
}

#[test]
fn another_certificate_authority_takes_effect_on_a_new_stream() {
    let (server, old, new) = (Server::start(), Authority::new(), Authority::new());
    let (port, _stop) = server.with_tls(old.issue(&["localhost"]).server(&["http/1.1"], None));
    let running = {
        let daemon = Daemon::bare().args(["--log-format", "json"]);
        daemon.file("ca.pem", &old.pem());
        daemon
            .handlers(&format!("url = 'https://localhost:{port}'\ntls.ca = '$DIR/ca.pem'\n[handler]\nexec = ['true']"))
    }
    .start();
    running.wait_for_message("connected, listening for jobs");
    // The certificates are the same, so no new stream is needed.
    running.signal(Signal::HUP);
    assert_eq!(running.wait_for_messages(1, "configuration reloaded")[0]["new_stream"], false);
    fs::write(running.dir().join("ca.pem"), old.pem() + &new.pem()).unwrap();
    running.signal(Signal::HUP);
    assert_eq!(running.wait_for_messages(2, "configuration reloaded")[1]["new_stream"], true);
    running.wait_for_messages(2, "connected, listening for jobs");
    running.stop();
}

#[test]
fn threads_need_a_restart_and_the_log_says_so() {
    let server = Server::start();
    let toml = |threads| format!("url = '$URL'\nworker.threads = {threads}\n[handler]\nexec = ['$DIR/wait.sh']");
    let running = start(&server, &toml(1));
    reloaded(&running, &server, &toml(4));
    let warning = running.wait_for_message("some changed settings need a restart to take effect");
    assert_eq!(warning["settings"], "worker.threads");
    let status = Admin::of(&running).status();
    assert_eq!(status["settings"]["worker.threads"]["value"], "1", "that is what is in force");
    assert_eq!(status["settings"]["worker.prefetch"]["value"], "2", "{status:#}");
    assert_eq!(status["loops"].as_array().unwrap().len(), 1);
    let ids = [(); 2].map(|()| server.enqueue("q", "t", json!(null)));
    running.wait_for_lines(1, "started");
    eventually("both are here", || (server.count("in_flight") == 2).then_some(()));
    assert_eq!(running.wait_for_lines(1, "started").len(), 1);
    running.go();
    ids.iter().for_each(|id| server.wait_until_done(id));
    running.stop();
}

#[test]
fn a_reload_without_a_file_finds_the_handlers_again() {
    let server = Server::start();
    let running = Daemon::of(&server).sh("true").start();
    running.wait_for_message("connected, listening for jobs");
    running.signal(Signal::HUP);
    running.wait_for_message("configuration reloaded");
    server.wait_until_done(&server.enqueue("q", "t", json!(null)));
    running.stop();
}

#[test]
fn a_job_that_waits_for_a_broken_handler_runs_the_new_one() {
    let server = Server::start();
    let toml = |name| format!("url = '$URL'\nworker.threads = 4\n[handler]\nexec = ['$DIR/{name}.sh']");
    let running = start(&server, &toml("old"));
    fs::remove_file(running.dir().join("old.sh")).unwrap();
    let ids = [(); 4].map(|()| server.enqueue("q", "t", json!(null)));
    let admin = Admin::of(&running);
    admin.wait_for_metric("jobs_running", "4");
    reloaded(&running, &server, &toml("new"));
    ids.iter().for_each(|id| server.wait_until_done(id));
    assert_eq!(running.stop().read("ran"), "new t\n".repeat(4));
}

#[test]
fn a_handler_that_is_as_it_was_is_still_known_to_be_broken() {
    let server = Server::start();
    let toml = "url = '$URL'\n[handler]\nexec = ['$DIR/old.sh']";
    let running = start(&server, toml);
    let admin = Admin::of(&running);
    fs::write(running.dir().join("old.sh"), "no program").unwrap();
    server.wait_for_error(&server.enqueue("q", "t", json!(null)), 1);
    admin.wait_until_ready(false);
    fs::write(running.dir().join("old.sh"), "#!/bin/sh\n").unwrap();
    reloaded(&running, &server, &format!("{toml}\n[handlers.b]\nexec = ['$DIR/new.sh']"));
    // The handler has not been started since the failure, but its file is executable now.
    admin.wait_until_ready(true);
    running.stop();
}

#[test]
fn a_server_of_a_reload_that_refuses_the_worker_is_tried_again() {
    let refusing = RawServer::start();
    let running = Daemon::bare()
        .args(["--log-format", "json", "--retry-min-wait", "10ms", "--retry-max-wait", "10ms"])
        .handlers("url = 'http://127.0.0.1:1'\n[handler]\nexec = ['true']")
        .start();
    running.wait_for_message("server unreachable, reconnecting");
    let toml = format!("url = '{}'\n[handler]\nexec = ['true']", refusing.url());
    fs::write(running.dir().join("zizq-worker.toml"), toml).unwrap();
    running.signal(Signal::HUP);
    refusing.request().answer("404 Not Found", "no zizq here");
    refusing.request().answer("404 Not Found", "no zizq here");
    running.wait_for_messages(2, "server refuses the worker, reconnecting");
    running.stop();
}

#[test]
fn a_file_that_never_ends_holds_up_nothing() {
    let server = Server::start();
    let running = start(&server, "url = '$URL'\n[handler]\nexec = ['$DIR/old.sh']");
    let file = running.dir().join("zizq-worker.toml");
    fs::remove_file(&file).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    // Send the signal repeatedly, because the kernel can merge two pending signals into one.
    eventually("a reload while another one lasts", || {
        running.signal(Signal::HUP);
        running.log().iter().any(|line| line.contains("signal ignored, the settings are being read")).then_some(())
    });
    running.signal(Signal::USR1);
    running.wait_for_message("status");
    server.wait_until_done(&server.enqueue("q", "t", json!(null)));
    running.stop();
}

#[test]
fn a_worker_is_ready_while_an_old_stream_finishes() {
    let server = Server::start();
    let toml = |queue| format!("url = '$URL'\nworker.queues = ['{queue}']\n[handler]\nexec = ['$DIR/wait.sh']");
    let running = start(&server, &toml("old"));
    let admin = Admin::of(&running);
    server.enqueue("old", "t", json!(null));
    running.wait_for_lines(1, "started");
    reloaded(&running, &server, &toml("new"));
    running.wait_for_message("finishing what came over this stream, while another one takes");
    admin.wait_until_ready(true);
    running.go();
    running.stop();
}

#[test]
fn a_reload_that_is_taken_back_keeps_the_open_stream() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let toml = |prefetch: u8| format!("url = '$URL'\nworker.prefetch = {prefetch}\n[handler]\nexec = ['$DIR/wait.sh']");
    let running = start(&proxy, &toml(3));
    let ids = [(); 2].map(|()| server.enqueue("q", "t", json!(null)));
    running.wait_for_lines(1, "started");
    reloaded(&running, &proxy, &toml(4));
    reloaded(&running, &proxy, &toml(3));
    running.go();
    ids.iter().for_each(|id| server.wait_until_done(id));
    server.wait_until_done(&server.enqueue("q", "t", json!(null)));
    assert_eq!(running.stop().read("started").lines().count(), 3);
}

#[test]
fn a_stopping_worker_reloads_nothing() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).sh(UNTIL_GO).start();
    running.wait_for_lines(1, "started");
    running.sigterm();
    running.wait_for_message("shutting down");
    running.signal(Signal::HUP);
    running.wait_for_message("signal ignored, the worker is stopping");
    running.go();
    running.assert_exit(0);
}

#[test]
fn a_secret_in_a_file_is_read_again_at_a_reload() {
    let server = Server::start();
    let toml = "url = '$URL'\n[handler]\nexec = ['$DIR/script.sh']\nenv = { TOKEN = { file = '$DIR/token' } }\n\
                [handlers.own]\nenv = { TOKEN = 'own' }";
    let daemon = Daemon::bare().args(["--log-format", "json"]);
    daemon.script("script.sh", "printf '%s|' \"$TOKEN\" >> $DIR/ran");
    let token = daemon.file("token", "first\n");
    let running = daemon.handlers(&toml.replace("$URL", &server.url)).start();
    server.wait_until_done(&server.enqueue("q", "t", json!(null)));
    server.wait_until_done(&server.enqueue("q", "own", json!(null)));
    fs::write(token, "second\n\n").unwrap();
    reloaded(&running, &server, toml);
    server.wait_until_done(&server.enqueue("q", "t", json!(null)));
    assert_eq!(running.stop().read("ran"), "first|own|second\n|");
}

#[test]
fn the_log_says_how_long_the_old_stream_may_take() {
    let server = Server::start();
    let toml = |prefetch: u8| {
        format!(
            "url = '$URL'\nworker.prefetch = {prefetch}\n[handler]\nexec = ['$DIR/wait.sh']\ntimeout = '20s'\nkill_grace = '4s'"
        )
    };
    let running = start(&server, &toml(3));
    server.enqueue("q", "t", json!(null));
    running.wait_for_lines(1, "started");
    reloaded(&running, &server, &toml(4));
    assert_eq!(running.wait_for_message("opening a new stream; the old one stays open")["at_most"], "24s");
    Admin::of(&running).wait_for_status("the old stream", |status| status["finishing_streams"] == 1);
    running.go();
    Admin::of(&running).wait_for_status("one stream", |status| status["finishing_streams"] == 0);
    running.stop();
}
