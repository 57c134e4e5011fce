//! TLS: trusted certificates, the client certificate, and the protocol of reports.

use std::io::Read;
use std::time::Duration;

use hyper::Version;
use serde_json::{Value, json};

use crate::support::{Authority, Call, Daemon, Identity, Proxy, RawServer, Server};

const QUICK: [&str; 4] = ["--retry-min-wait", "10ms", "--retry-max-wait", "50ms"];
const BOTH: [&str; 2] = ["h2", "http/1.1"];
const CONFIG: i32 = 78;

fn at(port: u16) -> String {
    format!("https://localhost:{port}")
}

/// Returns a daemon for which the system's trusted certificates are `roots`.
fn daemon(url: &str, roots: &str) -> Daemon {
    let daemon = Daemon::at(url).args(QUICK);
    let path = daemon.file("system.pem", roots);
    daemon.env("SSL_CERT_FILE", path).env("SSL_CERT_DIR", "").sh("[ $ZIZQ_JOB_TYPE = good ]")
}

trait WithFiles {
    fn pem(self, flag: &str, text: &str) -> Self;
    fn identity(self, identity: &Identity) -> Self;
}

impl WithFiles for Daemon {
    /// Writes a file, and passes its path with the flag `flag`.
    fn pem(self, flag: &str, text: &str) -> Self {
        let path = self.file(&format!("{}.pem", flag.trim_start_matches('-')), text);
        self.args([flag, path.to_str().unwrap()])
    }

    fn identity(self, identity: &Identity) -> Self {
        self.pem("--tls-client-cert", &identity.certificate).pem("--tls-client-key", &identity.key)
    }
}

/// Checks that the reports of a success and of a failure arrive at the server, and that the daemon drains.
#[track_caller]
fn assert_works(server: &Server, daemon: Daemon) {
    let good = server.enqueue("q", "good", json!(null));
    let bad = server.enqueue("q", "bad", json!(null));
    let running = daemon.start();
    server.wait_until_done(&good);
    server.wait_for_error(&bad, 1);
    running.sigterm();
    running.assert_exit(0);
    assert_eq!(server.errors(&bad).len(), 1);
}

/// Checks that the daemon keeps retrying, logs the reason, and gets no job.
#[track_caller]
fn assert_refuses(server: &Server, daemon: Daemon, why: &str) {
    let id = server.enqueue("q", "good", json!(null));
    let running = daemon.start();
    let refusals = running.wait_for_messages(2, "server unreachable, reconnecting");
    assert!(refusals[0]["error"].as_str().unwrap().contains(why), "{}", refusals[0]);
    running.sigterm();
    assert!(!running.assert_exit(0).has("connected, listening for jobs"));
    assert_eq!(server.job(&id).unwrap()["status"], "ready");
}

#[test]
fn a_server_is_trusted_if_the_system_trusts_its_authority() {
    let (server, authority) = (Server::start(), Authority::new());
    let (port, _guard) = server.with_tls(authority.issue(&["localhost"]).server(&BOTH, None));
    assert_works(&server, daemon(&at(port), &authority.pem()));
}

#[test]
fn a_server_that_the_system_does_not_trust_is_refused() {
    let (server, authority) = (Server::start(), Authority::new());
    let (port, _guard) = server.with_tls(authority.issue(&["localhost"]).server(&BOTH, None));
    assert_refuses(&server, daemon(&at(port), &Authority::new().pem()), "invalid peer certificate: UnknownIssuer");
}

#[test]
fn a_file_of_authorities_takes_the_place_of_the_systems() {
    let (server, authority) = (Server::start(), Authority::new());
    let (port, _guard) = server.with_tls(authority.issue(&["localhost"]).server(&BOTH, None));
    let other = Authority::new().pem();
    assert_works(&server, daemon(&at(port), "").pem("--tls-ca", &format!("{other}{}", authority.pem())));
    let daemon = daemon(&at(port), &authority.pem()).pem("--tls-ca", &other);
    assert_refuses(&server, daemon, "invalid peer certificate: UnknownIssuer");
}

#[test]
fn a_certificate_for_another_name_is_refused() {
    let (server, authority) = (Server::start(), Authority::new());
    let (port, _guard) = server.with_tls(authority.issue(&["queue.example.org"]).server(&BOTH, None));
    let daemon = daemon(&at(port), "").pem("--tls-ca", &authority.pem());
    assert_refuses(&server, daemon, "certificate not valid for name \"localhost\"");
}

#[test]
fn an_address_is_a_name_too() {
    let (server, authority) = (Server::start(), Authority::new());
    let (port, _guard) = server.with_tls(authority.issue(&["127.0.0.1"]).server(&BOTH, None));
    let daemon = daemon(&format!("https://127.0.0.1:{port}"), "").pem("--tls-ca", &authority.pem());
    assert_works(&server, daemon);
}

