//! The API: one function per route, from a request to its answer.
//!
//! A handler reads, takes one step in the store, and writes. The store is locked for that step
//! only, so neither a slow client nor a large body holds up the others.

use std::collections::BTreeSet;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderName};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Request, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::PROTOCOL_VERSION;
use super::answer::{Answer, JSON, NDJSON, Rejection, json, ndjson, no_content};
use super::id::JobId;
use super::job::{ErrorRecord, Job, JobView};
use super::order::{BulkRequest, EnqueueRequest, OrderError};
use super::page::{Links, PageRequest};
use super::query::{FILTERS, Fields, Filter};
use super::report::{Failure, Successes};
use super::route::Route;
use super::state::Enqueued;
use super::store::Store;
use super::take::{self, TakeRequest};

/// The real server reads bodies of any size; this one shares its memory with a worker.
const MAX_BODY_BYTES: usize = 256 * 1024 * 1024;
/// The real server's default for a client that does not ask.
const DEFAULT_PREFETCH: usize = 1;
/// Done, ready again, unknown: for a worker it is all the same, the report came to nothing.
const NOT_IN_FLIGHT: &str = "job not found in in-flight set";
const NO_SUCH_JOB: &str = "job not found";

/// Jobs in JSON. A struct and not `json!`, which would take the payloads apart and put them
/// together differently.
#[derive(Serialize)]
struct JobList<'a> {
    jobs: Vec<JobView<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pages: Option<Links>,
}

/// A job's failed attempts in JSON.
#[derive(Serialize)]
struct ErrorList {
    errors: Vec<ErrorRecord>,
    pages: Links,
}

/// Answers one request.
pub(super) async fn answer(store: Store, request: Request<Incoming>) -> Answer {
    let (head, body) = request.into_parts();
    match route(&store, &head, body).await {
        Ok(answer) => answer,
        Err(rejection) => rejection.into(),
    }
}

/// In the order of the real server: path and method, what the client accepts, then the rest.
async fn route(store: &Store, head: &Parts, body: Incoming) -> Result<Answer, Rejection> {
    let route = Route::parse(&head.method, head.uri.path());
    check_accept(&head.headers, matches!(route, Ok(Route::Take)), route.is_err())?;
    let query = head.uri.query().unwrap_or_default();
    match route? {
        Route::Health => Ok(json(StatusCode::OK, &json!({"status": "ok"}))),
        Route::Version => Ok(json(StatusCode::OK, &json!({"version": PROTOCOL_VERSION}))),
        Route::Queues => Ok(queues(store)),
        Route::Enqueue => enqueue(store, read(head, body).await?),
        Route::EnqueueBulk => enqueue_bulk(store, read(head, body).await?),
        Route::List => list(store, query),
        Route::Count => count(store, query),
        Route::DeleteMatching => delete_matching(store, query),
        Route::Take => take(store, query),
        Route::Get(id) => get(store, &id),
        Route::Delete(id) => delete(store, &id),
        Route::Complete(id) => complete(store, &id),
        Route::CompleteBulk => complete_bulk(store, read(head, body).await?),
        Route::Fail(id) => fail(store, &id, read(head, body).await?),
        Route::Errors(id) => errors(store, &id, query),
        Route::Error(id, attempt) => error(store, &id, attempt),
        Route::Reset => Ok(reset(store)),
    }
}

/// JSON and nothing else: this server speaks no MessagePack and no server-sent events.
fn check_accept(headers: &HeaderMap, is_take: bool, is_lost: bool) -> Result<(), Rejection> {
    let accept = header(headers, ACCEPT).unwrap_or("*/*");
    let served = if is_take { NDJSON } else { JSON };
    let fits = [served, JSON, "*/*"].iter().any(|kind| accept.contains(kind));
    // A wrong path or method is the more useful thing to hear about.
    if fits || is_lost { Ok(()) } else { Err(Rejection::NotAcceptable(served)) }
}

/// Reads a JSON body; a request that does not name its type is taken to mean JSON.
async fn read<T: DeserializeOwned>(head: &Parts, body: Incoming) -> Result<T, Rejection> {
    if !header(&head.headers, CONTENT_TYPE).unwrap_or(JSON).contains(JSON) {
        return Err(Rejection::NotJson);
    }
    let bytes = collect(body).await?;
    serde_json::from_slice(&bytes).map_err(|error| Rejection::BadRequest(format!("invalid JSON: {error}")))
}

/// The whole body. One that is too large is turned down while it is still coming in.
async fn collect(body: Incoming) -> Result<Bytes, Rejection> {
    let body = Limited::new(body, MAX_BODY_BYTES).collect().await;
    let body = body.map_err(|e| Rejection::BadRequest(format!("failed to read body: {e}")))?;
    Ok(body.to_bytes())
}

