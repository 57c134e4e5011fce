//! [`Weather`]: the faults injected into requests. They imitate faults of the server and of a proxy in front of the server.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fastrand::Rng;
use tokio::time::Instant;

use super::checks::Book;
use super::draw::{chance, millis, one_of};

/// The kind of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// `GET /jobs/take`.
    Take,
    /// `POST /jobs/success`.
    Successes,
    /// `POST /jobs/{id}/failure`.
    Failure,
    /// `GET /jobs/{id}`.
    Look,
    /// Anything else.
    Other,
}

/// A fault injected into one request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// The answer is late.
    Late(Duration),
    /// The request takes effect, but the connection breaks before the answer is sent.
    AnswerLost,
    /// No answer arrives.
    Unanswered {
        /// Whether the request takes effect.
        with_effect: bool,
    },
    /// A made-up answer, which looks like an answer from the server or from a proxy, replaces the real one.
    Instead(Answer),
}

/// A made-up answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Whether the body is JSON, as in an answer from the server. If false, the body is an HTML page, as from a proxy.
    pub is_servers: bool,
    /// The `Retry-After` header, in seconds.
    pub retry_after: Option<u64>,
    /// Whether the request takes effect in spite of this answer.
    pub with_effect: bool,
}

impl Answer {
    /// Returns an answer from the server with this status. The request has no effect.
    pub fn of(status: u16) -> Self {
        Self { status, is_servers: true, retry_after: None, with_effect: false }
    }

    /// Returns an HTML page from a proxy with this status. The request has no effect.
    pub fn page(status: u16) -> Self {
        Self { is_servers: false, ..Self::of(status) }
    }

    /// Reports whether the worker may drop a report after this answer.
    pub fn is_final(self) -> bool {
        matches!(self.status, 400 | 406 | 413 | 415 | 422)
    }
}

/// A kind of fault. Each seed draws its own set of kinds, so that no kind always hides the effects of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Statuses 500, 502, 503. The request may take effect in spite of this answer.
    ServerErrors,
    /// Statuses 401, 403, 407, 408, 421, 425, 429: temporary refusals.
    Refusals,
    /// Statuses 400, 413, 422: final refusals. Most draws of this kind give a short delay instead.
    Finals,
    /// Status 404 with an HTML page, as from a proxy.
    ForeignNotFound,
    /// Status 200 with an HTML page, as from a proxy.
    Pages,
    /// Late answers.
    Late,
    /// Lost answers to requests that have taken effect.
    Lost,
    /// Requests without an answer.
    Unanswered,
}

/// All kinds of faults.
pub const KINDS: [Kind; 8] = [
    Kind::ServerErrors,
    Kind::Refusals,
    Kind::Finals,
    Kind::ForeignNotFound,
    Kind::Pages,
    Kind::Late,
    Kind::Lost,
    Kind::Unanswered,
];

/// The random and scheduled faults of requests. Clones share them.
#[derive(Clone)]
pub struct Weather(Arc<Mutex<State>>, Book);

struct State {
    rng: Rng,
    kinds: Vec<Kind>,
    /// The probability that a request gets a random fault.
    level: f64,
    /// The faults scheduled for certain requests.
    laid: Vec<Laid>,
    /// The time at which the last `Retry-After` ends. Each `Retry-After` is capped at 300 s, as in the worker.
    retry_after: Option<Instant>,
}

/// A fault scheduled for the next `times` requests of a kind. If `id` is set, only requests about this job count.
struct Laid {
    call: Call,
    id: Option<String>,
    times: u32,
    fault: Fault,
}

impl Laid {
    fn fits(&self, call: Call, ids: &BTreeSet<String>) -> bool {
        self.call == call && self.times > 0 && self.id.as_ref().is_none_or(|id| ids.contains(id))
    }
}

impl Weather {
    /// Returns weather without faults. After `set_level`, requests get random faults of these kinds.
    pub fn new(rng: Rng, kinds: Vec<Kind>, book: Book) -> Self {
        let state = State { rng, kinds, level: 0.0, laid: Vec::new(), retry_after: None };
        Self(Arc::new(Mutex::new(state)), book)
    }

