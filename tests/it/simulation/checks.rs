//! [`Book`]: the records of all runs and reports. The book checks each run and each report, and collects violations.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::network::{Link, MAX_LATENCY};
use super::trace::Trace;
use super::weather::Call;

/// The prefix of a worker's failure message for a malformed job.
const MALFORMED: &str = "the worker cannot read this job";

/// The records and violations of one world. Clones share them.
#[derive(Clone)]
pub struct Book {
    pages: Arc<Mutex<Pages>>,
    violated: Arc<Notify>,
    trace: Trace,
}

#[derive(Default)]
struct Pages {
    runs: Vec<Run>,
    workers: BTreeMap<String, Page>,
    jobs: usize,
    malformed: BTreeSet<String>,
    requests: u64,
    faults: BTreeMap<&'static str, u64>,
    violations: Vec<String>,
}

/// The records about one worker.
#[derive(Default)]
struct Page {
    /// The indices in `Pages::runs` of the runs in progress.
    running: BTreeSet<usize>,
    /// The indices of each job's runs, by job id.
    runs: BTreeMap<String, Vec<usize>>,
    /// The deliveries of each job to the worker, oldest first, by job id.
    deliveries: BTreeMap<String, Vec<Delivery>>,
    /// The indices of the succeeded and failed runs whose reports the server has not accepted.
    untold: BTreeSet<usize>,
    /// The number of run starts and run ends so far.
    progress: usize,
    /// The time at which the worker was stopped or paused. The worker must not start jobs that are sent after this time.
    quiet: Option<Instant>,
    /// Whether the worker has crashed.
    has_crashed: bool,
    /// Whether a reload has moved the worker to another server, which does not know the worker's earlier jobs.
    has_moved: bool,
    /// Whether a take request from the worker was answered with a 4xx.
    was_turned_away: bool,
    /// The ids of jobs with a report that was refused permanently. The worker may drop such a report. The job then stays in flight
    /// until its stream closes, and can run again.
    exempt: BTreeSet<String>,
    /// The time of the server's last answer to `GET /jobs/{id}`, by job id.
    looks: BTreeMap<String, Instant>,
    /// The time of the last accepted failure report, by job id.
    failures: BTreeMap<String, Instant>,
    talk: Talk,
}

/// The traffic between a worker and the servers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Talk {
    /// The number of connection attempts in progress, plus the number of requests that have not been answered yet.
    pub under_way: usize,
    /// The time at which a connection attempt or a request last ended.
    pub silent_since: Option<Instant>,
    /// The time of the first genuine answer since the last [`Book::listen_anew`]. Genuine means not replaced by a fault.
    pub heard: Option<Instant>,
    /// The time of the latest report or `GET /jobs/{id}` request.
    pub reported: Option<Instant>,
}

/// One run of a job.
#[derive(Debug, Clone)]
pub struct Run {
    /// The name of the worker.
    pub worker: String,
    /// The id of the job.
    pub id: String,
    /// The number of failed attempts before the run.
    pub attempts: u32,
    /// The start time of the run.
    pub begun: Instant,
    /// The duration of the run if nothing ends it earlier.
    pub lasts: Duration,
    /// The time and result of the run's end. `None` while the run is in progress.
    pub ended: Option<(Instant, Ending)>,
}

/// The result of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The run succeeded.
    Good,
    /// The run failed.
    Bad,
    /// The worker's stop interrupted the run.
    Interrupted,
    /// The worker dropped the run before the run ended, for example in a crash.
    Vanished,
}

struct Delivery {
    link: Arc<Link>,
    attempts: u32,
    at: Instant,
}

/// A run in progress. Dropping the value before `end` is called records the run as `Vanished`.
pub struct Running {
    book: Book,
    /// The index of the run in `Pages::runs`.
    pub number: usize,
    has_ended: bool,
}

