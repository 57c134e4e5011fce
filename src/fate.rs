//! [`fate`]: the one function that decides the next step for the outcome of a job.
//!
//! The decision depends on the kind of the outcome, the server's [answer](Answer) to the report, the [state](Told) of the job on
//! the server, and the [hold](Hold) of this worker on the job. In the table, "…" matches any value, and the first
//! matching row applies.
//!
//! | outcome | answer | told | hold | step |
//! | --- | --- | --- | --- | --- |
//! | … | Accepted | … | … | Settle |
//! | … | Refused | … | … | Drop |
//! | … | Failed | … | … | Retry |
//! | Success | Unsent, InDoubt | … | … | Send |
//! | Failure | Unsent | … | Same, Anew | Send |
//! | Failure | Unsent | … | Lost | Park |
//! | Failure | InDoubt | … | Lost | Park |
//! | … | InDoubt, Denied, Kept, KeptElsewhere | NotAsked | … | Ask |
//! | … | InDoubt, Denied, Kept, KeptElsewhere | Gone, Over | … | Settle |
//! | Failure | InDoubt, Denied, Kept, KeptElsewhere | Past | … | Settle |
//! | Failure | InDoubt | Unreachable | … | Retry |
//! | Failure | InDoubt | Withheld | … | Release |
//! | Failure | InDoubt | InFlight | Same, Anew | Send |
//! | Failure | InDoubt | Waiting | Anew | Send |
//! | Failure | InDoubt | Waiting | Same | Park |
//! | … | Denied | Unreachable | … | Retry |
//! | … | Denied | Withheld, Past, InFlight, Waiting | Anew | Send |
//! | … | Denied | Withheld, Past, InFlight, Waiting | Same, Lost | Park |
//! | Success | Kept, KeptElsewhere | InFlight, Past | … | Send |
//! | Failure | Kept, KeptElsewhere | InFlight | Same, Anew | Send |
//! | Failure | KeptElsewhere | InFlight | Lost | Settle |
//! | … | Kept, KeptElsewhere | … | … | Park |
//!
//! The server accepts a success for any job in flight, whichever attempt is in flight and whichever worker runs the job. A failure
//! report costs the job an attempt, and the server identifies the job by its id alone. So a failure is sent only while this worker
//! holds the very attempt that failed.
//!
//! If the answer to a failure report was lost, the report is sent again only when it is known that the first report did not
//! arrive. A query of the job (`GET /jobs/{id}`) can show this, and so can a redelivery of the same attempt. If a proxy refuses the
//! query, the job is released (`Step::Release`). The server then redelivers the job if it has not counted the failure.

use crate::job::Report;

/// The kind of a reported outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Success,
    Failure,
}

impl Kind {
    pub(crate) fn of(report: &Report) -> Self {
        if matches!(report, Report::Failure(_)) { Self::Failure } else { Self::Success }
    }
}

/// The server's answer to the report, or the reason why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// No report has been sent.
    Unsent,
    /// The report was sent, and the server's answer was lost.
    InDoubt,
    /// The server accepted the report.
    Accepted,
    /// The server denied the report, because the job was not in flight.
    Denied,
    /// The request failed, and a retry may succeed.
    Failed,
    /// The server refuses the report permanently.
    Refused,
    /// The outcome is parked: its report waits until the job is redelivered.
    Kept,
    /// The outcome is parked while the worker drains, and the previous query already found the job in flight, probably on another
    /// worker.
    KeptElsewhere,
}

/// The state of the job on the server, as the last query of the job showed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    NotAsked,
    /// The server did not answer.
    Unreachable,
    /// The state is unknown: a proxy refuses the query, or the queried server does not have the job and is not the server that
    /// the job came from.
    Withheld,
    /// The server does not have the job.
    Gone,
    /// The job is completed or dead.
    Over,
    /// The outcome is a failure, and the server has counted a failure since the attempt began.
    Past,
    /// The job is ready or scheduled.
    Waiting,
    InFlight,
}

