//! A client of the admin server.

use serde_json::Value;

use super::{Api, Running, eventually, runtime};

/// A client of a daemon's admin server.
pub struct Admin(Api);

impl Admin {
    /// Returns a client for a daemon that was started with `--admin-listen`.
    pub fn of(running: &Running) -> Self {
        let listening = running.wait_for_message("admin server listening");
        Self(Api::new(format!("http://{}", listening["address"].as_str().unwrap())))
    }

    pub fn call(&self, method: &str, path: &str) -> (u16, Value) {
        self.0.call(method, path, None)
    }

    pub fn url(&self) -> &str {
        &self.0.url
    }

    pub fn status(&self) -> Value {
        let (status, body) = self.call("GET", "/status");
        assert_eq!(status, 200);
        body
    }

    /// Waits until `GET /ready` answers with this value of `ready`, and returns the reasons in the answer.
    pub fn wait_until_ready(&self, ready: bool) -> Vec<String> {
        eventually(&format!("ready: {ready}"), || {
            let (status, body) = self.call("GET", "/ready");
            assert_eq!(body["ready"] == true, status == 200, "{status} {body}");
            assert!(status == 200 || status == 503, "{status}");
            let reasons = body["reasons"].as_array().unwrap();
            let reasons = reasons.iter().map(|reason| reason.as_str().unwrap().to_owned()).collect();
            (body["ready"] == ready).then_some(reasons)
        })
    }

    /// Waits until the answer to `GET /status` matches `wanted`, and returns the answer.
    pub fn wait_for_status(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        eventually(what, || Some(self.status()).filter(|status| wanted(status)))
    }

    /// Returns the metrics as text.
    pub fn metrics(&self) -> String {
        runtime().block_on(async {
            let answer = reqwest::get(format!("{}/metrics", self.0.url)).await.unwrap();
            let content_type = answer.headers()["content-type"].to_str().unwrap().to_owned();
            assert!(content_type.starts_with("text/plain; version=0.0.4"), "{content_type}");
            answer.text().await.unwrap()
        })
    }

    /// Waits until a metric has this value. `name` is the name of the metric without the prefix `zizq_worker_`, followed by the
    /// labels in alphabetical order.
    pub fn wait_for_metric(&self, name: &str, value: &str) {
        let line = format!("zizq_worker_{name} {value}");
        eventually(&line, || self.metrics().lines().any(|found| found == line).then_some(()));
    }
}
