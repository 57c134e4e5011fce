//! [`Book`]: each run and each report as they happen, and what must hold of them at every moment.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::network::{Link, MAX_LATENCY};
use super::trace::Trace;
use super::weather::Call;

/// How the message begins by which a worker reports a line that is no job.
const MALFORMED: &str = "the worker cannot read this job";

/// The book of one world; clones are of one.
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

/// All that is written down of one worker.
#[derive(Default)]
struct Page {
    /// The runs that go on, by their numbers.
    running: BTreeSet<usize>,
    /// The runs of each job, by their numbers.
    runs: BTreeMap<String, Vec<usize>>,
    /// How often each job was handed over.
    deliveries: BTreeMap<String, Vec<Delivery>>,
    /// The runs that have ended, and of which the server has counted nothing.
    untold: BTreeSet<usize>,
    /// How many runs have begun or ended.
    progress: usize,
    /// Since when nothing may be started that is handed over later.
    quiet: Option<Instant>,
    /// Whether it has vanished.
    has_crashed: bool,
    /// Whether it was told to go to another server, where its jobs are unknown.
    has_moved: bool,
    /// Whether a take of it was answered by a 4xx.
    was_turned_away: bool,
    /// Jobs of which a report was refused for good. The worker may drop them: then they stay in flight for as long as their
    /// stream is open, and their runs may be repeated.
    exempt: BTreeSet<String>,
    /// When it was last told what the server knows of a job, and when it last reported a failure of it.
    looks: BTreeMap<String, Instant>,
    failures: BTreeMap<String, Instant>,
    talk: Talk,
}

/// How a worker and the servers talk.
#[derive(Debug, Clone, Copy, Default)]
pub struct Talk {
    /// Connections that are being made, and requests that have no answer yet.
    pub under_way: usize,
    /// When there were none of them for the last time.
    pub silent_since: Option<Instant>,
    /// When a request had the answer that it asked for, for the first time since [`Book::listen_anew`].
    pub heard: Option<Instant>,
    /// When the last report came.
    pub reported: Option<Instant>,
}

/// One run of a job.
#[derive(Debug, Clone)]
pub struct Run {
    /// The worker in which it is.
    pub worker: String,
    /// The job.
    pub id: String,
    /// How many attempts had failed before.
    pub attempts: u32,
    /// When it began.
    pub begun: Instant,
    /// How long it takes if nothing ends it.
    pub lasts: Duration,
    /// When and how it ended.
    pub ended: Option<(Instant, Ending)>,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With success.
    Good,
    /// With a failure.
    Bad,
    /// By the worker's stop.
    Interrupted,
    /// With the worker.
    Vanished,
}

struct Delivery {
    link: Arc<Link>,
    attempts: u32,
    at: Instant,
}

/// A run that goes on. Dropped before its end, it has vanished.
pub struct Running {
    book: Book,
    /// Its number.
    pub number: usize,
    has_ended: bool,
}

impl Running {
    /// Writes down that it has ended.
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

/// Something that a worker waits for. It is over when it is dropped.
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
    /// Makes an empty book.
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

    /// Writes down that something is not as it must be.
    pub fn violation(&self, text: String) {
        self.trace.note("VIOLATION", format_args!("{text}"));
        self.pages().violations.push(text);
        self.violated.notify_one();
    }

    /// Waits until something is not as it must be.
    pub async fn violated(&self) {
        while self.pages().violations.is_empty() {
            self.violated.notified().await;
        }
    }

    /// Returns all that is not as it must be.
    pub fn violations(&self) -> Vec<String> {
        self.pages().violations.clone()
    }

    /// Counts a fault.
    pub fn fault(&self, name: &'static str) {
        *self.pages().faults.entry(name).or_default() += 1;
    }

