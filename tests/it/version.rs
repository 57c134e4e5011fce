//! The check of the server's version at each new connection, and the warning about an incompatible version.

use crate::support::{Daemon, RawServer};

#[test]
fn each_version_that_does_not_fit_is_warned_of_once() {
    let server = RawServer::start();
    let running =
        Daemon::at(&server.url()).args(["--retry-min-wait", "10ms", "--retry-max-wait", "10ms", "--", "true"]).start();
    for (before, version) in ["0.5.0", "0.5.0", "0.6.0", "1.0.0"].iter().enumerate() {
        let _stream = server.take();
        server.answer_next("200 OK", &format!(r#"{{"version":"{version}"}}"#));
        running.wait_for_messages(before + 1, "server version");
    }
    running.wait_for_messages(2, "the server's version does not fit this worker's");
    running.sigterm();
    let finished = running.assert_exit(0);
    let warnings = finished.all("the server's version does not fit this worker's");
    let versions: Vec<&str> = warnings.iter().map(|event| event["version"].as_str().unwrap()).collect();
    assert_eq!(versions, ["0.5.0", "1.0.0"]);
    assert!(warnings[0]["misfit"].as_str().unwrap().contains("it is older"), "{warnings:?}");
}

#[test]
fn a_server_that_does_not_tell_its_version_is_worked_for() {
    let server = RawServer::start();
    let running = Daemon::at(&server.url()).args(["--", "true"]).start();
    let mut stream = server.take();
    server.answer_next("403 Forbidden", "");
    running.wait_for_message("the server does not tell its version");
    stream.job("1");
    let report = server.request();
    assert_eq!(report.body, r#"{"ids":["1"]}"#);
    report.answer("204 No Content", "");
    running.stop();
}
