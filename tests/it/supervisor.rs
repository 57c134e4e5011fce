//! The worker's messages to the service manager, whose socket each test provides.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::support::{Admin, Daemon, PATIENCE, Server, UNTIL_GO, jobs};

/// The socket of a service manager.
struct Manager(UnixDatagram);

impl Manager {
    /// Binds a socket in the daemon's directory, and sets `NOTIFY_SOCKET` for the daemon.
    fn of(daemon: Daemon) -> (Self, Daemon) {
        let path = daemon.dir().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        (Self(socket), daemon.env("NOTIFY_SOCKET", path))
    }

    /// Returns the lines of the next message.
    fn next(&self) -> Vec<String> {
        let mut message = [0; 4096];
        let length = self.0.recv(&mut message).unwrap();
        String::from_utf8(message[..length].to_vec()).unwrap().lines().map(str::to_owned).collect()
    }

    /// Waits for a message with the line `wanted`.
    fn wait_for(&self, wanted: &str) {
        self.wait_for_one(|line| line == wanted);
    }

    /// Waits for a message with a matching line, and returns the line.
    fn wait_for_one(&self, wanted: impl Fn(&str) -> bool) -> String {
        let begun = Instant::now();
        loop {
            if let Some(found) = self.next().into_iter().find(|line| wanted(line)) {
                return found;
            }
            assert!(begun.elapsed() < PATIENCE);
        }
    }
}

#[test]
fn ready_comes_once_signals_are_heard_even_without_a_server() {
    let (manager, daemon) = Manager::of(Daemon::at("http://127.0.0.1:1").sh("true"));
    let running = daemon.start();
    assert_eq!(manager.next(), ["READY=1"]);
    // SIGTERM would kill the process if READY=1 came before the worker handles signals.
    running.sigterm();
    running.assert_exit(0);
}

#[test]
fn ready_does_not_come_when_a_handler_cannot_be_run() {
    let (manager, daemon) = Manager::of(Daemon::at("http://127.0.0.1:1").args(["--exec", "/does/not/exist"]));
    daemon.run().assert_exit(78);
    manager.0.set_nonblocking(true).unwrap();
    assert!(manager.0.recv(&mut [0; 100]).is_err());
}

#[test]
fn the_status_counts_running_done_and_failed_jobs() {
    let server = Server::start();
    let (manager, daemon) = Manager::of(Daemon::of(&server).sh("[ $ZIZQ_JOB_TYPE = good ]"));
    let running = daemon.env("WATCHDOG_USEC", "200000").start();
    manager.wait_for("STATUS=0 running, 0 done, 0 failed");
    server.wait_until_done(&server.enqueue("q", "good", json!(null)));
    manager.wait_for("STATUS=0 running, 1 done, 0 failed");
    server.wait_for_error(&server.enqueue("q", "bad", json!(null)), 1);
    manager.wait_for("STATUS=0 running, 1 done, 1 failed");
    running.signal(Signal::USR2);
    manager.wait_for("STATUS=0 running, 1 done, 1 failed; paused");
    running.stop();
}

#[test]
fn the_watchdog_is_fed_for_as_long_as_the_worker_lives() {
    let (manager, daemon) = Manager::of(Daemon::at("http://127.0.0.1:1").sh("true"));
    let running = daemon.env("WATCHDOG_USEC", "200000").start();
    manager.wait_for("READY=1");
    for _ in 0..5 {
        manager.wait_for("WATCHDOG=1");
    }
    // While it is stopped by SIGSTOP, the worker sends no watchdog message.
    running.signal(Signal::STOP);
    manager.0.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    while manager.0.recv(&mut [0; 4096]).is_ok() {}
    running.signal(Signal::CONT);
    manager.0.set_read_timeout(Some(PATIENCE)).unwrap();
    manager.wait_for("WATCHDOG=1");
    running.stop();
}

#[test]
fn a_watchdog_that_is_off_gets_no_messages() {
    let (manager, daemon) = Manager::of(Daemon::at("http://127.0.0.1:1").sh("true"));
    let running = daemon.start();
    manager.wait_for("STATUS=0 running, 0 done, 0 failed; not connected to the server");
    running.sigterm();
    running.assert_exit(0);
    manager.0.set_nonblocking(true).unwrap();
    let mut message = [0; 4096];
    while let Ok(length) = manager.0.recv(&mut message) {
        assert!(!message[..length].starts_with(b"WATCHDOG"));
    }
}

