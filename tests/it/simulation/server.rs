//! [`Server`]: a model of the Zizq server, based on the server's public API. The model has jobs, take streams, and the jobs in
//! flight on each stream.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};

use super::checks::Book;
use super::network::Link;
use super::script::Script;
use super::trace::Trace;
use super::weather::Weather;

/// The Unix time at the start of the model server, in milliseconds.
pub const EPOCH_MS: u64 = 1_800_000_000_000;

/// The number of priorities in the model. The priorities are `0..PRIORITIES`.
pub const PRIORITIES: u32 = 3;

/// Returns the server's longest backoff for a job with this many failures.
pub fn longest_backoff(attempts: u32) -> Duration {
    Duration::from_millis(500 + 500 * u64::from(attempts).pow(2) + 1000 * u64::from(attempts))
}

/// One model server. Clones share it.
#[derive(Clone)]
pub struct Server(Arc<Shared>);

struct Shared {
    name: &'static str,
    start: Instant,
    state: Mutex<State>,
    changed: Notify,
    pub(super) weather: Weather,
    pub(super) book: Book,
    trace: Trace,
}

struct State {
    rng: Rng,
    is_up: bool,
    /// Whether `GET /jobs/{id}` still finds completed jobs.
    keeps_completed: bool,
    jobs: BTreeMap<String, Record>,
    /// The ready jobs, by priority and then by id.
    ready: BTreeSet<(u32, String)>,
    /// The ids of the jobs that are neither completed nor dead.
    open: BTreeSet<String>,
    streams: BTreeMap<u64, Stream>,
}

/// A job to enqueue.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// The job's queue.
    pub queue: String,
    /// The priority. 0 is the most urgent.
    pub priority: u32,
    /// The maximum number of retries. When no retry is left, a failure makes the job dead, unless the report sets `retry_at`.
    pub retry_limit: u32,
    /// The defect in the job's line on the stream. `None` for a well-formed job.
    pub malformed: Option<Malformed>,
    /// The duration and result of each attempt.
    pub script: Script,
}

/// A defect in a job's line on the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// A field has the wrong type.
    Field,
    /// The line is longer than `max_job_size`.
    TooLong,
}

/// A job on the server.
#[derive(Debug, Clone)]
pub struct Record {
    /// The job as enqueued.
    pub job: NewJob,
    /// The state of the job.
    pub status: Status,
    /// The number of failed attempts.
    pub attempts: u32,
    /// The time of the latest delivery, if any.
    pub delivered: Option<Instant>,
    ready_at: Instant,
}

/// The state of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The job waits until its retry is due.
    Scheduled,
    /// The job can be taken.
    Ready,
    /// The job is in flight on this stream.
    InFlight(u64),
    /// The job has succeeded.
    Completed,
    /// The job has failed permanently.
    Dead,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Ready => "ready",
            Self::InFlight(_) => "in_flight",
            Self::Completed => "completed",
            Self::Dead => "dead",
        }
    }
}

struct Stream {
    link: Arc<Link>,
    prefetch: usize,
    queues: Vec<String>,
    held: BTreeSet<String>,
    lines: mpsc::UnboundedSender<Bytes>,
}

/// The sender of a report.
pub struct Reporter<'a> {
    /// The connection over which the report arrived.
    pub link: &'a Link,
}

impl Server {
    /// Returns a server without jobs.
    pub fn new(name: &'static str, rng: Rng, weather: Weather, book: Book, trace: Trace) -> Self {
        let mut rng = rng;
        let state = State {
            keeps_completed: rng.bool(),
            rng,
            is_up: true,
            jobs: BTreeMap::new(),
            ready: BTreeSet::new(),
            open: BTreeSet::new(),
            streams: BTreeMap::new(),
        };
        let (state, changed) = (Mutex::new(state), Notify::new());
        let server = Self(Arc::new(Shared { name, start: Instant::now(), state, changed, weather, book, trace }));
        tokio::spawn(server.clone().keep_time());
        server
    }

