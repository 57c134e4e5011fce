//! How much memory another process uses, as /proc tells.

use std::fs;

use rustix::process::Pid;

/// Reads how much memory it has resident, in bytes.
pub(super) fn resident(process: Pid) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{}/statm", process.as_raw_nonzero())).ok()?;
    let pages: u64 = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// Reads how much memory it has had resident at most, in bytes.
pub(super) fn peak(process: Pid) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{}/status", process.as_raw_nonzero())).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}