/// A header's text; one that is not text matches nothing.
fn header(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).map(|value| value.to_str().unwrap_or_default())
}

/// Queues exist by having jobs, finished ones included.
fn queues(store: &Store) -> Answer {
    let queues: BTreeSet<String> = store.with(|state, _| state.jobs().map(|job| job.spec.queue.clone()).collect());
    json(StatusCode::OK, &json!({"queues": queues}))
}

/// 201 for a new job, 200 for one that was already there.
fn enqueue(store: &Store, request: EnqueueRequest) -> Result<Answer, Rejection> {
    let order = request.into_order()?;
    let Enqueued { job, duplicate } = store.with(|state, now| state.enqueue(now, order));
    let status = if duplicate { StatusCode::OK } else { StatusCode::CREATED };
    Ok(json(status, &JobView::enqueued(&job, duplicate)))
}

/// All or nothing: every order is checked before the first one is accepted.
fn enqueue_bulk(store: &Store, request: BulkRequest) -> Result<Answer, Rejection> {
    let orders = request
        .jobs
        .into_iter()
        .enumerate()
        .map(|(index, request)| request.into_order().map_err(|error| error.at(index)));
    let orders = orders.collect::<Result<Vec<_>, OrderError>>()?;
    let enqueued: Vec<Enqueued> =
        store.with(|state, now| orders.into_iter().map(|order| state.enqueue(now, order)).collect());
    // 200 only if every job was already there; an empty bulk is 201, as in the real server.
    let nothing_new = !enqueued.is_empty() && enqueued.iter().all(|one| one.duplicate);
    let status = if nothing_new { StatusCode::OK } else { StatusCode::CREATED };
    let jobs = enqueued.iter().map(|one| JobView::enqueued(&one.job, one.duplicate)).collect();
    Ok(json(status, &JobList { jobs, pages: None }))
}

/// One page of the jobs that match, with their payloads.
fn list(store: &Store, query: &str) -> Result<Answer, Rejection> {
    let known = [&FILTERS[..], &["from", "order", "limit"]].concat();
    let mut fields = Fields::parse(query, &known).map_err(|e| Rejection::bad_query(&e))?;
    let cursor = fields.text("from").map(|id| cursor(&id)).transpose()?;
    let page = PageRequest::parse(&mut fields, cursor).map_err(|e| Rejection::bad_query(&e))?;
    page.check_limit().map_err(Rejection::BadRequest)?;
    let filter = filter(&mut fields)?;
    // Clones share their payloads, so a page of large jobs is not copied under the lock.
    let mut jobs: Vec<Job> = store.with(|state, _| {
        let jobs = state.jobs_from(page.cursor, page.direction);
        jobs.filter(|job| filter.matches(job)).take(page.reach()).cloned().collect()
    });
    let pages = page.cut(&mut jobs, |job| job.id, "/jobs", &filter.to_query());
    let jobs = jobs.iter().map(JobView::full).collect();
    Ok(json(StatusCode::OK, &JobList { jobs, pages: Some(pages) }))
}

/// The real server takes any text for a cursor and then finds nothing; an error helps more.
fn cursor(id: &str) -> Result<JobId, Rejection> {
    JobId::parse(id).ok_or_else(|| Rejection::BadRequest(format!("invalid job ID: {id:?}")))
}

/// The filters of a list, without its pages.
fn count(store: &Store, query: &str) -> Result<Answer, Rejection> {
    let filter = only_filter(query)?;
    let count = store.with(|state, _| state.jobs().filter(|job| filter.matches(job)).count());
    Ok(json(StatusCode::OK, &json!({"count": count})))
}

/// No filter at all deletes everything, as in the real server.
fn delete_matching(store: &Store, query: &str) -> Result<Answer, Rejection> {
    let filter = only_filter(query)?;
    let deleted = store.with(|state, _| state.delete_matching(|job| filter.matches(job)));
    Ok(json(StatusCode::OK, &json!({"deleted": deleted})))
}

/// The query of a route that knows no pages.
fn only_filter(query: &str) -> Result<Filter, Rejection> {
    let mut fields = Fields::parse(query, &FILTERS).map_err(|e| Rejection::bad_query(&e))?;
    filter(&mut fields)
}

/// Which jobs are meant, once the fields of a page are taken out.
fn filter(fields: &mut Fields) -> Result<Filter, Rejection> {
    let filter = Filter::parse(fields).map_err(|e| Rejection::bad_query(&e))?;
    filter.check_ids().map_err(Rejection::BadRequest)?;
    match fields.text("filter") {
        // Ignoring it would answer, or delete, jobs that were not meant.
        Some(_) => Err(Rejection::BadRequest("invalid filter: jq needs a real server".to_owned())),
        None => Ok(filter),
    }
}

