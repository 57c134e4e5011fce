//! The HTTP API of the model server, with the injection of faults into requests.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{CONTENT_TYPE, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep};

use super::network::Link;
use super::server::{Disconnect, Reporter, Server};
use super::weather::{Answer, Call, Fault};

/// The interval between heartbeats, which are empty lines on an idle stream.
const HEARTBEAT: Duration = Duration::from_secs(3);

type Answered = Response<Either<Full<Bytes>, Lines>>;

/// An error that makes hyper close the connection without an answer.
#[derive(Debug)]
struct Broken;

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("broken on purpose")
    }
}

impl std::error::Error for Broken {}

/// The parts of a request that the server uses.
struct Asked {
    call: Call,
    method: Method,
    path: String,
    query: String,
    body: Value,
}

impl Asked {
    async fn read(request: Request<Incoming>) -> Option<Self> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.ok()?.to_bytes();
        let path = head.uri.path().to_owned();
        let call = match (&head.method, path.as_str()) {
            (&Method::GET, "/jobs/take") => Call::Take,
            (&Method::POST, "/jobs/success") => Call::Successes,
            (&Method::POST, path) if path.starts_with("/jobs/") && path.ends_with("/failure") => Call::Failure,
            (&Method::GET, path) if path.starts_with("/jobs/") => Call::Look,
            _ => Call::Other,
        };
        let query = head.uri.query().unwrap_or_default().to_owned();
        Some(Self { call, method: head.method, path, query, body: serde_json::from_slice(&body).unwrap_or_default() })
    }

    fn parameter(&self, name: &str) -> Option<&str> {
        self.query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }

    /// Returns the ids of the jobs that the request names.
    fn ids(&self) -> BTreeSet<String> {
        match self.call {
            Call::Successes => {
                let ids = self.body["ids"].as_array().map_or(&[][..], Vec::as_slice);
                ids.iter().filter_map(|id| id.as_str().map(str::to_owned)).collect()
            }
            Call::Failure | Call::Look => self.path.split('/').nth(2).map(str::to_owned).into_iter().collect(),
            Call::Take | Call::Other => BTreeSet::new(),
        }
    }
}

impl Server {
    /// Starts a task that serves a connection until the connection ends.
    pub fn serve(&self, stream: DuplexStream, link: &Arc<Link>) {
        let (server, link) = (self.clone(), Arc::clone(link));
        tokio::spawn(async move {
            let answering = service_fn(|request| server.answer(request, &link));
            let mut http = http1::Builder::new();
            // Ignore an error, because it only means that a fault was injected or that the worker closed the connection.
            let _ = http.auto_date_header(false).serve_connection(TokioIo::new(stream), answering).await;
        });
    }

    async fn answer(&self, request: Request<Incoming>, link: &Arc<Link>) -> Result<Answered, Broken> {
        let asked = Asked::read(request).await.ok_or(Broken)?;
        self.book().asked(&link.worker, asked.call);
        let _under_way = self.book().under_way(&link.worker);
        let fault = self.weather().draw(asked.call, &asked.ids());
        match fault {
            None => {}
            Some(Fault::Late(by)) => sleep(by).await,
            Some(Fault::AnswerLost) => {
                drop(self.answer_well(&asked, link));
                self.note_answer(&asked, link, "the answer is lost");
                return Err(Broken);
            }
            Some(Fault::Unanswered { with_effect }) => {
                if with_effect {
                    drop(self.answer_well(&asked, link));
                }
                self.note_answer(&asked, link, "no answer");
                std::future::pending::<()>().await;
            }
            Some(Fault::Instead(answer)) => return Ok(self.answer_instead(&asked, link, answer)),
        }
        let answered = self.answer_well(&asked, link);
        self.book().heard(&link.worker);
        self.note_answer(&asked, link, answered.status().as_str());
        Ok(answered)
    }

    fn note_answer(&self, asked: &Asked, link: &Link, answer: &str) {
        let Asked { method, path, query, body, .. } = asked;
        let body = if body.is_null() { String::new() } else { format!(" {body}") };
        self.note(format_args!("{} by {}: {method} {path} {query}{body} -> {answer}", link.worker, link.id));
    }

