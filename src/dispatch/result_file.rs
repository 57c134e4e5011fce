//! [`ResultFile`]: the file in which a failing handler can report more than its exit status.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FileType, FlockOperation, OFlags, StatxFlags, flock, statx};
use rustix::io::Errno;
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::warn;

use super::file_threads::FileThreads;
use crate::job::Failure;

/// The maximum size of a result file in bytes, far more than a message and a backtrace need.
const MAX_BYTES: u64 = 1024 * 1024;

/// The latest `retry_at`: the end of the year 9999, in Unix milliseconds. A server may refuse a report with a later time.
const LAST_TIME: u64 = 253_402_300_799_999;

/// The longest `retry_in`: a thousand years. A longer duration is rejected as a mistake.
const LONGEST_WAIT: Duration = Duration::from_secs(1000 * 365 * 24 * 60 * 60);

/// The time limit for reading a result file. Reading 1 MiB from a disk takes milliseconds.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// The time limit for removing the files that handlers have left behind. The removal takes place when the worker ends.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(5);

/// A private directory for result files and for the sockets of warm processes. Dropping this removes the directory.
#[derive(Debug)]
pub(super) struct ResultDir {
    path: PathBuf,
    /// The open directory, which is locked because programs that clean up temporary directories skip locked ones.
    lock: File,
    /// The number of the device that holds the directory.
    device: (u32, u32),
    next: AtomicU64,
    reads: FileThreads,
    removals: FileThreads,
}

impl ResultDir {
    pub(super) fn create(below: &Path) -> io::Result<Self> {
        let mut builder = tempfile::Builder::new();
        let dir = builder.prefix("zizq-worker-").permissions(fs::Permissions::from_mode(0o700)).tempdir_in(below)?;
        let lock = File::open(dir.path())?;
        flock(&lock, FlockOperation::LockShared)?;
        let about = statx(&lock, c"", AtFlags::EMPTY_PATH, StatxFlags::TYPE)?;
        let device = (about.stx_dev_major, about.stx_dev_minor);
        let (reads, removals) = (FileThreads::with_threads(4), FileThreads::with_threads(1));
        Ok(Self { path: dir.keep(), lock, device, next: AtomicU64::new(0), reads, removals })
    }

    /// Reports whether the directory's path is short enough for sockets in it. The path of a socket has at most 108 bytes,
    /// including the terminating zero byte (unix(7)).
    pub(super) fn has_room_for_sockets(&self) -> bool {
        self.path.as_os_str().len() + "/18446744073709551615.sock".len() < 108
    }

    /// Returns an unused path for a socket.
    pub(super) fn socket(&self) -> PathBuf {
        self.path.join(format!("{}.sock", self.next.fetch_add(1, Ordering::Relaxed)))
    }

    /// Returns an unused path for one job's result file. The file name is a number and not the job's id, because a path must not
    /// contain data from a job.
    pub(super) fn file(&self) -> ResultFile<'_> {
        ResultFile { dir: self, path: self.path.join(self.next.fetch_add(1, Ordering::Relaxed).to_string()) }
    }
}

/// The path of one job's result file. Dropping this removes any file or directory that the handler has left there.
#[derive(Debug)]
pub(super) struct ResultFile<'a> {
    dir: &'a ResultDir,
    path: PathBuf,
}

/// The kind of file that a handler has left at the path of its result file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LeftBehind {
    Nothing,
    /// A small regular file on the directory's own file system. It is read and removed in the current thread, because that does
    /// not hang.
    SmallFile,
    /// Anything else, for example a directory, a large file or a mounted file system. It is read and removed in another thread,
    /// because that may hang.
    Other,
}

impl ResultFile<'_> {
    pub(super) fn path(&self) -> &OsStr {
        self.path.as_os_str()
    }

    /// Reads the handler's verdict. Returns `None` if there is no file. If the file is unusable, logs a warning and returns
    /// `None`.
    pub(super) async fn read(&self) -> Option<Verdict> {
        let read = match self.find() {
            LeftBehind::Nothing => return None,
            LeftBehind::SmallFile => try_read(&self.path),
            LeftBehind::Other => {
                let path = self.path.clone();
                let read = self.dir.reads.ask(READ_TIMEOUT, move || try_read(&path)).await;
                read.unwrap_or_else(|| Err("it cannot be read in time".to_owned()))
            }
        };
        match read {
            Ok(verdict) => verdict,
            Err(reason) => {
                warn!(reason, "result file ignored");
                None
            }
        }
    }

    /// Finds the kind of the file with statx(2). The flags limit the call to attributes that the kernel has cached, so that a
    /// mounted network file system cannot make the call hang.
    fn find(&self) -> LeftBehind {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let name = self.path.file_name().unwrap_or_default();
        match statx(&self.dir.lock, name, flags, StatxFlags::TYPE | StatxFlags::SIZE) {
            Err(Errno::NOENT) => LeftBehind::Nothing,
            Ok(about)
                if FileType::from_raw_mode(about.stx_mode.into()) == FileType::RegularFile
                    && about.stx_size <= MAX_BYTES
                    && (about.stx_dev_major, about.stx_dev_minor) == self.dir.device =>
            {
                LeftBehind::SmallFile
            }
            Ok(_) | Err(_) => LeftBehind::Other,
        }
    }
}