impl Running {
    /// Records the end of the run.
    pub fn end(&mut self, ending: Ending) {
        self.has_ended = true;
        let mut pages = self.book.pages();
        let Pages { runs, workers, .. } = &mut *pages;
        let run = &mut runs[self.number];
        run.ended = Some((Instant::now(), ending));
        let page = workers.get_mut(&run.worker).unwrap();
        page.running.remove(&self.number);
        page.progress += 1;
        if matches!(ending, Ending::Good | Ending::Bad) {
            page.untold.insert(self.number);
        }
        self.book.trace.note(&run.worker, format_args!("run {} of {} ends: {ending:?}", self.number, run.id));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_ended {
            self.end(Ending::Vanished);
        }
    }
}

/// A guard that counts one connection attempt or request of a worker as under way until the guard is dropped.
pub struct UnderWay(Book, String);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.page(&self.1, |page| {
            page.talk.under_way -= 1;
            page.talk.silent_since = Some(Instant::now());
        });
    }
}

impl Book {
    /// Returns an empty book.
    pub fn new(trace: Trace) -> Self {
        Self { pages: Arc::default(), violated: Arc::default(), trace }
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap()
    }

    fn page<T>(&self, worker: &str, look: impl FnOnce(&mut Page) -> T) -> T {
        let mut pages = self.pages();
        if !pages.workers.contains_key(worker) {
            pages.workers.insert(worker.to_owned(), Page::default());
        }
        look(pages.workers.get_mut(worker).unwrap())
    }

    /// Records a violation.
    pub fn violation(&self, text: String) {
        self.trace.note("VIOLATION", format_args!("{text}"));
        self.pages().violations.push(text);
        self.violated.notify_one();
    }

    /// Waits until there is a violation.
    pub async fn violated(&self) {
        while self.pages().violations.is_empty() {
            self.violated.notified().await;
        }
    }

    /// Returns all violations.
    pub fn violations(&self) -> Vec<String> {
        self.pages().violations.clone()
    }

    /// Counts a fault.
    pub fn fault(&self, name: &'static str) {
        *self.pages().faults.entry(name).or_default() += 1;
    }