#[test]
fn a_certificate_that_has_expired_is_refused() {
    let (server, authority) = (Server::start(), Authority::new());
    let (port, _guard) = server.with_tls(authority.issue_expired("localhost").server(&BOTH, None));
    let daemon = daemon(&at(port), "").pem("--tls-ca", &authority.pem());
    assert_refuses(&server, daemon, "invalid peer certificate: certificate expired");
}

#[test]
fn a_server_without_tls_is_refused() {
    let server = Server::start();
    let daemon = daemon(&at(server.address().port()), &Authority::new().pem());
    assert_refuses(
        &server,
        daemon,
        "cannot connect: url is https, and the port seems to speak no TLS; try http: received corrupt message of type InvalidContentType",
    );
}

#[test]
fn a_server_that_demands_a_certificate_gets_it() {
    let (server, authority, clients) = (Server::start(), Authority::new(), Authority::new());
    let (port, _guard) = server.with_tls(authority.issue(&["localhost"]).server(&BOTH, Some(&clients)));
    let daemon = daemon(&at(port), "").pem("--tls-ca", &authority.pem());
    assert_works(&server, daemon.identity(&clients.issue(&["worker"])));
}

#[test]
fn a_worker_without_a_client_certificate_is_turned_away() {
    let (server, authority, clients) = (Server::start(), Authority::new(), Authority::new());
    let (port, _guard) = server.with_tls(authority.issue(&["localhost"]).server(&BOTH, Some(&clients)));
    let daemon = || daemon(&at(port), "").pem("--tls-ca", &authority.pem());
    assert_refuses(&server, daemon(), "CertificateRequired");
    // The kind of alert is the server's choice, so it is not checked.
    assert_refuses(&server, daemon().identity(&Authority::new().issue(&["worker"])), "received fatal alert");
}

/// The take stream uses HTTP/1.1 on its own connection. Reports use HTTP/2 if the server offers it.
#[test]
fn alpn_decides_which_protocol_the_reports_speak() {
    for (offered, http1_only, spoken) in
        [(&BOTH[..], false, Version::HTTP_2), (&["http/1.1"], true, Version::HTTP_11), (&[], true, Version::HTTP_11)]
    {
        let (server, authority) = (Server::start(), Authority::new());
        let config = authority.issue(&["127.0.0.1"]).server(offered, None);
        let proxy = Proxy::with_tls(&server, config, http1_only);
        assert_works(&server, daemon(&proxy.url, "").pem("--tls-ca", &authority.pem()));
        assert_eq!(proxy.calls(Call::Take)[0].version, Version::HTTP_11);
        let reports = [proxy.calls(Call::Successes), proxy.calls(Call::Failure)].concat();
        assert!(reports.len() == 2 && reports.iter().all(|call| call.version == spoken), "{offered:?}: {reports:?}");
    }
}

#[test]
fn a_job_runs_once_over_a_lost_tls_connection() {
    let (server, authority) = (Server::start(), Authority::new());
    let proxy = Proxy::with_tls(&server, authority.issue(&["127.0.0.1"]).server(&BOTH, None), false);
    let id = server.enqueue("q", "good", json!(null));
    let script = "echo $ZIZQ_JOB_ID >> $DIR/started; until [ -e $DIR/go -o ! -d $DIR ]; do sleep 0.01; done";
    let daemon = Daemon::of(&proxy).args(QUICK).sh(script).pem("--tls-ca", &authority.pem()).start();
    daemon.wait_for_lines(1, "started");
    proxy.reset_streams();
    daemon.wait_for_message("job received again while it is here, not started");
    std::fs::write(daemon.dir().join("go"), "").unwrap();
    server.wait_until_done(&id);
    daemon.sigterm();
    assert_eq!(daemon.assert_exit(0).read("started"), format!("{id}\n"));
}

/// Checks that a mistake ends the daemon with this line before it connects. DIR in the line stands for the daemon's directory.
#[track_caller]
fn complains(daemon: Daemon, line: &str) {
    let server = RawServer::start();
    let url = server.url().replace("http:", "https:");
    let finished = daemon.env("ZIZQ_URL", url).args(["--", "true"]).run().assert_exit(CONFIG);
    let dir = finished.dir().to_str().unwrap();
    let log: Vec<String> = finished.log.iter().map(|found| found.replace(dir, "DIR")).collect();
    assert_eq!(log, [format!("zizq-worker: {line}")]);
    assert!(!server.has_connection(), "connected in spite of {line}");
}