/// The headers go out at once, with or without jobs; the body ends with the connection.
fn take(store: &Store, query: &str) -> Result<Answer, Rejection> {
    let request = Fields::parse(query, &["prefetch", "queue"]).and_then(|mut fields| {
        let prefetch = fields.value("prefetch")?.unwrap_or(DEFAULT_PREFETCH);
        Ok(TakeRequest { prefetch, queues: fields.list("queue")? })
    });
    let request = request.map_err(|e| Rejection::bad_query(&e))?;
    Ok(ndjson(take::frames(store.clone(), request)))
}

/// Any job, in whatever state.
fn get(store: &Store, id: &str) -> Result<Answer, Rejection> {
    let job = JobId::parse(id).and_then(|id| store.with(|state, _| state.get(id).cloned()));
    let job = job.ok_or(Rejection::NotFound(NO_SUCH_JOB))?;
    Ok(json(StatusCode::OK, &JobView::full(&job)))
}

/// Also a job in flight; its worker's report will then find nothing.
fn delete(store: &Store, id: &str) -> Result<Answer, Rejection> {
    let deleted = JobId::parse(id).is_some_and(|id| store.with(|state, _| state.delete(id)));
    if deleted { Ok(no_content()) } else { Err(Rejection::NotFound(NO_SUCH_JOB)) }
}

/// A completed job is gone, unless its retention keeps it.
fn complete(store: &Store, id: &str) -> Result<Answer, Rejection> {
    let done = JobId::parse(id).is_some_and(|id| store.with(|state, now| state.complete(now, id)));
    if done { Ok(no_content()) } else { Err(Rejection::NotFound(NOT_IN_FLIGHT)) }
}

/// Acknowledges what it can and names the rest. An id that is there twice counts once.
fn complete_bulk(store: &Store, request: Successes) -> Result<Answer, Rejection> {
    if request.ids.is_empty() {
        return Err(Rejection::BadRequest("ids must not be empty".to_owned()));
    }
    // One lock for all of them: a large bulk costs the streams one wait, not one per job.
    let mut seen = BTreeSet::new();
    let ids = request.ids.iter().filter(|id| seen.insert(id.as_str()));
    let not_found: Vec<&String> =
        store.with(|state, now| ids.filter(|id| !JobId::parse(id).is_some_and(|id| state.complete(now, id))).collect());
    if not_found.is_empty() {
        return Ok(no_content());
    }
    Ok(json(StatusCode::UNPROCESSABLE_ENTITY, &json!({"not_found": not_found})))
}

/// Answers with the job, so that a worker can log when it will come back, or that it will not.
fn fail(store: &Store, id: &str, failure: Failure) -> Result<Answer, Rejection> {
    // The report was read before this: a bad one is 400 even for a job that is not there.
    let id = JobId::parse(id).ok_or(Rejection::NotFound(NOT_IN_FLIGHT))?;
    let job = store.with(|state, now| state.fail(now, id, failure, fastrand::f64()));
    let job = job.ok_or(Rejection::NotFound(NOT_IN_FLIGHT))?;
    Ok(json(StatusCode::OK, &JobView::bare(&job)))
}

/// The failed attempts of a job that still exists; they go when it goes.
fn errors(store: &Store, id: &str, query: &str) -> Result<Answer, Rejection> {
    let page = Fields::parse(query, &["from", "order", "limit"]).and_then(|mut fields| {
        let cursor = fields.value::<u32>("from")?;
        PageRequest::parse(&mut fields, cursor)
    });
    let page = page.map_err(|e| Rejection::bad_query(&e))?;
    page.check_limit().map_err(Rejection::BadRequest)?;
    let errors = JobId::parse(id).and_then(|id| store.with(|state, _| state.errors_on(id, &page)));
    let mut errors = errors.ok_or(Rejection::NotFound(NO_SUCH_JOB))?;
    let path = format!("/jobs/{id}/errors");
    let pages = page.cut(&mut errors, |error| error.attempt, &path, "");
    Ok(json(StatusCode::OK, &ErrorList { errors, pages }))
}

/// One failed attempt. A missing job and a missing attempt have different texts.
fn error(store: &Store, id: &str, attempt: u32) -> Result<Answer, Rejection> {
    let errors = JobId::parse(id).and_then(|id| {
        store.with(|state, _| {
            let errors = state.errors(id)?;
            Some(errors.iter().find(|error| error.attempt == attempt).cloned())
        })
    });
    let error = errors.ok_or(Rejection::NotFound(NO_SUCH_JOB))?;
    let error = error.ok_or(Rejection::NotFound("error record not found"))?;
    Ok(json(StatusCode::OK, &error))
}

/// Wipes everything. Streams stay open; what they held is not theirs any more.
fn reset(store: &Store) -> Answer {
    store.with(|state, _| state.delete_matching(|_| true));
    no_content()
}