    fn answer_instead(&self, asked: &Asked, link: &Arc<Link>, answer: Answer) -> Answered {
        let Answer { status, is_servers, retry_after, with_effect } = answer;
        if with_effect && asked.call != Call::Take {
            drop(self.answer_well(asked, link));
        }
        if answer.is_final() {
            self.book().refused_for_good(&link.worker, &asked.ids());
        }
        if asked.call == Call::Take && (400..500).contains(&status) {
            self.book().turned_away(&link.worker);
        }
        self.note_answer(asked, link, &format!("{answer:?}"));
        let (kind, text) = if is_servers {
            ("application/json", json!({ "error": "made up" }).to_string())
        } else {
            ("text/html", "<html>\n<body>made up</body>\n</html>".to_owned())
        };
        let mut response = Response::new(Either::Left(Full::from(text)));
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        response.headers_mut().insert(CONTENT_TYPE, kind.parse().unwrap());
        if let Some(seconds) = retry_after {
            response.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        response
    }

    fn answer_well(&self, asked: &Asked, link: &Arc<Link>) -> Answered {
        let ids = asked.ids();
        let unknown = || told(404, &json!({ "error": "no such job in flight" }));
        match asked.call {
            Call::Take => {
                let queues = asked
                    .parameter("queue")
                    .map_or_else(Vec::new, |names| names.split(',').map(str::to_owned).collect());
                let Some(prefetch) = asked.parameter("prefetch").and_then(|number| number.parse().ok()) else {
                    return told(400, &json!({ "error": "prefetch is no number" }));
                };
                let (disconnect, lines) = self.take(link, prefetch, queues);
                let lines = Lines { lines, heartbeat: Box::pin(sleep(HEARTBEAT)), _disconnect: disconnect };
                let mut response = Response::new(Either::Right(lines));
                response.headers_mut().insert(CONTENT_TYPE, "application/x-ndjson".parse().unwrap());
                response
            }
            Call::Successes if ids.is_empty() => told(400, &json!({ "error": "no ids" })),
            Call::Successes => match self.succeed(&Reporter { link }, &ids) {
                not_found if not_found.is_empty() => empty(),
                not_found => told(422, &json!({ "not_found": not_found })),
            },
            Call::Failure if asked.body["message"].as_str().is_none() => told(400, &json!({ "error": "no message" })),
            Call::Failure => match ids.first() {
                Some(id) if self.fail(&Reporter { link }, id, &asked.body) => {
                    told(200, &self.show(id).unwrap_or_default())
                }
                _ => unknown(),
            },
            Call::Look => {
                ids.iter().for_each(|id| self.book().looked(&link.worker, id));
                ids.first().and_then(|id| self.show(id)).map_or_else(unknown, |job| told(200, &job))
            }
            Call::Other if asked.path == "/version" => told(200, &json!({ "version": env!("CARGO_PKG_VERSION") })),
            Call::Other => told(404, &json!({ "error": "not found" })),
        }
    }
}

fn empty() -> Answered {
    let mut response = Response::new(Either::Left(Full::default()));
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

fn told(status: u16, value: &Value) -> Answered {
    let mut response = Response::new(Either::Left(Full::from(value.to_string())));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response.headers_mut().insert(CONTENT_TYPE, "application/json".parse().unwrap());
    response
}

/// The body of the answer to a take request: lines with jobs, and heartbeats.
struct Lines {
    lines: mpsc::UnboundedReceiver<Bytes>,
    heartbeat: Pin<Box<Sleep>>,
    _disconnect: Disconnect,
}

impl Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let line = match self.lines.poll_recv(cx) {
            Poll::Ready(Some(line)) => line,
            // The server has ended the stream.
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Pending => match self.heartbeat.as_mut().poll(cx) {
                Poll::Ready(()) => Bytes::from_static(b"\n"),
                Poll::Pending => return Poll::Pending,
            },
        };
        self.heartbeat.as_mut().reset(Instant::now() + HEARTBEAT);
        Poll::Ready(Some(Ok(Frame::data(line))))
    }
}