    /// Sets the probability that a request gets a random fault.
    pub fn set_level(&self, level: f64) {
        self.0.lock().unwrap().level = level;
    }

    /// Schedules a fault for the next `times` requests of a kind.
    pub fn lay(&self, call: Call, times: u32, fault: Fault) {
        self.0.lock().unwrap().laid.push(Laid { call, id: None, times, fault });
    }

    /// Schedules a fault for all requests of a kind about one job.
    pub fn lay_for(&self, id: &str, call: Call, fault: Fault) {
        self.0.lock().unwrap().laid.push(Laid { call, id: Some(id.to_owned()), times: u32::MAX, fault });
    }

    /// Removes all scheduled and random faults.
    pub fn clear(&self) {
        let mut state = self.0.lock().unwrap();
        state.level = 0.0;
        state.laid.clear();
    }

    /// Returns the time at which the last `Retry-After` ends, if any. Each `Retry-After` is capped at 300 s, as in the worker.
    pub fn retry_after(&self) -> Option<Instant> {
        self.0.lock().unwrap().retry_after
    }

    /// Draws the fault of a request, if any. A scheduled fault takes precedence over random faults.
    pub fn draw(&self, call: Call, ids: &BTreeSet<String>) -> Option<Fault> {
        let mut state = self.0.lock().unwrap();
        let State { rng, kinds, level, laid, .. } = &mut *state;
        let fault = match laid.iter_mut().find(|laid| laid.fits(call, ids)) {
            Some(laid) => {
                laid.times -= 1;
                Some(laid.fault)
            }
            None if kinds.is_empty() || !chance(rng, *level) => None,
            None => Some(draw_fault(one_of(rng, kinds), rng)),
        }?;
        if let Fault::Instead(Answer { retry_after: Some(seconds), .. }) = fault {
            let until = Instant::now() + Duration::from_secs(seconds.min(300));
            state.retry_after = state.retry_after.max(Some(until));
        }
        self.1.fault(name(fault));
        Some(fault)
    }
}

fn draw_fault(kind: Kind, rng: &mut Rng) -> Fault {
    let instead = |status, is_servers, retry_after, with_effect| {
        Fault::Instead(Answer { status, is_servers, retry_after, with_effect })
    };
    let retry_after = rng.bool().then(|| one_of(rng, &[1, 3, 10, 20, 1000]));
    match kind {
        Kind::ServerErrors => match one_of(rng, &[500, 502, 503, 503]) {
            503 => instead(503, rng.bool(), retry_after.filter(|seconds| *seconds < 1000), rng.bool()),
            status => instead(status, rng.bool(), None, rng.bool()),
        },
        Kind::Refusals => match one_of(rng, &[401, 403, 407, 408, 421, 425, 429, 429, 429]) {
            429 => instead(429, rng.bool(), retry_after, false),
            status => instead(status, rng.bool(), None, false),
        },
        // Inject a short delay in most cases, because the worker may drop a report after each final refusal.
        Kind::Finals if chance(rng, 0.7) => Fault::Late(millis(rng, 0..300)),
        Kind::Finals => instead(one_of(rng, &[400, 413, 422]), rng.bool(), None, false),
        Kind::ForeignNotFound => instead(404, false, None, false),
        Kind::Pages => instead(200, false, None, false),
        Kind::Late => Fault::Late(millis(rng, 0..20_000)),
        Kind::Lost => Fault::AnswerLost,
        Kind::Unanswered => Fault::Unanswered { with_effect: rng.bool() },
    }
}

fn name(fault: Fault) -> &'static str {
    match fault {
        Fault::Late(_) => "answer late",
        Fault::AnswerLost => "answer lost after the effect",
        Fault::Unanswered { .. } => "no answer",
        Fault::Instead(answer) => match answer.status {
            200 => "a page with 200",
            404 => "404 of a proxy",
            429 if answer.retry_after.is_some() => "429 with Retry-After",
            429 => "429",
            400..500 if answer.is_final() => "final 4xx",
            400..500 => "passing 4xx",
            _ if answer.with_effect => "5xx after the effect",
            _ => "5xx",
        },
    }
}