/// This worker's hold on the attempt now, compared with an earlier moment. If the report was denied, the earlier moment is the
/// time at which the report was sent. If not, the earlier moment is the last query of the job, or the start of the try if there was
/// no query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    /// The worker holds the attempt through the same delivery as before, over a stream that is still open.
    Same,
    /// The worker holds the attempt through a later delivery, over a stream that is still open.
    Anew,
    /// The worker does not hold the attempt: its stream is lost, or the job was redelivered as another attempt.
    Lost,
}

/// The next step for an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Query the state of the job (`GET /jobs/{id}`).
    Ask,
    /// Send the report.
    Send,
    /// Retry after a wait.
    Retry,
    /// Keep the outcome until its job is redelivered. The server no longer holds the job for this worker.
    Park,
    /// Keep the outcome until its job is redelivered. The server may still hold the job for this worker, so the job's stream is
    /// replaced. The old stream closes once its other jobs are reported, and the server then redelivers the job.
    Release,
    /// Forget the job, because the server knows the outcome or does not need it.
    Settle,
    /// Drop the report. The server holds the job until its stream closes, and then redelivers it.
    Drop,
}

/// Decides the next step for an outcome, according to the table in this module's documentation.
pub(crate) fn fate(kind: Kind, answer: Answer, told: Told, hold: Hold) -> Step {
    match (answer, kind) {
        (Answer::Accepted, _) => Step::Settle,
        (Answer::Refused, _) => Step::Drop,
        (Answer::Failed, _) => Step::Retry,
        (Answer::Unsent | Answer::InDoubt, Kind::Success) => Step::Send,
        (Answer::Unsent | Answer::InDoubt, Kind::Failure) if hold == Hold::Lost => Step::Park,
        (Answer::Unsent, Kind::Failure) => Step::Send,
        (_, _) if told == Told::NotAsked => Step::Ask,
        (_, _) if matches!(told, Told::Gone | Told::Over) => Step::Settle,
        (_, Kind::Failure) if told == Told::Past => Step::Settle,
        (Answer::InDoubt, Kind::Failure) => fate_in_doubt(told, hold),
        (Answer::Denied, _) => fate_of_denied(told, hold),
        (Answer::Kept | Answer::KeptElsewhere, Kind::Success) if matches!(told, Told::InFlight | Told::Past) => {
            Step::Send
        }
        (Answer::Kept | Answer::KeptElsewhere, Kind::Failure) if told == Told::InFlight && hold != Hold::Lost => {
            Step::Send
        }
        (Answer::KeptElsewhere, Kind::Failure) if told == Told::InFlight => Step::Settle,
        (Answer::Kept | Answer::KeptElsewhere, _) => Step::Park,
    }
}

/// Decides the next step for a failure whose report may have arrived. This worker still holds the attempt.
fn fate_in_doubt(told: Told, hold: Hold) -> Step {
    match (told, hold) {
        (Told::InFlight, _) | (Told::Waiting, Hold::Anew) => Step::Send,
        (Told::Waiting, _) => Step::Park,
        (Told::Withheld, _) => Step::Release,
        _ => Step::Retry,
    }
}

