//! [`Variables`]: the environment variables that tell a handler about its job.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::result_file::ResultFile;
use crate::handler::Handler;
use crate::job::Job;

const JOB_ID: &str = "ZIZQ_JOB_ID";
const JOB_TYPE: &str = "ZIZQ_JOB_TYPE";
const JOB_QUEUE: &str = "ZIZQ_JOB_QUEUE";
const JOB_PRIORITY: &str = "ZIZQ_JOB_PRIORITY";
const JOB_ATTEMPTS: &str = "ZIZQ_JOB_ATTEMPTS";
const JOB_READY_AT: &str = "ZIZQ_JOB_READY_AT";
const JOB_RETRY_LIMIT: &str = "ZIZQ_JOB_RETRY_LIMIT";
const JOB_TIMEOUT: &str = "ZIZQ_JOB_TIMEOUT";
const WORKER_ID: &str = "ZIZQ_WORKER_ID";
const RESULT_FILE: &str = "ZIZQ_RESULT_FILE";
const SOCKET: &str = "ZIZQ_SOCKET";

const ALL: [&str; 11] = [
    JOB_ID,
    JOB_TYPE,
    JOB_QUEUE,
    JOB_PRIORITY,
    JOB_ATTEMPTS,
    JOB_READY_AT,
    JOB_RETRY_LIMIT,
    JOB_TIMEOUT,
    WORKER_ID,
    RESULT_FILE,
    SOCKET,
];

/// Reports whether `name` is a variable that only the worker sets, such as `ZIZQ_JOB_ID`.
pub(crate) fn is_about_a_job(name: &OsStr) -> bool {
    ALL.iter().any(|about_a_job| name == *about_a_job)
}

pub(super) type Variables<'a> = Vec<(&'static str, Cow<'a, OsStr>)>;

pub(super) fn of<'a>(job: &'a Job, handler: &Handler, worker_id: &'a str, result: &'a ResultFile) -> Variables<'a> {
    let text = |text: &'a str| Cow::Borrowed(OsStr::new(text));
    let number = |number: String| Cow::Owned(OsString::from(number));
    let mut variables = vec![
        (JOB_ID, text(job.id.as_str())),
        (JOB_TYPE, text(&job.job_type)),
        (JOB_QUEUE, text(&job.queue)),
        (JOB_PRIORITY, number(job.priority.to_string())),
        (JOB_ATTEMPTS, number(job.attempts.to_string())),
        (JOB_READY_AT, number(job.ready_at.to_string())),
        (WORKER_ID, text(worker_id)),
        (RESULT_FILE, Cow::Borrowed(result.path())),
    ];
    variables.extend(job.retry_limit.map(|limit| (JOB_RETRY_LIMIT, number(limit.to_string()))));
    variables.extend(handler.timeout.map(|timeout| (JOB_TIMEOUT, number(timeout.as_secs_f64().to_string()))));
    variables
}

/// Returns the environment variables for a warm process.
pub(super) fn of_warm<'a>(socket: &'a Path, worker_id: &'a str) -> Variables<'a> {
    vec![(SOCKET, Cow::Borrowed(socket.as_os_str())), (WORKER_ID, Cow::Borrowed(OsStr::new(worker_id)))]
}
