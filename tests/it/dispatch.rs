//! A job becomes a process, and its exit becomes a report.

use serde_json::{Value, json};

use crate::support::{Daemon, Server};

#[test]
fn a_job_whose_command_exits_0_is_acknowledged_and_gone() {
    let server = Server::start();
    let id = server.enqueue("mail", "send_email", json!({"to": "a@example.org"}));
    let daemon = Daemon::of(&server).sh("cat > $DIR/payload; echo done > $DIR/done").start();
    server.wait_until_done(&id);
    daemon.sigterm();
    let finished = daemon.assert_exit(0);
    assert_eq!(serde_json::from_str::<Value>(&finished.read("payload")).unwrap(), json!({"to": "a@example.org"}));
    assert_eq!(finished.event("job completed")["span"]["id"], id.as_str());
}
