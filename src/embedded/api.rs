//! The API: one function per endpoint, which turns a request into an answer.
//!
//! Each function parses the request, runs one operation on the store, and serializes the answer. The store is locked only
//! during the operation, so neither a slow client nor a large body delays other requests.

use std::collections::BTreeSet;

use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::http::request::Parts;
use hyper::{Request, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::PROTOCOL_VERSION;
use super::answer::{HttpAnswer, Rejection, no_content, streamed, whole};
use super::endpoint::Endpoint;
use super::format::{Format, StreamFormat};
use super::id::StoredJobId;
use super::job::{ErrorRecord, JobView, StoredJob};
use super::jobs::Enqueued;
use super::order::{BulkRequest, EnqueueRequest, OrderError};
use super::page::{Links, PageRequest};
use super::patch::PatchRequest;
use super::query::{FILTERS, Fields, Filter, parse_id};
use super::report::{FailureBody, SuccessBody};
use super::store::Store;
use super::take;

/// The maximum size of a request's body, in bytes. The real server has no maximum, but this server may share a process,
/// and so its memory, with a worker.
const MAX_BODY_BYTES: usize = 256 * 1024 * 1024;
/// The real server's default for `prefetch`.
const DEFAULT_PREFETCH: usize = 1;
/// The error text for a report about a job that is finished, requeued or unknown.
const NOT_IN_FLIGHT: &str = "job not found in in-flight set";
const NO_SUCH_JOB: &str = "job not found";

/// A list of jobs in an answer. The list is not built with `json!`, because `json!` would parse the payloads and change
/// their text, for example the order of keys.
#[derive(Serialize)]
struct JobList<'a> {
    jobs: Vec<JobView<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pages: Option<Links>,
}

#[derive(Serialize)]
struct ErrorList {
    errors: Vec<ErrorRecord>,
    pages: Links,
}

/// Answers one request. The checks run in the real server's order: first for a wrong method (405), then for a format that
/// the client does not accept (406), then all others.
pub(super) async fn answer(store: Store, request: Request<Incoming>) -> HttpAnswer {
    let (head, body) = request.into_parts();
    let endpoint = Endpoint::parse(&head.method, head.uri.path());
    let format = match endpoint {
        // Do not check the `accept` header here, because a take stream has its own formats, and a 405 has no body.
        Ok(Endpoint::Take) | Err(Rejection::WrongMethod(_)) => Format::Json,
        _ => match Format::accepted(&head.headers) {
            Ok(format) => format,
            Err(error) => return error.into_answer(Format::Json),
        },
    };
    let call = Call { store: &store, head: &head, format };
    let answer = match endpoint {
        Ok(endpoint) => call.answer(endpoint, body).await,
        Err(error) => Err(error),
    };
    answer.unwrap_or_else(|error| error.into_answer(format))
}

/// A request without its body, with the store and the format of the answer.
struct Call<'a> {
    store: &'a Store,
    head: &'a Parts,
    /// The format of any answer that is not a take stream.
    format: Format,
}