#[test]
fn a_file_that_cannot_be_read_is_named_with_its_setting() {
    for setting in ["ca", "client_cert", "client_key"] {
        let (flag, variable) =
            (format!("--tls-{}", setting.replace('_', "-")), format!("ZIZQ_TLS_{}", setting.to_uppercase()));
        let problem = format!("tls_{setting}: cannot read /none.pem: No such file or directory (os error 2)");
        complains(Daemon::bare().args([&*flag, "/none.pem"]), &format!("{flag}: {problem}"));
        complains(Daemon::bare().env(&variable, "/none.pem"), &format!("{variable}: {problem}"));
        let file = Daemon::bare().config(&format!("[tls]\n{setting} = '/none.pem'"));
        complains(file, &format!("DIR/zizq-worker.toml:2: {problem}"));
    }
}

#[test]
fn a_file_that_holds_something_else_is_named_with_its_setting() {
    let identity = Authority::new().issue(&["worker"]);
    let broken = "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n";
    let no_certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (text, problem) in [
        (&*identity.key, "holds no certificate in PEM"),
        ("", "holds no certificate in PEM"),
        (broken, "is not PEM: "),
        (no_certificate, "holds a certificate that cannot be used: "),
    ] {
        starts_with(Daemon::bare().pem("--tls-ca", text), "--tls-ca: tls_ca: DIR/tls-ca.pem ", problem);
    }
    let prefix = "--tls-client-cert: tls_client_cert: DIR/tls-client-cert.pem ";
    let daemon = Daemon::bare().pem("--tls-client-cert", &identity.key).pem("--tls-client-key", &identity.key);
    starts_with(daemon, prefix, "holds no certificate in PEM");
    let prefix = "--tls-client-key: tls_client_key: DIR/tls-client-key.pem ";
    let cert = &identity.certificate;
    let daemon = Daemon::bare().pem("--tls-client-cert", cert).pem("--tls-client-key", cert);
    starts_with(daemon, prefix, "holds no private key in PEM: ");
}

/// Checks that a mistake ends the daemon with one line that begins with `prefix` and `problem`. The rest of the line comes from a
/// library.
#[track_caller]
fn starts_with(daemon: Daemon, prefix: &str, problem: &str) {
    let daemon = with_system_roots(daemon).args(["--url", "https://localhost:1", "--", "true"]);
    let finished = daemon.run().assert_exit(CONFIG);
    let line = finished.log.join("\n").replace(finished.dir().to_str().unwrap(), "DIR");
    assert!(line.starts_with(&format!("zizq-worker: {prefix}{problem}")) && finished.log.len() == 1, "{line}");
}

fn with_system_roots(daemon: Daemon) -> Daemon {
    let path = daemon.file("system.pem", &Authority::new().pem());
    daemon.env("SSL_CERT_FILE", path).env("SSL_CERT_DIR", "")
}

#[test]
fn a_key_must_belong_to_its_certificate() {
    let [mine, other] = [0, 1].map(|_| Authority::new().issue(&["worker"]));
    let daemon = Daemon::bare().pem("--tls-client-cert", &mine.certificate).pem("--tls-client-key", &other.key);
    let prefix = "--tls-client-key: tls_client_key: DIR/tls-client-key.pem ";
    starts_with(daemon, prefix, "does not belong to the certificate");
}

#[test]
fn certificate_and_key_go_together() {
    let Identity { certificate, key } = Authority::new().issue(&["worker"]);
    complains(
        with_system_roots(Daemon::bare().pem("--tls-client-cert", &certificate)),
        "--tls-client-cert: tls_client_cert: DIR/tls-client-cert.pem goes with tls_client_key, which is not set",
    );
    complains(
        with_system_roots(Daemon::bare().pem("--tls-client-key", &key)),
        "--tls-client-key: tls_client_key: DIR/tls-client-key.pem goes with tls_client_cert, which is not set",
    );
}

#[test]
fn certificates_are_of_no_use_with_http() {
    let daemon = Daemon::bare().pem("--tls-ca", &Authority::new().pem()).args(["--url", "http://localhost:1"]);
    complains(daemon, "--tls-ca: tls_ca: DIR/tls-ca.pem is of no use: url is http; make it https");
}