fn try_read(path: &Path) -> Result<Option<Verdict>, String> {
    // Do not follow a symbolic link, and do not wait for a writer if the file is a named pipe.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|error| format!("it cannot be opened: {error}"))?,
    };
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Err("it is not a regular file".to_owned());
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| format!("it cannot be read: {error}"))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("it is larger than {MAX_BYTES} bytes"));
    }
    Verdict::parse(&bytes).map(Some)
}

/// Removes the file. A small file is removed at once. Anything else is removed in another thread, because the removal may take
/// minutes.
impl Drop for ResultFile<'_> {
    fn drop(&mut self) {
        match self.find() {
            LeftBehind::Nothing => {}
            // A file that cannot be removed now is removed with the directory.
            LeftBehind::SmallFile => drop(fs::remove_file(&self.path)),
            LeftBehind::Other => {
                let path = std::mem::take(&mut self.path);
                // If too many removals are queued, this one is skipped. The file is then removed with the directory when the
                // worker ends.
                let _ = self.dir.removals.run(move || drop(remove(&path)));
            }
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => remove_tree(path),
        removed => removed,
    }
}

/// Removes the directory. If it is not empty, a thread removes it after the queued removals, because handlers may have left deep
/// directory trees. Waits for the thread up to `REMOVAL_TIMEOUT`.
impl Drop for ResultDir {
    fn drop(&mut self) {
        if fs::remove_dir(&self.path).is_ok() {
            return;
        }
        let (top, (tell, removed)) = (self.path.clone(), mpsc::channel());
        let is_begun = self.removals.run(move || {
            // The send fails if the receiver has timed out.
            let _ = tell.send(remove_tree(&top));
        });
        if !is_begun || !matches!(removed.recv_timeout(REMOVAL_TIMEOUT), Ok(Ok(()))) {
            warn!(directory = %self.path.display(), "files of handlers are left behind");
        }
    }
}

/// Removes a directory of any depth. `fs::remove_dir_all` needs a stack frame and a descriptor for each level, so about ten
/// thousand levels would crash the worker. This function instead moves each nested directory into `top` before it removes that
/// directory.
fn remove_tree(top: &Path) -> io::Result<()> {
    loop {
        let mut is_flat = true;
        for entry in fs::read_dir(top)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                is_flat = false;
                empty_into(top, &entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        if is_flat {
            return fs::remove_dir(top);
        }
    }
}

/// Moves the directories in `dir` to `top`, removes the files in `dir`, and then removes `dir`.
fn empty_into(top: &Path, dir: &Path) -> io::Result<()> {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            // A directory that is not writable cannot be moved, even by its owner.
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o700))?;
            fs::rename(entry.path(), top.join(format!("{:032x}", fastrand::u128(..))))?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(dir)
}

/// The details that the handler itself has reported about a failure.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Verdict {
    message: Option<String>,
    error_type: Option<String>,
    backtrace: Option<String>,
    /// The time of the retry, in Unix milliseconds.
    retry_at: Option<u64>,
    kill: bool,
}

/// The JSON form of a [`Verdict`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenVerdict {
    pub(super) message: Option<String>,
    pub(super) error_type: Option<String>,
    pub(super) backtrace: Option<String>,
    pub(super) retry_in: Option<NumberOrText>,
    pub(super) retry_at: Option<NumberOrText>,
    pub(super) kill: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number or a string")]
pub(super) enum NumberOrText {
    Number(f64),
    Text(String),
}

impl Verdict {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        Self::of(serde_json::from_slice(bytes).map_err(|error| error.to_string())?)
    }

    /// Converts the JSON form of a verdict, and validates the time of the retry. `retry_in` counts from now.
    ///
    /// # Errors
    /// When `retry_in` and `retry_at` are both set, or one of them is invalid.
    pub(super) fn of(written: WrittenVerdict) -> Result<Self, String> {
        let retry_at = match (written.retry_in, written.retry_at) {
            (Some(_), Some(_)) => return Err("it has both retry_in and retry_at".to_owned()),
            (Some(wait), None) => Some(from_now(retry_in(&wait)?)),
            (None, Some(time)) => Some(retry_at(&time)?),
            (None, None) => None,
        };
        Ok(Self {
            message: written.message,
            error_type: written.error_type,
            backtrace: written.backtrace,
            retry_at,
            kill: written.kill.unwrap_or_default(),
        })
    }

    /// Returns `failure`, overridden by the values that the verdict sets. `kill` can be set, but not cleared.
    pub(super) fn apply_to(self, failure: Failure) -> Failure {
        Failure {
            message: self.message.unwrap_or(failure.message),
            is_named_by_handler: self.error_type.is_some(),
            error_type: self.error_type.or(failure.error_type),
            backtrace: self.backtrace.or(failure.backtrace),
            retry_at: self.retry_at,
            kill: failure.kill || self.kill,
        }
    }
}