    /// Reports whether `other` is the same server.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(super) fn weather(&self) -> &Weather {
        &self.0.weather
    }

    pub(super) fn book(&self) -> &Book {
        &self.0.book
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    pub(super) fn note(&self, line: std::fmt::Arguments<'_>) {
        self.0.trace.note(self.0.name, line);
    }

    /// Enqueues a job. Returns its id.
    pub fn enqueue(&self, job: NewJob) -> String {
        let mut state = self.state();
        let id = format!("{}{:04}", self.0.name, state.jobs.len());
        self.note(format_args!("enqueued {id} {job:?}"));
        self.0.book.enqueued(&id, job.malformed.is_some());
        state.ready.insert((job.priority, id.clone()));
        state.open.insert(id.clone());
        let record = Record { job, status: Status::Ready, attempts: 0, delivered: None, ready_at: Instant::now() };
        state.jobs.insert(id.clone(), record);
        self.fill(&mut state);
        id
    }

    /// Returns the records of all jobs, by id.
    pub fn jobs(&self) -> BTreeMap<String, Record> {
        self.state().jobs.clone()
    }

    /// Returns the record of a job.
    pub fn job(&self, id: &str) -> Option<Record> {
        self.state().jobs.get(id).cloned()
    }

    /// Returns the ids of a worker's jobs in flight.
    pub fn held_by(&self, worker: &str) -> Vec<String> {
        let state = self.state();
        let of_worker = state.streams.values().filter(|stream| stream.link.worker == worker);
        of_worker.flat_map(|stream| stream.held.iter().cloned()).collect()
    }

    /// Returns the ids of the connections that carry a worker's take streams, oldest connection first.
    pub fn streams_of(&self, worker: &str) -> Vec<u64> {
        let state = self.state();
        state.streams.values().filter(|stream| stream.link.worker == worker).map(|stream| stream.link.id).collect()
    }

    /// Reports whether a job of these queues is ready. An empty list means all queues.
    pub fn has_ready(&self, queues: &[String]) -> bool {
        let state = self.state();
        state.ready.iter().any(|(_, id)| queues.is_empty() || queues.contains(&state.jobs[id].job.queue))
    }

    /// Returns the ids of the unfinished jobs.
    pub fn open_jobs(&self) -> Vec<String> {
        self.state().open.iter().cloned().collect()
    }

    /// Reports whether any unfinished job can still end. A job in flight cannot end if its worker no longer runs the job and the
    /// worker's report was refused permanently.
    pub fn has_open(&self) -> bool {
        let state = self.state();
        state.open.iter().any(|id| !self.is_stranded(&state, id))
    }

    /// Returns the records of the unfinished jobs that can still end.
    pub fn open_records(&self) -> Vec<Record> {
        let state = self.state();
        let open = state.open.iter().filter(|id| !self.is_stranded(&state, id));
        open.map(|id| state.jobs[id].clone()).collect()
    }

    fn is_stranded(&self, state: &State, id: &str) -> bool {
        let Status::InFlight(stream) = state.jobs[id].status else { return false };
        let worker = &state.streams[&stream].link.worker;
        self.0.book.is_exempt(worker, id) && !self.0.book.is_running(worker, id)
    }

    /// Reports whether the server accepts connections.
    pub fn is_up(&self) -> bool {
        self.state().is_up
    }

    /// Stops the server. Jobs in flight become ready. The caller must also reset the connections, with
    /// `Network::cut_server`.
    pub fn go_down(&self) {
        self.note(format_args!("down"));
        let mut state = self.state();
        state.is_up = false;
        let streams: Vec<u64> = state.streams.keys().copied().collect();
        streams.into_iter().for_each(|stream| self.requeue(&mut state, stream));
    }

    /// Starts the server again.
    pub fn come_up(&self) {
        self.note(format_args!("up"));
        self.state().is_up = true;
    }

    /// Opens a take stream. Returns a guard that closes the stream when dropped, and a receiver of the stream's lines.
    pub(super) fn take(
        &self,
        link: &Arc<Link>,
        prefetch: usize,
        queues: Vec<String>,
    ) -> (Disconnect, mpsc::UnboundedReceiver<Bytes>) {
        let (lines, received) = mpsc::unbounded_channel();
        let mut state = self.state();
        let stream = Stream { link: Arc::clone(link), prefetch, queues, held: BTreeSet::new(), lines };
        state.streams.insert(link.id, stream);
        self.fill(&mut state);
        (Disconnect { server: self.clone(), stream: link.id }, received)
    }

    /// Removes a stream, if it is still open, and requeues its jobs.
    fn requeue(&self, state: &mut State, stream: u64) {
        let Some(Stream { held, link, .. }) = state.streams.remove(&stream) else { return };
        self.note(format_args!("stream {stream} of {} has ended, it held {held:?}", link.worker));
        self.0.book.stream_ended(&link, &held);
        for id in held {
            if let Some(record) = state.jobs.get_mut(&id) {
                record.status = Status::Ready;
                state.ready.insert((record.job.priority, id));
            }
        }
        self.fill(state);
    }

    /// Sends ready jobs to each stream until its prefetch is full. The order of the streams is random, as on a real server.
    fn fill(&self, state: &mut State) {
        let State { rng, jobs, ready, streams, .. } = state;
        let mut order: Vec<u64> = streams.keys().copied().collect();
        rng.shuffle(&mut order);
        for number in order {
            let Some(stream) = streams.get_mut(&number) else { continue };
            let fits = |id: &str, queues: &[String]| queues.is_empty() || queues.contains(&jobs[id].job.queue);
            let free = stream.prefetch - stream.held.len();
            let taken: Vec<_> = ready.iter().filter(|(_, id)| fits(id, &stream.queues)).take(free).cloned().collect();
            for place in taken {
                ready.remove(&place);
                let (_, id) = place;
                let Some(record) = jobs.get_mut(&id) else { continue };
                record.status = Status::InFlight(number);
                record.delivered = Some(Instant::now());
                self.note(format_args!("{id} attempt {} to {} by {number}", record.attempts, stream.link.worker));
                self.0.book.delivered(&stream.link, &id, record.attempts);
                // The send fails if the connection has closed. The drop of `Disconnect` then requeues the job.
                let _ = stream.lines.send(self.line(&id, record));
                stream.held.insert(id);
            }
        }
    }

    fn line(&self, id: &str, record: &Record) -> Bytes {
        let Record { job, attempts, ready_at, .. } = record;
        let NewJob { queue, priority, retry_limit, malformed, script } = job;
        let job_type = if *malformed == Some(Malformed::Field) { "7" } else { "\"play\"" };
        let payload = match malformed {
            Some(Malformed::TooLong) => format!("\"{}\"", "x".repeat(MAX_JOB_SIZE)),
            _ => serde_json::to_string(script).unwrap(),
        };
        let ready_at = self.unix_ms(*ready_at);
        Bytes::from(format!(
            "{{\"id\":\"{id}\",\"type\":{job_type},\"queue\":\"{queue}\",\"priority\":{priority},\"status\":\"in_flight\",\
             \"payload\":{payload},\"ready_at\":{ready_at},\"attempts\":{attempts},\"retry_limit\":{retry_limit}}}\n"
        ))
    }

    fn unix_ms(&self, time: Instant) -> u64 {
        EPOCH_MS + u64::try_from(time.saturating_duration_since(self.0.start).as_millis()).unwrap_or(u64::MAX)
    }

    /// Accepts a report of successes. Returns the ids that were not in flight.
    pub(super) fn succeed(&self, reporter: &Reporter<'_>, ids: &BTreeSet<String>) -> Vec<String> {
        let mut state = self.state();
        let mut not_found = Vec::new();
        for id in ids {
            match state.jobs.get_mut(id) {
                Some(record) if matches!(record.status, Status::InFlight(_)) => {
                    self.0.book.success_counted(reporter.link, id);
                    let Status::InFlight(stream) = std::mem::replace(&mut record.status, Status::Completed) else {
                        continue;
                    };
                    state.streams.get_mut(&stream).map(|stream| stream.held.remove(id));
                    state.open.remove(id);
                }
                _ => not_found.push(id.clone()),
            }
        }
        self.fill(&mut state);
        not_found
    }

    /// Accepts a report of a failure. Returns false, without any effect, if the job is not in flight.
    pub(super) fn fail(&self, reporter: &Reporter<'_>, id: &str, report: &Value) -> bool {
        let mut state = self.state();
        let State { rng, jobs, open, streams, .. } = &mut *state;
        let Some(record) = jobs.get_mut(id) else { return false };
        let Status::InFlight(stream) = record.status else { return false };
        let message = report["message"].as_str().unwrap_or_default();
        self.0.book.failure_counted(reporter.link, id, record.attempts, message);
        streams.get_mut(&stream).map(|stream| stream.held.remove(id));
        record.attempts += 1;
        let longest = longest_backoff(record.attempts);
        let wait = match report["retry_at"].as_u64() {
            Some(at) => Duration::from_millis(at.saturating_sub(self.unix_ms(Instant::now()))),
            None => longest.mul_f64(0.5 + rng.f64() / 2.0),
        };
        record.ready_at = Instant::now() + wait;
        let is_dead =
            report["kill"] == json!(true) || report["retry_at"].is_null() && record.attempts > record.job.retry_limit;
        record.status = if is_dead { Status::Dead } else { Status::Scheduled };
        if is_dead {
            open.remove(id);
        }
        self.fill(&mut state);
        self.0.changed.notify_one();
        true
    }

    /// Returns a job as `GET /jobs/{id}` shows it, or `None` if the API does not show it.
    pub(super) fn show(&self, id: &str) -> Option<Value> {
        let state = self.state();
        let record = state.jobs.get(id)?;
        if record.status == Status::Completed && !state.keeps_completed {
            return None;
        }
        Some(json!({
            "id": id, "type": "play", "queue": record.job.queue, "priority": record.job.priority,
            "status": record.status.name(), "attempts": record.attempts, "payload": record.job.script,
        }))
    }

    /// Makes each scheduled job ready at its `ready_at`. Never returns.
    async fn keep_time(self) {
        loop {
            let next = {
                let mut state = self.state();
                let now = Instant::now();
                let State { jobs, ready, .. } = &mut *state;
                let mut next = None;
                for (id, record) in jobs.iter_mut().filter(|(_, record)| record.status == Status::Scheduled) {
                    if record.ready_at <= now {
                        record.status = Status::Ready;
                        ready.insert((record.job.priority, id.clone()));
                    } else {
                        next = Some(next.map_or(record.ready_at, |next: Instant| next.min(record.ready_at)));
                    }
                }
                self.fill(&mut state);
                next
            };
            tokio::select! {
                biased;
                () = self.0.changed.notified() => {}
                () = async {
                    match next {
                        Some(next) => sleep_until(next).await,
                        None => std::future::pending().await,
                    }
                } => {}
            }
        }
    }
}

/// The `max_job_size` setting of the simulated workers, in bytes.
pub const MAX_JOB_SIZE: usize = 4000;

/// A guard that closes a take stream and requeues the stream's jobs when dropped. The guard is dropped when the connection ends.
pub struct Disconnect {
    server: Server,
    stream: u64,
}

impl Drop for Disconnect {
    fn drop(&mut self) {
        let mut state = self.server.state();
        self.server.requeue(&mut state, self.stream);
    }
}
