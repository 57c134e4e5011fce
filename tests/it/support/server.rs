//! The embedded Zizq server, and a client of a Zizq server's HTTP API.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::{CancellationToken, DropGuard};
use zizq_worker::embedded::{EmbeddedServer, Options, Store};

use super::eventually;

/// Returns the runtime of all servers and calls in this test binary.
pub fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap())
}

/// A client of a server's API.
#[derive(Clone)]
pub struct Api {
    pub url: String,
    http: reqwest::Client,
}

impl Api {
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), http: reqwest::Client::builder().timeout(super::PATIENCE).build().unwrap() }
    }

    /// Enqueues a job and returns its id.
    pub fn enqueue(&self, queue: &str, job_type: &str, payload: Value) -> String {
        self.enqueue_with(json!({"queue": queue, "type": job_type, "payload": payload}))
    }

    /// Enqueues the job described by this request body, and returns the job's id.
    pub fn enqueue_with(&self, job: Value) -> String {
        let (status, job) = self.call("POST", "/jobs", Some(job));
        assert_eq!(status, 201, "{job}");
        job["id"].as_str().unwrap().to_owned()
    }

    /// Enqueues jobs in one request and returns their ids.
    pub fn enqueue_all(&self, jobs: impl IntoIterator<Item = Value>) -> Vec<String> {
        let jobs: Vec<Value> = jobs.into_iter().collect();
        let (status, answer) = self.call("POST", "/jobs/bulk", Some(json!({ "jobs": jobs })));
        assert_eq!(status, 201, "{answer}");
        answer["jobs"].as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap().to_owned()).collect()
    }

    /// Returns a job, if the server still has it.
    pub fn job(&self, id: &str) -> Option<Value> {
        let (status, job) = self.call("GET", &format!("/jobs/{id}"), None);
        (status == 200).then_some(job)
    }

    /// Returns the errors reported for a job, in the order of the job's attempts.
    pub fn errors(&self, id: &str) -> Vec<Value> {
        let (_, answer) = self.call("GET", &format!("/jobs/{id}/errors?order=asc"), None);
        answer["errors"].as_array().cloned().unwrap_or_default()
    }

    pub fn count(&self, status: &str) -> u64 {
        self.call("GET", &format!("/jobs/count?status={status}"), None).1["count"].as_u64().unwrap()
    }

    /// Sends a call. Returns the status and the JSON body of the answer. A body that is not JSON becomes null.
    pub fn call(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        runtime().block_on(async {
            let mut request = self.http.request(method.parse().unwrap(), format!("{}{path}", self.url));
            if let Some(body) = body {
                request = request.json(&body);
            }
            let answer = request.send().await.unwrap();
            let status = answer.status().as_u16();
            (status, serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap_or(Value::Null))
        })
    }

    /// Sends a call without a body. Returns the status of the answer, or `None` if the call fails.
    pub fn try_call(&self, method: &str, path: &str) -> Option<u16> {
        let request = self.http.request(method.parse().unwrap(), format!("{}{path}", self.url));
        runtime().block_on(async { Some(request.send().await.ok()?.status().as_u16()) })
    }

    /// Waits until the server no longer has the job, which means that the job has succeeded.
    pub fn wait_until_done(&self, id: &str) {
        eventually(&format!("job {id} done"), || self.job(id).is_none().then_some(()));
    }

    /// Waits until the job has this status, and returns the job.
    pub fn wait_for_status(&self, id: &str, status: &str) -> Value {
        eventually(&format!("job {id} {status}"), || self.job(id).filter(|job| job["status"] == status))
    }

    /// Waits until the job has failed in this attempt, counted from 1, and returns the error.
    pub fn wait_for_error(&self, id: &str, attempt: usize) -> Value {
        eventually(&format!("error {attempt} of job {id}"), || self.errors(id).get(attempt - 1).cloned())
    }
}

/// An embedded server in this process. A test can stop the server and restart it with the same jobs.
pub struct Server {
    api: Api,
    address: SocketAddr,
    pub store: Store,
    running: Option<(CancellationToken, JoinHandle<()>)>,
}

impl std::ops::Deref for Server {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

impl Server {
    /// Starts a server on a free port.
    pub fn start() -> Self {
        Self::with(Options::default())
    }

    pub fn with(options: Options) -> Self {
        Self::bind(SocketAddr::from(([127, 0, 0, 1], 0)), options)
    }

    /// Starts a server on this address.
    pub fn at(address: SocketAddr) -> Self {
        Self::bind(address, Options::default())
    }

    fn bind(address: SocketAddr, options: Options) -> Self {
        let store = Store::new(options);
        let server = runtime().block_on(EmbeddedServer::bind(address, store.clone())).unwrap();
        let address = server.local_addr();
        Self { api: Api::new(format!("http://{address}")), address, store, running: Some(serve(server)) }
    }

    /// Stops the server as `kill -9` would: connections break, and jobs in flight become ready.
    pub fn stop(&mut self) {
        if let Some((stop, serving)) = self.running.take() {
            stop.cancel();
            runtime().block_on(serving).unwrap();
        }
    }

    /// Restarts the server on the same port and with the same jobs.
    pub fn resume(&mut self) {
        let bind = || runtime().block_on(EmbeddedServer::bind(self.address, self.store.clone())).ok();
        self.running = Some(serve(eventually("the port is free again", bind)));
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Starts a second server, with TLS and the same jobs. Returns its port, and a guard that stops the second server when
    /// dropped.
    pub fn with_tls(&self, config: Arc<ServerConfig>) -> (u16, DropGuard) {
        let server = runtime().block_on(EmbeddedServer::bind("127.0.0.1:0", self.store.clone())).unwrap();
        let (port, stop) = (server.local_addr().port(), CancellationToken::new());
        runtime().spawn(server.with_tls(config).run(stop.clone()));
        (port, stop.drop_guard())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some((stop, _)) = &self.running {
            stop.cancel();
        }
    }
}

fn serve(server: EmbeddedServer) -> (CancellationToken, JoinHandle<()>) {
    let stop = CancellationToken::new();
    (stop.clone(), runtime().spawn(server.run(stop)))
}

/// Returns a local address with a free port.
pub fn unused_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}
