//! A worker inside a Rust program. Each job is a function call instead of a process.
//!
//!     cargo run --example library_worker                          # runs three jobs from an in-memory server
//!     cargo run --example library_worker -- http://localhost:7890 # runs jobs from the server at this url

use std::error::Error;
use std::num::NonZeroUsize;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use zizq_worker::embedded::{EmbeddedServer, Options, Store};
use zizq_worker::{Dispatcher, Ended, Failure, Job, Lifecycle, Outcome, Phase, Worker, WorkerConfig, WorkerSignals};

#[derive(Deserialize)]
struct Mail {
    to: String,
}

struct Mailer;

impl Dispatcher for Mailer {
    async fn dispatch(&self, job: &Job, lifecycle: &Lifecycle) -> Ended {
        let mail: Mail = match serde_json::from_slice(&job.payload) {
            Ok(mail) => mail,
            // A retry cannot succeed, so the job is dead at once.
            Err(error) => {
                let failure = Failure { kill: true, ..Failure::new("BadPayload", error.to_string()) };
                return Outcome::Failure(failure).into();
            }
        };
        let outcome = tokio::select! {
            sent = send(&mail) => match sent {
                Ok(()) => Outcome::Success,
                Err(error) => Outcome::Failure(Failure::new("SendError", error.to_string())),
            },
            // The server redelivers the job, with no attempt counted.
            () = lifecycle.reached(Phase::Killing) => Outcome::Interrupted,
        };
        outcome.into()
    }
}

async fn send(mail: &Mail) -> Result<(), Box<dyn Error + Send + Sync>> {
    if !mail.to.contains('@') {
        return Err(format!("not an address: {}", mail.to).into());
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    println!("sent to {}", mail.to);
    Ok(())
}

const JOBS: [&str; 3] = [
    r#"{"queue": "mail", "type": "send_email", "payload": {"to": "ann@example.org"}}"#,
    r#"{"queue": "mail", "type": "send_email", "payload": {"to": "nowhere"}}"#,
    r#"{"queue": "mail", "type": "send_email", "payload": 7}"#,
];

/// Starts an in-memory server with a few jobs, and returns its url.
async fn start_server() -> Result<String, Box<dyn Error>> {
    let store = Store::new(Options::default());
    for job in JOBS {
        store.enqueue_line(job)?;
    }
    let server = EmbeddedServer::bind("127.0.0.1:0", store).await?;
    let url = format!("http://{}", server.local_addr());
    tokio::spawn(server.run(CancellationToken::new()));
    Ok(url)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let url = match std::env::args().nth(1) {
        Some(url) => url,
        None => start_server().await?,
    };
    let config = WorkerConfig {
        url: url.parse()?,
        queues: vec!["mail".to_owned()],
        threads: NonZeroUsize::new(4).ok_or("no threads")?,
        prefetch: NonZeroUsize::new(8).ok_or("no prefetch")?,
        exit_when_idle: Some(Duration::from_secs(1)),
        ..WorkerConfig::default()
    };
    let lifecycle = Lifecycle::new();
    // The first SIGTERM or Ctrl-C drains, the second kills. Other signals become requests, and this program ignores them.
    let (requests, _) = mpsc::unbounded_channel();
    tokio::spawn(WorkerSignals::listen()?.obey(lifecycle.clone(), requests));

    let summary = Worker::new(config, Mailer).run(&lifecycle).await?;
    println!("{} succeeded, {} failed", summary.succeeded, summary.failed);
    Ok(())
}
