//! A server that a test can restart: the embedded server, or a real server with a restart command.

use std::net::{SocketAddr, ToSocketAddrs};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Api, Server, eventually};

/// A server, and the name of a queue that only this test uses.
pub struct Restartable {
    api: Api,
    embedded: Option<Server>,
    pub queue: String,
}

impl std::ops::Deref for Restartable {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

impl Restartable {
    pub fn embedded() -> Self {
        let server = Server::start();
        Self { api: Api::new(&*server.url), embedded: Some(server), queue: "q".to_owned() }
    }

    /// Returns the server at `ZIZQ_URL`. Returns `None` unless `ZIZQ_URL` and `ZIZQ_RESTART_CMD` are set.
    pub fn real() -> Option<Self> {
        let url = std::env::var("ZIZQ_URL").ok().filter(|_| std::env::var_os("ZIZQ_RESTART_CMD").is_some());
        if url.is_none() {
            eprintln!("left out: it needs ZIZQ_URL and ZIZQ_RESTART_CMD");
        }
        let queue = format!("zizq-worker-test-{:x}", fastrand::u64(..));
        Some(Self { api: Api::new(url?.trim_end_matches('/')), embedded: None, queue })
    }

    pub fn address(&self) -> SocketAddr {
        let authority = self.url.strip_prefix("http://").expect("an http url");
        authority.to_socket_addrs().unwrap().next().unwrap()
    }

    /// Returns the body of a request that enqueues a job.
    pub fn order(&self, job_type: &str, payload: Value) -> Value {
        json!({"queue": self.queue, "type": job_type, "payload": payload})
    }

    /// Crashes and restarts the server. The embedded server restarts after `pause`. A real server is restarted by
    /// `ZIZQ_RESTART_CMD`.
    pub fn restart(&mut self, pause: Duration) {
        match &mut self.embedded {
            Some(server) => {
                server.stop();
                std::thread::sleep(pause);
                server.resume();
            }
            None => {
                let command = std::env::var_os("ZIZQ_RESTART_CMD").unwrap();
                assert!(Command::new("sh").arg("-c").arg(command).status().unwrap().success());
                eventually("the server's health", || self.api.try_call("GET", "/health").filter(|code| *code == 200));
            }
        }
    }

    /// Returns the number of unfinished jobs in this test's queue.
    pub fn unfinished(&self) -> u64 {
        let path = format!("/jobs/count?queue={}&status=scheduled,ready,in_flight", self.queue);
        self.call("GET", &path, None).1["count"].as_u64().unwrap()
    }
}

impl Drop for Restartable {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.call("DELETE", &format!("/jobs?queue={}", self.queue), None);
        }
    }
}