impl Call<'_> {
    async fn answer(&self, endpoint: Endpoint, body: Incoming) -> Result<HttpAnswer, Rejection> {
        match endpoint {
            Endpoint::Health => Ok(self.ok(&json!({"status": "ok"}))),
            Endpoint::Version => Ok(self.ok(&json!({"version": PROTOCOL_VERSION}))),
            Endpoint::Queues => Ok(self.queues()),
            Endpoint::Enqueue => self.enqueue(self.read(body).await?),
            Endpoint::EnqueueBulk => self.enqueue_bulk(self.read(body).await?),
            Endpoint::List => self.list(),
            Endpoint::Count => self.count(),
            Endpoint::PatchMatching => self.patch_matching(self.read(body).await?),
            Endpoint::DeleteMatching => self.delete_matching(),
            Endpoint::Take => self.take(),
            Endpoint::Get(id) => self.get(&id),
            Endpoint::Patch(id) => self.patch(&id, self.read(body).await?),
            Endpoint::Delete(id) => self.delete(&id),
            Endpoint::Complete(id) => self.complete(&id),
            Endpoint::CompleteBulk => self.complete_bulk(self.read(body).await?),
            Endpoint::Fail(id) => self.fail(&id, self.read(body).await?),
            Endpoint::Errors(id) => self.errors(&id),
            Endpoint::Error(id, attempt) => self.error(&id, attempt),
            Endpoint::Reset => Ok(self.reset()),
        }
    }

    /// Deserializes the body in the format that the `content-type` header names. Rejects a body as soon as it exceeds the
    /// maximum size.
    async fn read<T: DeserializeOwned>(&self, body: Incoming) -> Result<T, Rejection> {
        let format = Format::of_body(&self.head.headers)?;
        let body = Limited::new(body, MAX_BODY_BYTES).collect().await;
        let body = body.map_err(|e| Rejection::BadRequest(format!("failed to read body: {e}")))?;
        format.read(&body.to_bytes())
    }

    fn query(&self) -> &str {
        self.head.uri.query().unwrap_or_default()
    }

    fn ok(&self, body: &impl Serialize) -> HttpAnswer {
        self.with_status(StatusCode::OK, body)
    }

    fn with_status(&self, status: StatusCode, body: &impl Serialize) -> HttpAnswer {
        whole(self.format, status, body)
    }

    /// Lists the queues that have jobs. Finished jobs count too.
    fn queues(&self) -> HttpAnswer {
        let queues: BTreeSet<String> =
            self.store.with(|jobs, _| jobs.jobs().map(|job| job.spec.queue.clone()).collect());
        self.ok(&json!({"queues": queues}))
    }

    /// Enqueues a job. Answers 201 with the new job, or 200 with the job that already holds the unique key.
    fn enqueue(&self, request: EnqueueRequest) -> Result<HttpAnswer, Rejection> {
        let order = request.into_order()?;
        let Enqueued { job, duplicate } = self.store.with(|jobs, now| jobs.enqueue(now, order));
        let status = if duplicate { StatusCode::OK } else { StatusCode::CREATED };
        Ok(self.with_status(status, &JobView::enqueued(&job, duplicate)))
    }

    /// Enqueues all jobs or none: every order is checked before the first one is enqueued.
    fn enqueue_bulk(&self, request: BulkRequest) -> Result<HttpAnswer, Rejection> {
        let orders = request
            .jobs
            .into_iter()
            .enumerate()
            .map(|(index, request)| request.into_order().map_err(|error| error.at(index)));
        let orders = orders.collect::<Result<Vec<_>, OrderError>>()?;
        let enqueued: Vec<Enqueued> =
            self.store.with(|jobs, now| orders.into_iter().map(|order| jobs.enqueue(now, order)).collect());
        // Answer 200 only if every job is a duplicate. As on the real server, an empty bulk request gets a 201.
        let nothing_new = !enqueued.is_empty() && enqueued.iter().all(|one| one.duplicate);
        let status = if nothing_new { StatusCode::OK } else { StatusCode::CREATED };
        let jobs = enqueued.iter().map(|one| JobView::enqueued(&one.job, one.duplicate)).collect();
        Ok(self.with_status(status, &JobList { jobs, pages: None }))
    }

    /// Lists one page of the matching jobs, with their payloads.
    fn list(&self) -> Result<HttpAnswer, Rejection> {
        let known = [&FILTERS[..], &["from", "order", "limit"]].concat();
        let mut fields = Fields::parse(self.query(), &known)?;
        let cursor = fields.text("from").map(|id| parse_id(&id)).transpose()?;
        let page = PageRequest::parse(&mut fields, cursor)?;
        let filter = filter(&mut fields)?;
        // Cloned jobs share their payloads, so no payload is copied under the lock.
        let mut jobs: Vec<StoredJob> = self.store.with(|jobs, _| {
            let jobs = jobs.jobs_from(page.cursor, page.direction);
            jobs.filter(|job| filter.matches(job)).take(page.reach()).cloned().collect()
        });
        let pages = page.cut(&mut jobs, |job| job.id, "/jobs", &filter.to_query());
        let jobs = jobs.iter().map(JobView::full).collect();
        Ok(self.ok(&JobList { jobs, pages: Some(pages) }))
    }

    fn count(&self) -> Result<HttpAnswer, Rejection> {
        let filter = only_filter(self.query())?;
        let count = self.store.with(|jobs, _| jobs.jobs().filter(|job| filter.matches(job)).count());
        Ok(self.ok(&json!({"count": count})))
    }

    /// Changes a job that is not finished.
    fn patch(&self, id: &str, request: PatchRequest) -> Result<HttpAnswer, Rejection> {
        let patch = request.into_patch()?;
        let id = StoredJobId::parse(id).ok_or(Rejection::NotFound(NO_SUCH_JOB))?;
        let patched =
            self.store.with(|jobs, now| jobs.patch(now, id, &patch).ok_or_else(|| jobs.get(id).map(|job| job.status)));
        match patched {
            Ok(job) => Ok(self.ok(&JobView::bare(&job))),
            Err(Some(status)) => Err(Rejection::Unprocessable(format!("cannot patch job {id} in {status} status"))),
            Err(None) => Err(Rejection::NotFound(NO_SUCH_JOB)),
        }
    }

    /// Changes all matching jobs that are not finished. Without a filter, all jobs match.
    fn patch_matching(&self, request: PatchRequest) -> Result<HttpAnswer, Rejection> {
        let mut fields = Fields::parse(self.query(), &FILTERS)?;
        let filter = Filter::parse(&mut fields)?;
        filter.check_patchable()?;
        filter.check_ids()?;
        let patch = request.into_patch()?;
        check_no_jq(&mut fields)?;
        let patched = self.store.with(|jobs, now| jobs.patch_matching(now, &patch, |job| filter.matches(job)));
        Ok(self.ok(&json!({"patched": patched})))
    }

    /// Deletes all matching jobs. Without a filter, all jobs match.
    fn delete_matching(&self) -> Result<HttpAnswer, Rejection> {
        let filter = only_filter(self.query())?;
        let deleted = self.store.with(|jobs, _| jobs.delete_matching(|job| filter.matches(job)));
        Ok(self.ok(&json!({"deleted": deleted})))
    }

    /// Opens a take stream. The headers are sent at once, even if no job is ready. The body ends only with the
    /// connection.
    fn take(&self) -> Result<HttpAnswer, Rejection> {
        let format = StreamFormat::accepted(&self.head.headers)?;
        let mut fields = Fields::parse(self.query(), &["prefetch", "queue"])?;
        let prefetch = fields.value("prefetch")?.unwrap_or(DEFAULT_PREFETCH);
        let queues = fields.list("queue")?.into_iter().collect();
        Ok(streamed(format, take::frames(self.store.clone(), prefetch, queues, format)))
    }

    /// Answers with the job, whatever its status is.
    fn get(&self, id: &str) -> Result<HttpAnswer, Rejection> {
        let job = StoredJobId::parse(id).and_then(|id| self.store.with(|jobs, _| jobs.get(id).cloned()));
        let job = job.ok_or(Rejection::NotFound(NO_SUCH_JOB))?;
        Ok(self.ok(&JobView::full(&job)))
    }

    /// Deletes a job, even one in flight. A later report about the job gets the same answer as for an unknown job.
    fn delete(&self, id: &str) -> Result<HttpAnswer, Rejection> {
        let deleted = StoredJobId::parse(id).is_some_and(|id| self.store.with(|jobs, _| jobs.delete(id)));
        if deleted { Ok(no_content()) } else { Err(Rejection::NotFound(NO_SUCH_JOB)) }
    }

    /// Completes a job in flight. The job is removed at once, unless its retention keeps it.
    fn complete(&self, id: &str) -> Result<HttpAnswer, Rejection> {
        let done = StoredJobId::parse(id).is_some_and(|id| self.store.with(|jobs, now| jobs.complete(now, id)));
        if done { Ok(no_content()) } else { Err(Rejection::NotFound(NOT_IN_FLIGHT)) }
    }

    /// Completes each listed job that is in flight. If any listed jobs are not in flight, answers 422 with their ids.
    /// A repeated id counts once.
    fn complete_bulk(&self, request: SuccessBody) -> Result<HttpAnswer, Rejection> {
        if request.ids.is_empty() {
            return Err(Rejection::BadRequest("ids must not be empty".to_owned()));
        }
        // Lock once for all jobs, so that a large report wakes the take streams once, not once per job.
        let mut seen = BTreeSet::new();
        let ids = request.ids.iter().filter(|id| seen.insert(id.as_str()));
        let not_found: Vec<&String> = self.store.with(|jobs, now| {
            ids.filter(|id| !StoredJobId::parse(id).is_some_and(|id| jobs.complete(now, id))).collect()
        });
        if not_found.is_empty() {
            return Ok(no_content());
        }
        Ok(self.with_status(StatusCode::UNPROCESSABLE_ENTITY, &json!({"not_found": not_found})))
    }

    /// Records a failure. Answers with the updated job, so that a worker can log when the job is retried, or that it is
    /// dead.
    fn fail(&self, id: &str, failure: FailureBody) -> Result<HttpAnswer, Rejection> {
        // The caller has already parsed the body, so a malformed report gets a 400 even if the job does not exist.
        let id = StoredJobId::parse(id).ok_or(Rejection::NotFound(NOT_IN_FLIGHT))?;
        let job = self.store.with(|jobs, now| jobs.fail(now, id, failure, fastrand::f64()));
        let job = job.ok_or(Rejection::NotFound(NOT_IN_FLIGHT))?;
        Ok(self.ok(&JobView::bare(&job)))
    }

    /// Lists one page of a job's failed attempts. The attempts are removed together with the job.
    fn errors(&self, id: &str) -> Result<HttpAnswer, Rejection> {
        let mut fields = Fields::parse(self.query(), &["from", "order", "limit"])?;
        let cursor = fields.value("from")?;
        let page = PageRequest::parse(&mut fields, cursor)?;
        let errors = StoredJobId::parse(id).and_then(|id| self.store.with(|jobs, _| jobs.errors_on(id, &page)));
        let mut errors = errors.ok_or(Rejection::NotFound(NO_SUCH_JOB))?;
        let path = format!("/jobs/{id}/errors");
        let pages = page.cut(&mut errors, |error| error.attempt, &path, "");
        Ok(self.ok(&ErrorList { errors, pages }))
    }

    /// Answers with one failed attempt. The error text says whether the job or the attempt is missing.
    fn error(&self, id: &str, attempt: u32) -> Result<HttpAnswer, Rejection> {
        let errors = StoredJobId::parse(id).and_then(|id| {
            self.store.with(|jobs, _| {
                let errors = jobs.errors(id)?;
                Some(errors.iter().find(|error| error.attempt == attempt).cloned())
            })
        });
        let error = errors.ok_or(Rejection::NotFound(NO_SUCH_JOB))?;
        let error = error.ok_or(Rejection::NotFound("error record not found"))?;
        Ok(self.ok(&error))
    }

    /// Deletes all jobs, including jobs in flight. Streams stay open.
    fn reset(&self) -> HttpAnswer {
        self.store.with(|jobs, _| jobs.delete_matching(|_| true));
        no_content()
    }
}

/// Parses a query that may contain only filters, for the routes without pages.
fn only_filter(query: &str) -> Result<Filter, Rejection> {
    filter(&mut Fields::parse(query, &FILTERS)?)
}

/// Parses the filters among the fields of a query. Refuses invalid ids and jq filters.
fn filter(fields: &mut Fields) -> Result<Filter, Rejection> {
    let filter = Filter::parse(fields)?;
    filter.check_ids()?;
    check_no_jq(fields)?;
    Ok(filter)
}

/// Refuses a jq filter. If it were ignored, the request would also match jobs that the filter excludes.
fn check_no_jq(fields: &mut Fields) -> Result<(), Rejection> {
    match fields.text("filter") {
        Some(_) => Err(Rejection::BadRequest("invalid filter: jq needs a real server".to_owned())),
        None => Ok(()),
    }
}
