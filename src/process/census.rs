//! [`Census`]: a scan of /proc for living process groups. `kill` with signal 0 succeeds for zombies too, so only /proc
//! distinguishes zombies from living processes.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process_group};
use tokio::sync::Mutex;
use tokio::time::Instant;

/// The maximum age of a scan that is reused. A scan takes milliseconds on a busy machine, and hundreds of jobs may need one at
/// once.
const MAX_AGE: Duration = Duration::from_millis(50);

/// The latest scan of /proc. One scan lists all groups, so all waiting jobs share it.
static LATEST: Mutex<Census> =
    Mutex::const_new(Census { begun: None, groups: Groups { living: BTreeSet::new(), zombies: BTreeSet::new() } });

#[derive(Debug)]
struct Census {
    begun: Option<Instant>,
    groups: Groups,
}

/// The groups that have a living process, and the groups that have a zombie.
#[derive(Debug, Default)]
struct Groups {
    living: BTreeSet<i32>,
    zombies: BTreeSet<i32>,
}

/// Reports whether the group has a living process, according to a scan that began at `since` or later.
async fn is_alive(group: Pid, since: Instant) -> bool {
    let mut latest = LATEST.lock().await;
    if latest.begun.is_none_or(|begun| begun < since) {
        *latest = Census { begun: Some(Instant::now()), groups: groups() };
    }
    let (number, Groups { living, zombies }) = (group.as_raw_nonzero().get(), &latest.groups);
    // With the mount option `hidepid`, /proc does not list the processes of other users. If /proc shows no zombie of the group,
    // EPERM means that the group still has a hidden process.
    let is_hidden = || !zombies.contains(&number) && test_kill_process_group(group) == Err(Errno::PERM);
    living.contains(&number) || is_hidden()
}

/// Waits until every process of the group has ended, reaped or not.
pub(super) async fn died_out(group: Pid) {
    // Require a new scan, because an earlier one does not show processes that have started since.
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

/// Returns the ids of all processes, each with its line of `/proc/PID/stat`.
fn processes() -> impl Iterator<Item = (i32, String)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbered = entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry)));
    numbered.filter_map(|(pid, entry)| Some((pid, fs::read_to_string(entry.path().join("stat")).ok()?)))
}

fn zombies_parent(stat: &str) -> Option<i32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.trim_start().strip_prefix('Z')?.split_ascii_whitespace().next()?.parse().ok()
}

/// Parses a line of `/proc/PID/stat`. Returns the group of the process, and whether the process is a zombie. The fields follow
/// the last `)`, because the process's name may contain any character, even `)`.
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