#[test]
fn a_system_without_trusted_certificates_needs_a_file() {
    let problem = "url is https, and this system has no trusted certificates; install ca-certificates, or name a file \
                   with --tls-ca, ZIZQ_TLS_CA, or ca in the file's [tls]";
    let url = "https://localhost:1";
    let file = format!("# a comment\nurl = '{url}'");
    for (daemon, source) in [
        (Daemon::bare().env("ZIZQ_URL", url), "ZIZQ_URL"),
        (Daemon::bare().args(["--url", url]), "--url"),
        (Daemon::bare().config(&file), "DIR/zizq-worker.toml:2"),
    ] {
        let empty = daemon.file("empty.pem", "");
        let daemon = daemon.env("SSL_CERT_FILE", empty).env("SSL_CERT_DIR", "").args(["--", "true"]);
        let finished = daemon.run().assert_exit(CONFIG);
        let line = finished.log.join("\n").replace(finished.dir().to_str().unwrap(), "DIR");
        assert_eq!(line, format!("zizq-worker: {source}: {problem}"));
    }
}

#[test]
fn each_setting_has_its_flag_its_variable_and_its_key() {
    let (server, authority, clients) = (Server::start(), Authority::new(), Authority::new());
    let (port, _guard) = server.with_tls(authority.issue(&["localhost"]).server(&BOTH, Some(&clients)));
    let identity = clients.issue(&["worker"]);
    let files = [("ca", &authority.pem()), ("client_cert", &identity.certificate), ("client_key", &identity.key)];
    let written = |daemon: &Daemon, name: &str, text: &str| {
        daemon.file(&format!("{name}.pem"), text).to_str().unwrap().to_owned()
    };
    let by_variable = files.iter().fold(daemon(&at(port), ""), |daemon, (name, text)| {
        let path = written(&daemon, name, text);
        daemon.env(&format!("ZIZQ_TLS_{}", name.to_uppercase()), path)
    });
    assert_works(&server, by_variable);
    let in_file = daemon(&at(port), "");
    let lines = files.map(|(name, text)| format!("{name} = {}\n", Value::from(written(&in_file, name, text))));
    assert_works(&server, in_file.config(&format!("[tls]\n{}", lines.concat())));
}

#[test]
fn http_to_a_port_with_tls_is_explained() {
    let (server, authority) = (Server::start(), Authority::new());
    let (port, _guard) = server.with_tls(authority.issue(&["localhost"]).server(&BOTH, None));
    let daemon = daemon(&format!("http://localhost:{port}"), "");
    assert_refuses(
        &server,
        daemon,
        "if url is http and the port speaks TLS, make it https: invalid HTTP version parsed",
    );
}

#[test]
fn a_port_that_closes_at_plain_http_may_speak_tls() {
    let server = RawServer::start();
    let daemon = daemon(&server.url(), "").start();
    let refused = |count: usize| {
        let refusals = daemon.wait_for_messages(count, "server unreachable, reconnecting");
        refusals[count - 1]["error"].as_str().unwrap().to_owned()
    };
    let explanation = "closed before a whole answer: if url is http and the port speaks TLS, make it https";
    drop(server.request());
    assert!(refused(1).contains(explanation), "{}", refused(1));
    let unread = server.connection();
    unread.peek(&mut [0]).unwrap();
    drop(unread);
    assert!(refused(2).contains(explanation), "{}", refused(2));
    // After the server has answered once, the worker treats a connection closed without an answer as an outage.
    server.take().end();
    drop(server.request());
    assert!(refused(3).starts_with("the request failed"), "{}", refused(3));
    server.take();
    daemon.wait_for_messages(2, "connected, listening for jobs");
    daemon.sigterm();
    daemon.assert_exit(0);
}

#[test]
fn https_to_a_port_that_closes_is_explained() {
    let server = RawServer::start();
    let daemon = daemon(&server.url().replace("http:", "https:"), &Authority::new().pem()).start();
    let mut connection = server.connection();
    // Read the whole first TLS message, because a close with unread bytes would reset the connection.
    connection.read_exact(&mut [0; 5]).unwrap();
    connection.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let _ = connection.read_to_end(&mut Vec::new());
    drop(connection);
    let refusal = &daemon.wait_for_messages(1, "server unreachable, reconnecting")[0];
    let explanation = "cannot connect: the port closed the connection; if it speaks no TLS, write http in url";
    assert!(refusal["error"].as_str().unwrap().starts_with(explanation), "{refusal}");
    daemon.sigterm();
    daemon.assert_exit(0);
}

/// The answer of nginx to plain HTTP at a port that speaks TLS.
const NGINX: &str = "<html>\r\n<head><title>400 The plain HTTP request was sent to HTTPS port</title></head>\r\n<body>\r\n</body></html>";

#[test]
fn the_title_of_a_page_is_shown() {
    let server = RawServer::start();
    let (_, finished) = server.refuse(Daemon::at(&server.url()).args(["--", "true"]), NGINX);
    let last = finished.log.last().unwrap();
    assert!(last.ends_with(": 400 The plain HTTP request was sent to HTTPS port"), "{last}");
}
