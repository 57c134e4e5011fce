//! The choice of a handler by the job's exact type, and the settings that a handler inherits from the default handler.

use serde_json::{Value, json};

use crate::support::{Daemon, Finished, Server};

/// Returns a daemon with the handlers of `toml`, and with three scripts for them. Each script records its own name and the job's
/// type.
fn daemon(server: &Server, toml: &str) -> Daemon {
    let daemon = Daemon::of(server);
    for name in ["default", "one", "two"] {
        daemon.script(name, &format!("echo {name} $ZIZQ_JOB_TYPE >> $DIR/ran"));
    }
    daemon.handlers(toml)
}

fn job(job_type: &str) -> Value {
    json!({"queue": "q", "type": job_type, "payload": "p"})
}

/// Runs jobs of these types in order. Returns the lines that their handlers record.
fn ran(toml: &str, job_types: &[&str]) -> String {
    let server = Server::start();
    let ids = server.enqueue_all(job_types.iter().map(|job_type| job(job_type)));
    let running = daemon(&server, toml).start();
    ids.iter().for_each(|id| server.wait_until_done(id));
    running.stop().read("ran")
}

#[test]
fn a_type_has_its_own_handler_and_all_others_have_the_default() {
    let toml =
        "[handler]\nexec = '$DIR/default'\n[handlers.mail]\nexec = ['$DIR/one']\n[handlers.bill]\nexec = ['$DIR/two']";
    assert_eq!(ran(toml, &["mail", "bill", "else"]), "one mail\ntwo bill\ndefault else\n");
}

#[test]
fn a_type_is_matched_exactly_and_quoted_where_needed() {
    let toml = "[handler]\nexec = '$DIR/default'\n[handlers.\"bill.charge card\"]\nexec = '$DIR/one'\n[handlers.\"ü/&\"]\nexec = '$DIR/two'";
    let types = ["bill.charge card", "ü/&", "Bill.charge card", "bill.charge", "bill.charge card ", "ü/x"];
    let expected = "one bill.charge card\ntwo ü/&\ndefault Bill.charge card\ndefault bill.charge\ndefault bill.charge card\ndefault ü/x\n";
    assert_eq!(ran(toml, &types), expected);
}

#[test]
fn the_default_may_come_from_the_command_line() {
    let server = Server::start();
    let ids = server.enqueue_all([job("mail"), job("else")]);
    let daemon = daemon(&server, "[handlers.mail]\nexec = ['$DIR/one']");
    let default = daemon.dir().join("default");
    let running = daemon.args(["--exec", default.to_str().unwrap()]).start();
    ids.iter().for_each(|id| server.wait_until_done(id));
    assert_eq!(running.stop().read("ran"), "one mail\ndefault else\n");
}

/// A script that records the effect of each setting of its handler.
const SHOW: &str = "echo $ZIZQ_JOB_TYPE: $ZIZQ_JOB_TIMEOUT $(cat) $PWD $ONE $TWO >> $DIR/ran; echo said >&2
[ $ZIZQ_JOB_TYPE = bare ] && exit 99; exit 98";

#[test]
fn a_route_inherits_each_setting_from_the_default() {
    let server = Server::start();
    let ids = server.enqueue_all([job("bare"), job("own")]);
    let daemon = Daemon::of(&server).handler(
        SHOW,
        "stdin = 'payload'
timeout = '90s'
cwd = '/'
output = 'null'
success_exit_codes = [99]
env = { ONE = '1', TWO = '2' }
[handlers.bare]
[handlers.own]
stdin = 'none'
timeout = 0.5
cwd = '/tmp'
output = 'log'
success_exit_codes = [0, 98]
env = { TWO = 'two' }",
    );
    let running = daemon.start();
    ids.iter().for_each(|id| server.wait_until_done(id));
    let finished = running.stop();
    assert_eq!(finished.read("ran"), "bare: 90 \"p\" / 1 2\nown: 0.5 /tmp 1 two\n");
    let output: Vec<Value> = finished.all("stderr").iter().map(|event| event["job"]["type"].clone()).collect();
    assert_eq!(output, ["own"]);
}

#[test]
fn a_type_without_a_handler_fails_and_is_retried() {
    let server = Server::start();
    let id = server.enqueue("q", "unheard\nof", json!(null));
    let known = server.enqueue("q", "mail", json!(null));
    let running = daemon(&server, "[handlers.mail]\nexec = '$DIR/one'").start();
    let error = server.wait_for_error(&id, 1);
    assert_eq!(error["error_type"], "UnknownJobType");
    assert_eq!(error["message"], r#"no handler for jobs of type "unheard\nof", and no default handler"#);
    let job = server.wait_for_status(&id, "scheduled");
    assert_eq!(job["attempts"], 1, "{job}");
    server.wait_until_done(&known);
    assert_eq!(running.stop().read("ran"), "one mail\n");
}

#[test]
fn a_type_is_never_a_path_or_a_command() {
    let server = Server::start();
    let script = json!("touch $DIR/oops");
    for default in ["", "[handler]\nexec = '$DIR/default'\n"] {
        let types = ["../../bin/sh", "/bin/sh", "one", "$DIR/one", "one;$DIR/one", "-c", "."];
        let jobs = types.map(|job_type| json!({"queue": "q", "type": job_type, "payload": script}));
        let ids = server.enqueue_all(jobs);
        let running = daemon(&server, &format!("{default}[handlers.mail]\nexec = '$DIR/one'")).start();
        for id in &ids {
            match default {
                "" => assert_eq!(server.wait_for_error(id, 1)["error_type"], "UnknownJobType"),
                _ => server.wait_until_done(id),
            }
        }
        let finished = running.stop();
        let as_data = |job_type: &&str| format!("default {job_type}\n");
        let expected = if default.is_empty() { String::new() } else { types.iter().map(as_data).collect() };
        assert_eq!(finished.read("ran"), expected);
        assert!(!finished.dir().join("oops").exists());
        for id in &ids {
            server.call("DELETE", &format!("/jobs/{id}"), None);
        }
    }
}

#[track_caller]
fn assert_refused(toml: &str, problem: &str) -> Finished {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let finished = daemon(&server, toml).run().assert_exit(78);
    assert!(finished.log.last().unwrap().contains(problem), "{:?}", finished.log);
    assert_eq!(server.job(&id).unwrap()["status"], "ready");
    finished
}

#[test]
fn every_handler_is_checked_before_the_first_job_is_taken() {
    let default = "[handler]\nexec = '$DIR/default'\n";
    assert_refused(
        &format!("{default}[handlers.a]\nexec = '$DIR/one'\n[handlers.b]\nexec = '$DIR/missing'"),
        "missing does not exist",
    );
    assert_refused(&format!("{default}[handlers.b]\ncwd = '$DIR/missing'"), "cwd must be a directory that exists");
    assert_refused("[handlers.b]\ntimeout = '1s'", "handlers.b has no exec, and there is no default one");
    assert_refused(&format!("{default}[handlers.b]\ntime_out = '1s'"), "unknown key `time_out`");
    assert_refused(
        &format!("{default}success_exit_codes = [1]\n[handlers.b]\nkill_exit_codes = [1]"),
        "kill_exit_codes must not name a success (got 1)",
    );
    assert_refused(&format!("{default}drain_signal = 'KILL'"), "drain_signal must be a signal that can be caught");
}