/// Returns the time that is `wait` from now, in Unix milliseconds.
#[expect(clippy::disallowed_methods, reason = "the server schedules retries by wall time")]
fn from_now(wait: Duration) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.saturating_add(wait).as_millis()).unwrap_or(u64::MAX)
}

fn retry_in(wait: &NumberOrText) -> Result<Duration, String> {
    let duration = match wait {
        NumberOrText::Number(seconds) => Duration::try_from_secs_f64(*seconds).ok(),
        NumberOrText::Text(text) => humantime::parse_duration(text).ok(),
    };
    duration
        .filter(|wait| *wait <= LONGEST_WAIT)
        .ok_or_else(|| "retry_in must be seconds, or a duration like \"5m\"".to_owned())
}

fn retry_at(time: &NumberOrText) -> Result<u64, String> {
    let millis = match time {
        NumberOrText::Number(millis) if *millis >= 0.0 => Some(*millis as u64),
        NumberOrText::Number(_) => None,
        NumberOrText::Text(text) => OffsetDateTime::parse(text, &Rfc3339)
            .ok()
            .and_then(|time| u64::try_from(time.unix_timestamp_nanos() / 1_000_000).ok()),
    };
    millis
        .filter(|millis| *millis <= LAST_TIME)
        .ok_or_else(|| "retry_at must be Unix milliseconds, or a time like \"2030-01-31T08:00:00Z\"".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Verdict, String> {
        Verdict::parse(text.as_bytes())
    }

    fn written(json: &str) -> NumberOrText {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn every_field_is_optional() {
        assert_eq!(parse("{}").unwrap(), Verdict::default());
        assert_eq!(parse(r#"{"kill":null,"message":null}"#).unwrap(), Verdict::default());
    }

    #[test]
    fn a_wait_is_seconds_or_humantime() {
        assert_eq!(retry_in(&written("1.5")), Ok(Duration::from_millis(1500)));
        assert_eq!(retry_in(&written(r#""5m""#)), Ok(Duration::from_secs(300)));
        let verdict = parse(r#"{"retry_in":60}"#).unwrap();
        let at = from_now(Duration::from_secs(60));
        assert!((at - 10_000..=at).contains(&verdict.retry_at.unwrap()));
    }

    #[test]
    fn a_time_is_unix_milliseconds_or_rfc_3339_in_any_zone() {
        assert_eq!(retry_at(&written("1795485639928")), Ok(1_795_485_639_928));
        assert_eq!(retry_at(&written(r#""1970-01-01T00:00:01Z""#)), Ok(1000));
        assert_eq!(retry_at(&written(r#""1970-01-01T02:00:00.5+02:00""#)), Ok(500));
    }

    #[test]
    fn an_invalid_file_is_refused_with_the_reason() {
        for (text, reason) in [
            ("", "EOF"),
            ("[]", "invalid"),
            (r#"{"retry":1}"#, "unknown field `retry`"),
            (r#"{"retry_in":-1}"#, "retry_in must be"),
            (r#"{"retry_in":true}"#, "expected a number or a string"),
            (r#"{"retry_at":"tomorrow"}"#, "retry_at must be"),
            (r#"{"retry_at":-5}"#, "retry_at must be"),
            (r#"{"retry_at":1e300}"#, "retry_at must be"),
            (r#"{"retry_in":1e18}"#, "retry_in must be"),
            (r#"{"retry_in":1,"retry_at":1}"#, "both"),
            (r#"{"message":7}"#, "invalid type"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn a_verdict_overrides_the_failure_and_takes_no_kill_back() {
        let ours = Failure { kill: true, ..Failure::new("ExitStatus", "ours").with_backtrace("trace".into()) };
        let reported = parse(r#"{"message":"theirs","kill":false,"retry_at":7}"#).unwrap().apply_to(ours);
        assert_eq!(reported.message, "theirs");
        assert_eq!(reported.error_type.as_deref(), Some("ExitStatus"));
        assert_eq!(reported.backtrace.as_deref(), Some("trace"));
        assert_eq!((reported.retry_at, reported.kill), (Some(7), true));
    }
}