    /// Returns the number of faults of each kind.
    pub fn faults(&self) -> BTreeMap<&'static str, u64> {
        self.pages().faults.clone()
    }

    /// Returns the number of enqueued jobs, the number of runs, and the number of requests.
    pub fn counts(&self) -> (usize, usize, u64) {
        let pages = self.pages();
        (pages.jobs, pages.runs.len(), pages.requests)
    }

    /// Returns all runs of a worker.
    pub fn runs_of(&self, worker: &str) -> Vec<Run> {
        let pages = self.pages();
        pages.runs.iter().filter(|run| run.worker == worker).cloned().collect()
    }

    /// Returns a worker's succeeded and failed runs whose reports the server has not accepted.
    pub fn untold_by(&self, worker: &str) -> Vec<Run> {
        let pages = self.pages();
        let untold = pages.workers.get(worker).map(|page| &page.untold);
        untold.into_iter().flatten().map(|number| pages.runs[*number].clone()).collect()
    }

    /// Returns a worker's runs in progress.
    pub fn running_in(&self, worker: &str) -> Vec<Run> {
        let pages = self.pages();
        let running = pages.workers.get(worker).map(|page| &page.running);
        running.into_iter().flatten().map(|number| pages.runs[*number].clone()).collect()
    }

    /// Returns the number of a worker's runs in progress, and the number of its run starts and run ends so far. The second number
    /// grows as long as the worker makes progress.
    pub fn progress_of(&self, worker: &str) -> (usize, usize) {
        self.page(worker, |page| (page.running.len(), page.progress))
    }

    /// Reports whether a worker may have dropped its report of a job because the server refused the report permanently.
    pub fn is_exempt(&self, worker: &str, id: &str) -> bool {
        self.page(worker, |page| page.exempt.contains(id))
    }

    /// Returns the number of jobs that wait in a worker. A job waits if it was last delivered over a stream that the worker has
    /// not closed, and the worker has not started the delivered attempt.
    pub fn waiting_in(&self, worker: &str) -> usize {
        let pages = self.pages();
        let Some(page) = pages.workers.get(worker) else { return 0 };
        let waits = |(id, deliveries): &(&String, &Vec<Delivery>)| {
            let Some(last) = deliveries.last().filter(|last| last.link.closed().is_none()) else { return false };
            let runs = page.runs.get(*id).into_iter().flatten();
            runs.map(|number| &pages.runs[*number]).all(|run| run.attempts < last.attempts && run.ended.is_some())
        };
        page.deliveries.iter().filter(waits).count()
    }

    /// Reports whether a worker is running a job.
    pub fn is_running(&self, worker: &str, id: &str) -> bool {
        let pages = self.pages();
        let running = pages.workers.get(worker).map(|page| &page.running);
        running.into_iter().flatten().any(|number| pages.runs[*number].id == id)
    }

    /// Records that a job was enqueued.
    pub fn enqueued(&self, id: &str, is_malformed: bool) {
        let mut pages = self.pages();
        pages.jobs += 1;
        if is_malformed {
            pages.malformed.insert(id.to_owned());
        }
    }

    /// Records that the server has sent a job over a connection.
    pub fn delivered(&self, link: &Arc<Link>, id: &str, attempts: u32) {
        let delivery = Delivery { link: Arc::clone(link), attempts, at: Instant::now() };
        self.page(&link.worker, |page| page.deliveries.entry(id.to_owned()).or_default().push(delivery));
    }

    /// Records that a worker must not start jobs that are sent from now on.
    pub fn quiet(&self, worker: &str) {
        self.page(worker, |page| _ = page.quiet.get_or_insert_with(Instant::now));
    }

    /// Ends the effect of `quiet`, so that a worker may start all jobs that it receives.
    pub fn loud(&self, worker: &str) {
        self.page(worker, |page| page.quiet = None);
    }

    /// Records that a worker moves to another server.
    pub fn moved(&self, worker: &str) {
        self.page(worker, |page| page.has_moved = true);
    }

    /// Records that a worker crashes.
    pub fn crashed(&self, worker: &str) {
        self.page(worker, |page| page.has_crashed = true);
    }

    /// Counts one connection attempt or request of a worker as under way until the returned guard is dropped.
    pub fn under_way(&self, worker: &str) -> UnderWay {
        self.page(worker, |page| page.talk.under_way += 1);
        UnderWay(self.clone(), worker.to_owned())
    }

    /// Records a request from a worker.
    pub fn asked(&self, worker: &str, call: Call) {
        self.pages().requests += 1;
        if matches!(call, Call::Successes | Call::Failure | Call::Look) {
            self.page(worker, |page| page.talk.reported = Some(Instant::now()));
        }
    }

    /// Records that a worker gets a genuine answer. Only the first answer since the last `listen_anew` counts.
    pub fn heard(&self, worker: &str) {
        self.page(worker, |page| _ = page.talk.heard.get_or_insert_with(Instant::now));
    }

    /// Forgets which workers have received a genuine answer.
    pub fn listen_anew(&self) {
        self.pages().workers.values_mut().for_each(|page| page.talk.heard = None);
    }

    /// Returns the traffic between a worker and the servers.
    pub fn talk_of(&self, worker: &str) -> Talk {
        self.page(worker, |page| page.talk)
    }

    /// Records an answer to a worker's `GET /jobs/{id}`.
    pub fn looked(&self, worker: &str, id: &str) {
        self.page(worker, |page| page.looks.insert(id.to_owned(), Instant::now()));
    }

    /// Records that a report of these jobs was refused permanently.
    pub fn refused_for_good(&self, worker: &str, ids: &BTreeSet<String>) {
        self.page(worker, |page| page.exempt.extend(ids.iter().cloned()));
    }

    /// Records that a take request from a worker was answered with a 4xx.
    pub fn turned_away(&self, worker: &str) {
        self.page(worker, |page| page.was_turned_away = true);
    }

    /// Reports whether a take request from a worker was answered with a 4xx.
    pub fn was_turned_away(&self, worker: &str) -> bool {
        self.page(worker, |page| page.was_turned_away)
    }

    /// Checks that no job from this stream was running when the worker closed the stream. The server redelivers such a job, so two
    /// runs of the job could overlap. Skips streams whose connection has had a fault, and workers that have crashed.
    pub fn stream_ended(&self, link: &Link, held: &BTreeSet<String>) {
        let Some(closed) = link.closed().filter(|_| !link.is_faulted()) else { return };
        if self.page(&link.worker, |page| page.has_crashed) {
            return;
        }
        let found = self.pages().run_under(link, held, closed);
        if let Some(id) = found {
            self.violation(format!("{} closed its stream while {id}, which came over it, ran", link.worker));
        }
    }

    /// Records the start of a run, and checks that the worker may start the job.
    pub fn begin(&self, worker: &str, id: &str, attempts: u32, lasts: Duration) -> Running {
        let mut pages = self.pages();
        let number = pages.runs.len();
        let problem = pages.problem_of_beginning(worker, id, attempts);
        let (begun, worker_name) = (Instant::now(), worker.to_owned());
        let run = Run { worker: worker_name, id: id.to_owned(), attempts, begun, lasts, ended: None };
        pages.runs.push(run);
        drop(pages);
        self.page(worker, |page| {
            page.running.insert(number);
            page.runs.entry(id.to_owned()).or_default().push(number);
            page.progress += 1;
        });
        self.trace.note(worker, format_args!("run {number} of {id} begins: attempt {attempts}, {lasts:?}"));
        if let Some(problem) = problem {
            self.violation(format!("{worker} began {id} attempt {attempts}: {problem}"));
        }
        Running { book: self.clone(), number, has_ended: false }
    }

    /// Records that the server accepts a worker's report of a success, and checks that the worker has a successful run of the
    /// job.
    pub fn success_counted(&self, link: &Link, id: &str) {
        let has_happened = {
            let mut pages = self.pages();
            let Pages { runs, workers, .. } = &mut *pages;
            let page = workers.get_mut(&link.worker).unwrap();
            let is_good = |number: &&usize| matches!(runs[**number].ended, Some((_, Ending::Good)));
            let good: Vec<usize> = page.runs.get(id).into_iter().flatten().filter(is_good).copied().collect();
            good.iter().for_each(|number| _ = page.untold.remove(number));
            !good.is_empty()
        };
        if !has_happened {
            self.violation(format!("{} reported a success of {id} that has not happened", link.worker));
        }
    }

    /// Records that the server accepts a worker's failure report and counts it as a failure of the attempt numbered `attempts`.
    /// Checks that the failed run was this attempt, and that the run has not been counted before.
    pub fn failure_counted(&self, link: &Link, id: &str, attempts: u32, message: &str) {
        let problem = self.pages().problem_of_failure(link, id, attempts, message);
        if let Some(problem) = problem {
            self.violation(format!("{} reported a failure of {id} attempt {attempts}: {problem}", link.worker));
        }
    }
}