/// Decides the next step after a denied report of a job that is not known to be completed, dead or deleted.
fn fate_of_denied(told: Told, hold: Hold) -> Step {
    match (told, hold) {
        (Told::Unreachable, _) => Step::Retry,
        (_, Hold::Anew) => Step::Send,
        _ => Step::Park,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 2] = [Kind::Success, Kind::Failure];
    const ANSWERS: [Answer; 8] = [
        Answer::Unsent,
        Answer::InDoubt,
        Answer::Accepted,
        Answer::Denied,
        Answer::Failed,
        Answer::Refused,
        Answer::Kept,
        Answer::KeptElsewhere,
    ];
    const TOLD: [Told; 8] = [
        Told::NotAsked,
        Told::Unreachable,
        Told::Withheld,
        Told::Gone,
        Told::Over,
        Told::Past,
        Told::Waiting,
        Told::InFlight,
    ];
    const HOLDS: [Hold; 3] = [Hold::Same, Hold::Anew, Hold::Lost];

    fn every_combination() -> impl Iterator<Item = (Kind, Answer, Told, Hold)> {
        KINDS.into_iter().flat_map(|kind| {
            ANSWERS.into_iter().flat_map(move |answer| {
                TOLD.into_iter().flat_map(move |told| HOLDS.into_iter().map(move |hold| (kind, answer, told, hold)))
            })
        })
    }

    /// Returns the rows of the table in this module's documentation, each as a list of cells.
    fn table() -> Vec<Vec<&'static str>> {
        let rows = include_str!("fate.rs").lines().filter_map(|line| line.strip_prefix("//! | "));
        rows.skip(2).map(|row| row.trim_end_matches(" |").split(" | ").collect()).collect()
    }

    #[test]
    fn the_table_decides_each_combination_and_has_no_idle_row() {
        let fits = |cell: &str, value: String| cell == "…" || cell.split(", ").any(|name| name == value);
        let table = table();
        let mut used = vec![false; table.len()];
        for (kind, answer, told, hold) in every_combination() {
            let first = table.iter().position(|row| {
                fits(row[0], format!("{kind:?}"))
                    && fits(row[1], format!("{answer:?}"))
                    && fits(row[2], format!("{told:?}"))
                    && fits(row[3], format!("{hold:?}"))
            });
            let first = first.unwrap_or_else(|| panic!("no row for {kind:?} {answer:?} {told:?} {hold:?}"));
            used[first] = true;
            let step = format!("{:?}", fate(kind, answer, told, hold));
            assert_eq!(step, table[first][4], "{kind:?} {answer:?} {told:?} {hold:?}");
        }
        let unused: Vec<_> = table.iter().zip(used).filter(|(_, used)| !used).collect();
        assert!(unused.is_empty(), "{unused:?}");
    }

    #[test]
    fn a_failure_is_sent_only_while_its_job_is_held() {
        for (kind, answer, told, hold) in every_combination() {
            if kind == Kind::Failure && fate(kind, answer, told, hold) == Step::Send {
                assert_ne!(hold, Hold::Lost, "{answer:?} {told:?}");
            }
        }
    }

    #[test]
    fn a_failure_in_doubt_is_not_sent_before_a_look() {
        for (kind, answer, told, hold) in every_combination() {
            if (kind, answer) == (Kind::Failure, Answer::InDoubt) && fate(kind, answer, told, hold) == Step::Send {
                assert!(matches!(told, Told::InFlight | Told::Waiting), "{told:?}");
            }
        }
    }

    #[test]
    fn only_a_final_answer_drops_an_outcome() {
        for (kind, answer, told, hold) in every_combination() {
            assert_eq!(fate(kind, answer, told, hold) == Step::Drop, answer == Answer::Refused);
        }
    }

    #[test]
    fn no_outcome_is_settled_without_the_servers_word() {
        for (kind, answer, told, hold) in every_combination() {
            if fate(kind, answer, told, hold) == Step::Settle && answer != Answer::Accepted {
                assert!(!matches!(told, Told::NotAsked | Told::Unreachable | Told::Withheld | Told::Waiting));
            }
        }
    }

    #[test]
    fn the_outcome_of_a_redelivered_job_is_not_parked() {
        for (kind, answer, told, hold) in every_combination() {
            if hold == Hold::Anew && !matches!(answer, Answer::Kept | Answer::KeptElsewhere) {
                assert_ne!(fate(kind, answer, told, hold), Step::Park, "{kind:?} {answer:?} {told:?}");
            }
        }
    }
}