    /// Returns how many faults of each kind there were.
    pub fn faults(&self) -> BTreeMap<&'static str, u64> {
        self.pages().faults.clone()
    }

    /// Returns how many jobs were put in, how many runs began, and how many requests came.
    pub fn counts(&self) -> (usize, usize, u64) {
        let pages = self.pages();
        (pages.jobs, pages.runs.len(), pages.requests)
    }

    /// Returns the runs of a worker.
    pub fn runs_of(&self, worker: &str) -> Vec<Run> {
        let pages = self.pages();
        pages.runs.iter().filter(|run| run.worker == worker).cloned().collect()
    }

    /// Returns the runs of a worker that have ended, and of which the server has counted nothing.
    pub fn untold_by(&self, worker: &str) -> Vec<Run> {
        let pages = self.pages();
        let untold = pages.workers.get(worker).map(|page| &page.untold);
        untold.into_iter().flatten().map(|number| pages.runs[*number].clone()).collect()
    }

    /// Returns the runs that go on in a worker.
    pub fn running_in(&self, worker: &str) -> Vec<Run> {
        let pages = self.pages();
        let running = pages.workers.get(worker).map(|page| &page.running);
        running.into_iter().flatten().map(|number| pages.runs[*number].clone()).collect()
    }

    /// Returns how many runs go on in a worker, and how many have begun or ended, which grows as long as it gets on.
    pub fn progress_of(&self, worker: &str) -> (usize, usize) {
        self.page(worker, |page| (page.running.len(), page.progress))
    }

    /// Whether a worker may have dropped its report of a job, because it was refused for good.
    pub fn is_exempt(&self, worker: &str, id: &str) -> bool {
        self.page(worker, |page| page.exempt.contains(id))
    }

    /// Returns how many jobs are on their way to a worker, or wait in it, over streams that it has not closed.
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

    /// Whether a job runs in a worker.
    pub fn is_running(&self, worker: &str, id: &str) -> bool {
        let pages = self.pages();
        let running = pages.workers.get(worker).map(|page| &page.running);
        running.into_iter().flatten().any(|number| pages.runs[*number].id == id)
    }

    /// Writes down that a job was put in.
    pub fn enqueued(&self, id: &str, is_malformed: bool) {
        let mut pages = self.pages();
        pages.jobs += 1;
        if is_malformed {
            pages.malformed.insert(id.to_owned());
        }
    }

    /// Writes down that the server has handed a job over.
    pub fn delivered(&self, link: &Arc<Link>, id: &str, attempts: u32) {
        let delivery = Delivery { link: Arc::clone(link), attempts, at: Instant::now() };
        self.page(&link.worker, |page| page.deliveries.entry(id.to_owned()).or_default().push(delivery));
    }

    /// Writes down that a worker may start nothing that is handed over from now on.
    pub fn quiet(&self, worker: &str) {
        self.page(worker, |page| _ = page.quiet.get_or_insert_with(Instant::now));
    }

    /// Takes that back.
    pub fn loud(&self, worker: &str) {
        self.page(worker, |page| page.quiet = None);
    }

    /// Writes down that a worker goes to another server.
    pub fn moved(&self, worker: &str) {
        self.page(worker, |page| page.has_moved = true);
    }

    /// Writes down that a worker vanishes.
    pub fn crashed(&self, worker: &str) {
        self.page(worker, |page| page.has_crashed = true);
    }

    /// Writes down that a worker waits for something.
    pub fn under_way(&self, worker: &str) -> UnderWay {
        self.page(worker, |page| page.talk.under_way += 1);
        UnderWay(self.clone(), worker.to_owned())
    }

    /// Writes down that a request has come.
    pub fn asked(&self, worker: &str, call: Call) {
        self.pages().requests += 1;
        if matches!(call, Call::Successes | Call::Failure | Call::Look) {
            self.page(worker, |page| page.talk.reported = Some(Instant::now()));
        }
    }

    /// Writes down that a request had the answer that it asked for.
    pub fn heard(&self, worker: &str) {
        self.page(worker, |page| _ = page.talk.heard.get_or_insert_with(Instant::now));
    }

    /// Forgets which workers have heard from a server.
    pub fn listen_anew(&self) {
        self.pages().workers.values_mut().for_each(|page| page.talk.heard = None);
    }

    /// Returns how a worker and the servers talk.
    pub fn talk_of(&self, worker: &str) -> Talk {
        self.page(worker, |page| page.talk)
    }

    /// Writes down that a worker was told what the server knows of a job.
    pub fn looked(&self, worker: &str, id: &str) {
        self.page(worker, |page| page.looks.insert(id.to_owned(), Instant::now()));
    }

    /// Writes down that a report of those jobs was answered by a final refusal.
    pub fn refused_for_good(&self, worker: &str, ids: &BTreeSet<String>) {
        self.page(worker, |page| page.exempt.extend(ids.iter().cloned()));
    }

    /// Writes down that a take was answered by a 4xx.
    pub fn turned_away(&self, worker: &str) {
        self.page(worker, |page| page.was_turned_away = true);
    }

    /// Whether a take of that worker was answered by a 4xx.
    pub fn was_turned_away(&self, worker: &str) -> bool {
        self.page(worker, |page| page.was_turned_away)
    }

    /// Checks that a worker has not closed a sound stream under a run: the server hands the job out again, and the two
    /// runs overlap.
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

    /// Writes down that a run begins, and checks that it may.
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

    /// Checks that a success which the server counts has happened.
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

    /// Checks that a failure which the server counts is of that attempt, and counted for the first time.
    pub fn failure_counted(&self, link: &Link, id: &str, attempts: u32, message: &str) {
        let problem = self.pages().problem_of_failure(link, id, attempts, message);
        if let Some(problem) = problem {
            self.violation(format!("{} reported a failure of {id} attempt {attempts}: {problem}", link.worker));
        }
    }
}

impl Pages {
    /// Returns a job that was running when a worker closed the stream that held it, if the worker could know about both.
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
        let Some(deliveries) = page.deliveries.get(id) else { return Some("nobody has handed it over") };
        // The worker may not know yet that the stream is lost over which the job came before.
        let came_in_time = |quiet| {
            let mut known = deliveries.iter().filter(|delivery| delivery.attempts == attempts);
            known.any(|delivery| delivery.at <= quiet && delivery.link.closed().is_none())
        };
        match (deliveries.last(), page.quiet) {
            (Some(last), Some(quiet)) if last.at > quiet && !came_in_time(quiet) => {
                Some("it came after the drain or pause")
            }
            _ => None,
        }
    }

    fn problem_of_failure(&mut self, link: &Link, id: &str, attempts: u32, message: &str) -> Option<String> {
        let page = self.workers.get_mut(&link.worker)?;
        let reported_before = page.failures.insert(id.to_owned(), Instant::now());
        // What the worker gave up long ago has arrived after all: no worker can prevent that.
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
        // The job was handed over anew, as that attempt, while the run went on.
        let became_this = deliveries.iter().any(|delivery| delivery.attempts == attempts && delivery.at <= ended);
        // For all that the worker could know when it sent the report, the server still held the attempt for it.
        let sent = link.sent().unwrap_or_else(Instant::now);
        let of_run = deliveries.iter().rev().find(|delivery| delivery.attempts == ran_as);
        let seemed_held = of_run.is_some_and(|held| held.link.closed().is_none_or(|closed| closed >= sent));
        let had_looked = page.looks.get(id).is_some_and(|look| reported_before.is_none_or(|before| *look > before));
        let is_right = ran_as == attempts || became_this || seemed_held || had_looked;
        (!is_right).then(|| format!("it was attempt {ran_as} that failed"))
    }
}
