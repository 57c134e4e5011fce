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
static LATEST: Mutex<Option<Census>> = Mutex::const_new(None);

/// The groups that have a living process, and the groups that have a zombie.
#[derive(Debug)]
struct Census {
    begun: Instant,
    living: BTreeSet<i32>,
    zombies: BTreeSet<i32>,
}

impl Census {
    fn take() -> Self {
        let mut census = Self { begun: Instant::now(), living: BTreeSet::new(), zombies: BTreeSet::new() };
        for (_, Stat { group, is_zombie, .. }) in processes() {
            let groups = if is_zombie { &mut census.zombies } else { &mut census.living };
            groups.insert(group);
        }
        census
    }
}

/// Reports whether the group has a living process, according to a scan that began at `since` or later.
async fn is_alive(group: Pid, since: Instant) -> bool {
    let mut latest = LATEST.lock().await;
    let census = match latest.take().filter(|latest| latest.begun >= since) {
        Some(census) => latest.insert(census),
        None => latest.insert(Census::take()),
    };
    let number = group.as_raw_nonzero().get();
    // With the mount option `hidepid`, /proc does not list the processes of other users. If /proc shows no zombie of the group,
    // EPERM means that the group still has a hidden process.
    let is_hidden = || !census.zombies.contains(&number) && test_kill_process_group(group) == Err(Errno::PERM);
    census.living.contains(&number) || is_hidden()
}

/// Waits until every process of the group has ended. A zombie counts as ended.
pub(super) async fn died_out(group: Pid) {
    // Require a new scan, because an earlier one does not show processes that have started since.
    let mut since = Instant::now();
    while is_alive(group, since).await {
        tokio::time::sleep(MAX_AGE / 2).await;
        since = since.max(Instant::now() - MAX_AGE);
    }
}

/// Returns the zombie children of a process.
pub(super) fn zombies_of(parent: Pid) -> impl Iterator<Item = Pid> {
    let is_child = move |stat: &Stat| stat.is_zombie && stat.parent == parent.as_raw_nonzero().get();
    processes().filter(move |(_, stat)| is_child(stat)).filter_map(|(pid, _)| Pid::from_raw(pid))
}

/// Returns the ids of all processes, each with its `/proc/PID/stat`.
fn processes() -> impl Iterator<Item = (i32, Stat)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbered = entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry)));
    numbered.filter_map(|(pid, entry)| {
        // The process's name need not be UTF-8: the kernel cuts a long name, possibly in the middle of a character.
        let line = fs::read(entry.path().join("stat")).ok()?;
        Some((pid, Stat::parse(&String::from_utf8_lossy(&line))?))
    })
}

/// A process, as a line of `/proc/PID/stat` describes it.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    parent: i32,
    group: i32,
    is_zombie: bool,
}

impl Stat {
    /// Parses a line. The fields follow the last `)`, because the process's name may contain any character, even `)`.
    fn parse(line: &str) -> Option<Self> {
        let (_, rest) = line.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let ([state, parent, group, ..], threads) = (&fields[..], fields.get(17)?) else { return None };
        // A process whose first thread has exited looks like a zombie while its other threads run.
        let is_zombie = *state == "X" || (*state == "Z" && *threads == "1");
        Some(Self { parent: parent.parse().ok()?, group: group.parse().ok()?, is_zombie })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zombie_has_no_threads_left() {
        for (state, threads, is_zombie) in [("S", 1, false), ("Z", 1, true), ("Z", 2, false)] {
            let line = format!("7 (a) b) {state} 1 5 5 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 {threads} 0 12345");
            assert_eq!(Stat::parse(&line), Some(Stat { parent: 1, group: 5, is_zombie }), "{line}");
        }
        assert_eq!(Stat::parse(""), None);
    }

    #[test]
    fn this_process_is_alive() {
        assert!(Census::take().living.contains(&rustix::process::getpgrp().as_raw_nonzero().get()));
    }
}
