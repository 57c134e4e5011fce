//! [`Weather`]: what befalls a request at the server, or in front of it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fastrand::Rng;
use tokio::time::Instant;

use super::checks::Book;
use super::draw::{chance, millis, one_of};

/// What a request asks for.
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

/// What befalls one request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// The answer comes late.
    Late(Duration),
    /// The request has its effect, and the connection breaks before the answer.
    AnswerLost,
    /// No answer comes, whether the request has its effect or not.
    Unanswered {
        /// Whether it has.
        with_effect: bool,
    },
    /// Something else answers, or the server answers something else.
    Instead(Answer),
}

/// An answer that is not the one that was asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Whether the body is the JSON of the server, or a page.
    pub is_servers: bool,
    /// `Retry-After`, in seconds.
    pub retry_after: Option<u64>,
    /// Whether the request has its effect all the same.
    pub with_effect: bool,
}

impl Answer {
    /// Makes an answer of the server, without effect.
    pub fn of(status: u16) -> Self {
        Self { status, is_servers: true, retry_after: None, with_effect: false }
    }

    /// Makes a page, as proxies show them.
    pub fn page(status: u16) -> Self {
        Self { is_servers: false, ..Self::of(status) }
    }

    /// Whether the worker may drop a report for it.
    pub fn is_final(self) -> bool {
        matches!(self.status, 400 | 406 | 413 | 415 | 422)
    }
}

/// The kinds of faults. Each seed draws those that it has: a fault that never comes cannot hide another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// 500, 502, 503, with or without effect.
    ServerErrors,
    /// 401, 403, 407, 408, 421, 425, 429: passing refusals.
    Refusals,
    /// 400, 413, 422: final refusals.
    Finals,
    /// 404 of something else than the server.
    ForeignNotFound,
    /// A page with status 200.
    Pages,
    /// Answers that are late.
    Late,
    /// Answers that are lost after the effect.
    Lost,
    /// Requests without an answer.
    Unanswered,
}

/// All of them.
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

/// What requests meet; clones are of one weather.
#[derive(Clone)]
pub struct Weather(Arc<Mutex<State>>, Book);

struct State {
    rng: Rng,
    kinds: Vec<Kind>,
    /// How likely a request meets a fault.
    level: f64,
    /// Faults that are laid for certain requests.
    laid: Vec<Laid>,
    /// Until when a `Retry-After` may keep a worker waiting.
    retry_after: Option<Instant>,
}

/// A fault for the next so many requests of a kind, about one job or any.
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
    /// Makes fair weather in which those faults are possible.
    pub fn new(rng: Rng, kinds: Vec<Kind>, book: Book) -> Self {
        let state = State { rng, kinds, level: 0.0, laid: Vec::new(), retry_after: None };
        Self(Arc::new(Mutex::new(state)), book)
    }

    /// Lets that share of the requests meet a fault from now on.
    pub fn set_level(&self, level: f64) {
        self.0.lock().unwrap().level = level;
    }

    /// Lets the next so many requests of a kind meet a fault.
    pub fn lay(&self, call: Call, times: u32, fault: Fault) {
        self.0.lock().unwrap().laid.push(Laid { call, id: None, times, fault });
    }

    /// Lets all requests of a kind about one job meet a fault.
    pub fn lay_for(&self, id: &str, call: Call, fault: Fault) {
        self.0.lock().unwrap().laid.push(Laid { call, id: Some(id.to_owned()), times: u32::MAX, fault });
    }

    /// Takes away what was laid, and the level.
    pub fn clear(&self) {
        let mut state = self.0.lock().unwrap();
        state.level = 0.0;
        state.laid.clear();
    }

    /// Until when the longest `Retry-After` so far lasts.
    pub fn retry_after(&self) -> Option<Instant> {
        self.0.lock().unwrap().retry_after
    }

    /// Draws what befalls a request.
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
        // Rare even where they are possible: each may cost a report.
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