#[test]
fn a_stop_is_told_and_its_time_extended_while_it_lasts() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let (manager, daemon) = Manager::of(Daemon::of(&server).sh(UNTIL_GO));
    let running = daemon.env("WATCHDOG_USEC", "200000").start();
    running.wait_for_lines(1, "started");
    running.sigterm();
    manager.wait_for("STOPPING=1");
    manager.wait_for_one(|line| line.starts_with("STATUS=1 running") && line.ends_with("; draining"));
    for _ in 0..3 {
        let extension = manager.wait_for_one(|line| line.starts_with("EXTEND_TIMEOUT_USEC="));
        let micros: u64 = extension.split('=').nth(1).unwrap().parse().unwrap();
        assert!(micros >= 15_000_000, "{extension}");
    }
    manager.wait_for("WATCHDOG=1");
    running.go();
    running.assert_exit(0);
}

#[test]
fn a_reload_is_told_from_its_beginning_to_its_end() {
    let (manager, daemon) = Manager::of(Daemon::at("http://127.0.0.1:1").sh("true"));
    let running = daemon.start();
    manager.wait_for("READY=1");
    running.signal(Signal::HUP);
    let reloading = loop {
        let message = manager.next();
        if message[0] == "RELOADING=1" {
            break message;
        }
    };
    assert!(reloading[1].starts_with("MONOTONIC_USEC="), "{reloading:?}");
    manager.wait_for("READY=1");
    running.sigterm();
    running.assert_exit(0);
}

#[test]
fn a_manager_that_does_not_read_holds_up_nothing() {
    let server = Server::start();
    let (manager, daemon) = Manager::of(Daemon::of(&server).args(["--admin-listen", "127.0.0.1:0"]).sh("true"));
    let path = daemon.dir().join("notify");
    let fillers: Vec<UnixDatagram> = (0..3).map(|_| UnixDatagram::unbound().unwrap()).collect();
    for filler in &fillers {
        filler.set_nonblocking(true).unwrap();
        filler.connect(&path).unwrap();
        while filler.send(&[0; 1000]).is_ok() {}
    }
    let running = daemon.env("WATCHDOG_USEC", "20000").start();
    let ids = server.enqueue_all(jobs(20));
    ids.iter().for_each(|id| server.wait_until_done(id));
    assert_eq!(Admin::of(&running).wait_until_ready(true), [] as [&str; 0]);
    running.signal(Signal::USR1);
    running.wait_for_message("status");
    running.stop();
    drop(manager);
}

#[test]
fn a_watchdog_of_no_time_is_none() {
    let (manager, daemon) = Manager::of(Daemon::at("http://127.0.0.1:1").sh("true"));
    let running = daemon.env("WATCHDOG_USEC", "0").start();
    manager.wait_for("READY=1");
    running.signal(Signal::USR1);
    running.wait_for_message("status");
    running.sigterm();
    running.assert_exit(0);
}

#[test]
fn handlers_cannot_speak_for_the_worker() {
    let server = Server::start();
    let (_manager, daemon) = Manager::of(Daemon::of(&server).sh("env > $DIR/env"));
    let running = daemon.env("WATCHDOG_USEC", "10000000").env("WATCHDOG_PID", "1").start();
    server.wait_until_done(&server.enqueue("q", "t", json!(null)));
    let env = running.stop().read("env");
    assert!(!env.contains("NOTIFY_SOCKET") && !env.contains("WATCHDOG"), "{env}");
}

#[test]
fn a_socket_that_is_not_there_harms_nothing_but_the_log() {
    let server = Server::start();
    let running = Daemon::of(&server).env("NOTIFY_SOCKET", Path::new("/does/not/exist")).sh("true").start();
    running.wait_for_message("the service manager cannot be told");
    server.wait_until_done(&server.enqueue("q", "t", json!(null)));
    running.stop();
}

#[test]
fn the_status_tells_of_an_old_stream_after_a_reload() {
    let server = Server::start();
    let (manager, daemon) = Manager::of(Daemon::of(&server).handler(UNTIL_GO, "[worker]\nprefetch = 3"));
    let running = daemon.start();
    server.enqueue("q", "t", json!(null));
    running.wait_for_lines(1, "started");
    let file = running.dir().join("zizq-worker.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("prefetch = 3", "prefetch = 4")).unwrap();
    running.signal(Signal::HUP);
    manager.wait_for("STATUS=1 running, 0 done, 0 failed; reloaded, the old stream finishes its jobs");
    running.go();
    manager.wait_for_one(|line| line.starts_with("STATUS=") && !line.contains("reloaded"));
    running.stop();
}
