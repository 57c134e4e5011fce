//! [`Purpose`]: the use of a take stream. Pause, reload, run limits, drain and kill all work by changing the purpose.
//!
//! At most one stream takes jobs at a time, and any number of streams finish the jobs that came over them.
//!
//! | phase | paused | the stream's settings | the stream is for |
//! | --- | --- | --- | --- |
//! | running | no | are in force | taking |
//! | running | no | are not in force, or the stream is a search stream, or was replaced after losing prefetch slots | finishing |
//! | running | yes | | finishing |
//! | draining, killing, forcing | | | finishing |
//! | stopped | | | nothing |
//!
//! A lost taking stream is replaced by a new one. A finishing stream stays open until all its jobs are reported, so that the
//! server does not redeliver them. For jobs of a lost stream that no taking stream will redeliver, see
//! [`Search`](super::search::Search).

use crate::lifecycle::Phase;

/// The use of a take stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Jobs that arrive are started.
    Take,
    /// The jobs that have already arrived run to their end. Most new jobs are held back.
    Finish,
    /// The stream closes now.
    Nothing,
}

/// Returns the purpose of a stream, according to the table in the module's documentation. `is_in_force` means that the stream's
/// settings are in force, and that the stream has not been replaced and is not a search stream.
pub(super) fn purpose(phase: Phase, is_paused: bool, is_in_force: bool) -> Purpose {
    match phase {
        Phase::Running if !is_paused && is_in_force => Purpose::Take,
        Phase::Running | Phase::Draining | Phase::Killing | Phase::Forcing => Purpose::Finish,
        Phase::Stopped => Purpose::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_stream_in_force_takes_while_running_and_unpaused() {
        let phases = [Phase::Running, Phase::Draining, Phase::Killing, Phase::Forcing, Phase::Stopped];
        for phase in phases {
            for (is_paused, is_in_force) in [(false, false), (false, true), (true, false), (true, true)] {
                let expected = if phase == Phase::Stopped {
                    Purpose::Nothing
                } else if (phase, is_paused, is_in_force) == (Phase::Running, false, true) {
                    Purpose::Take
                } else {
                    Purpose::Finish
                };
                assert_eq!(purpose(phase, is_paused, is_in_force), expected, "{phase} {is_paused} {is_in_force}");
            }
        }
    }
}
