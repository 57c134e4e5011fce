//! [`Census`]: the process groups that are alive. A signal reaches zombies as well, so only /proc tells.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process_group};
use tokio::sync::Mutex;
use tokio::time::Instant;

/// The longest reuse of an answer. A look takes milliseconds on a busy machine, and hundreds of jobs may ask at once.
const MAX_AGE: Duration = Duration::from_millis(50);

/// The latest look at /proc. One look lists all groups, and serves all jobs that ask.
static LATEST: Mutex<Census> =
    Mutex::const_new(Census { begun: None, groups: Groups { living: BTreeSet::new(), zombies: BTreeSet::new() } });

#[derive(Debug)]
struct Census {
    begun: Option<Instant>,
    groups: Groups,
}

/// The groups that have a living process, and those that have a zombie.
#[derive(Debug, Default)]
struct Groups {
    living: BTreeSet<i32>,
    zombies: BTreeSet<i32>,
}

/// Reports whether the group has a process that has not ended, by a look that began after `since`.
async fn is_alive(group: Pid, since: Instant) -> bool {
    let mut latest = LATEST.lock().await;
    if latest.begun.is_none_or(|begun| begun < since) {
        *latest = Census { begun: Some(Instant::now()), groups: groups() };
    }
    let (number, Groups { living, zombies }) = (group.as_raw_nonzero().get(), &latest.groups);
    // With `hidepid`, /proc does not list the processes of other users.
    let is_hidden = || !zombies.contains(&number) && test_kill_process_group(group) == Err(Errno::PERM);
    living.contains(&number) || is_hidden()
}

/// Waits until every process of the group has ended, reaped or not.
pub(super) async fn died_out(group: Pid) {
    // An earlier look may miss processes that started since.
    let mut since = Instant::now();
    while is_alive(group, since).await {
        tokio::time::sleep(MAX_AGE / 2).await;
        since = since.max(Instant::now() - MAX_AGE);
    }
}

fn groups() -> Groups {
    let mut groups = Groups::default();
    for (group, is_zombie) in processes().filter_map(|(_, stat)| group_of(&stat)) {
        if is_zombie {
            groups.zombies.insert(group);
        } else {
            groups.living.insert(group);
        }
    }
    groups
}

/// Returns the zombie children of a process.
pub(super) fn zombies_of(parent: Pid) -> impl Iterator<Item = Pid> {
    let is_zombie = move |stat: &str| zombies_parent(stat) == Some(parent.as_raw_nonzero().get());
    processes().filter(move |(_, stat)| is_zombie(stat)).filter_map(|(pid, _)| Pid::from_raw(pid))
}

/// Returns all processes, each with its line in /proc.
fn processes() -> impl Iterator<Item = (i32, String)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbered = entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry)));
    numbered.filter_map(|(pid, entry)| Some((pid, fs::read_to_string(entry.path().join("stat")).ok()?)))
}

fn zombies_parent(stat: &str) -> Option<i32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.trim_start().strip_prefix('Z')?.split_ascii_whitespace().next()?.parse().ok()
}

/// Parses a process's group, and whether it is a zombie, from its line in /proc. The name may contain any character, even `)`.
fn group_of(stat: &str) -> Option<(i32, bool)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let (state, group, threads) = (*fields.first()?, *fields.get(2)?, *fields.get(17)?);
    // A process whose first thread has exited looks like a zombie while its other threads run.
    let is_zombie = state == "X" || (state == "Z" && threads == "1");
    Some((group.parse().ok()?, is_zombie))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_living_are_told_from_zombies_of_their_group() {
        let stat = |state: &str, threads: u32| {
            format!("7 (a) b) {state} 1 5 5 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 {threads} 0 12345")
        };
        assert_eq!(group_of(&stat("S", 1)), Some((5, false)));
        assert_eq!(group_of(&stat("Z", 1)), Some((5, true)));
        assert_eq!(group_of(&stat("Z", 2)), Some((5, false)));
        assert_eq!(group_of(""), None);
    }

    #[test]
    fn a_zombie_is_known_by_its_parent() {
        assert_eq!(zombies_parent("7 (a) b) Z 1 5 5 0"), Some(1));
        assert_eq!(zombies_parent("7 (Z 3) S 1 5 5 0"), None);
    }

    #[test]
    fn this_process_is_alive() {
        assert!(groups().living.contains(&rustix::process::getpgrp().as_raw_nonzero().get()));
    }
}