impl Pages {
    /// Returns the id of a job that was running when the worker closed the job's stream, if any. Skips jobs that the server sent
    /// shortly before the close, because the worker may not have received them.
    fn run_under(&self, link: &Link, held: &BTreeSet<String>, closed: Instant) -> Option<String> {
        let page = self.workers.get(&link.worker)?;
        let has_come = |id: &str| {
            let deliveries = page.deliveries.get(id).into_iter().flatten();
            deliveries
                .last()
                .is_some_and(|delivery| delivery.link.id == link.id && delivery.at + MAX_LATENCY * 2 < closed)
        };
        let is_under_way = |number: &usize| {
            let Run { begun, ended, .. } = &self.runs[*number];
            *begun <= closed && ended.is_none_or(|(ended, _)| ended > closed)
        };
        let mut held = held.iter().filter(|id| has_come(id));
        held.find(|id| page.runs.get(*id).into_iter().flatten().any(is_under_way)).cloned()
    }

    fn problem_of_beginning(&self, worker: &str, id: &str, attempts: u32) -> Option<&'static str> {
        let Some(page) = self.workers.get(worker) else { return Some("the server does not know the worker") };
        let earlier = page.runs.get(id).into_iter().flatten().map(|number| &self.runs[*number]);
        if earlier.clone().any(|run| run.ended.is_none()) {
            return Some("it runs already");
        }
        let is_same = |run: &Run| run.attempts == attempts && !matches!(run.ended, Some((_, Ending::Interrupted)));
        if !page.exempt.contains(id) && !page.has_moved && earlier.clone().any(is_same) {
            return Some("it has run already");
        }
        let Some(deliveries) = page.deliveries.get(id) else { return Some("no stream has delivered it") };
        // A job that is redelivered after the drain or pause began may still start, if the same attempt was first delivered before
        // the drain or pause, over a stream that the worker has not closed. The server may have lost that stream without the
        // worker's knowledge.
        let came_in_time = |quiet| {
            let mut known = deliveries.iter().filter(|delivery| delivery.attempts == attempts);
            known.any(|delivery| delivery.at <= quiet && delivery.link.closed().is_none())
        };
        match (deliveries.last(), page.quiet) {
            (Some(last), Some(quiet)) if last.at > quiet && !came_in_time(quiet) => {
                Some("it arrived after the drain or pause")
            }
            _ => None,
        }
    }

    fn problem_of_failure(&mut self, link: &Link, id: &str, attempts: u32, message: &str) -> Option<String> {
        let page = self.workers.get_mut(&link.worker)?;
        let reported_before = page.failures.insert(id.to_owned(), Instant::now());
        // The worker gave up this request and closed the connection, but the request still arrived. No worker can prevent this,
        // so it is not a violation.
        if link.closed().is_some() {
            return None;
        }
        if message.starts_with(MALFORMED) {
            return (!self.malformed.contains(id)).then(|| "it is well-formed".to_owned());
        }
        let number: Option<usize> = message.strip_prefix("run ").and_then(|number| number.parse().ok());
        let Some((number, run)) = number.and_then(|number| self.runs.get(number).map(|run| (number, run))) else {
            return Some(format!("no run is named in {message:?}"));
        };
        let Some((ended, Ending::Bad)) = run.ended else { return Some("the run has not failed".to_owned()) };
        if !page.untold.remove(&number) {
            return Some("the run has been counted before".to_owned());
        }
        let ran_as = run.attempts;
        let deliveries = page.deliveries.get(id).map_or(&[][..], Vec::as_slice);
        // True if the job was redelivered before the run ended, and this redelivery was the reported attempt.
        let became_this = deliveries.iter().any(|delivery| delivery.attempts == attempts && delivery.at <= ended);
        // True if the worker sent the report before it closed the stream that had delivered the run's attempt.
        let sent = link.sent().unwrap_or_else(Instant::now);
        let of_run = deliveries.iter().rev().find(|delivery| delivery.attempts == ran_as);
        let seemed_held = of_run.is_some_and(|held| held.link.closed().is_none_or(|closed| closed >= sent));
        let had_looked = page.looks.get(id).is_some_and(|look| reported_before.is_none_or(|before| *look > before));
        let is_right = ran_as == attempts || became_this || seemed_held || had_looked;
        (!is_right).then(|| format!("it was attempt {ran_as} that failed"))
    }
}
