//! [`spawn`]: starts a program as the leader of a process group, by `posix_spawn`.
//!
//! std starts it in the same way, but makes a map of the whole environment for that, each time: with forty variables, a tenth of
//! the CPU time that a job costs this process.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::raw::{c_char, c_int, c_short};
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;

use rustix::process::Pid;

use super::program::Program;

/// What a start needs beside the program. What is not given is as this process has it.
pub(super) struct Surroundings<'a> {
    pub(super) env: &'a [(OsString, OsString)],
    /// These win over `env`.
    pub(super) extra_env: &'a [(&'a str, &'a OsStr)],
    pub(super) cwd: Option<&'a Path>,
    /// Its stdin, stdout and stderr.
    pub(super) stdio: [Option<BorrowedFd<'a>>; 3],
}

/// Starts it. An error is the system's word for why there is no process.
#[expect(unsafe_code, reason = "no safe wrapper takes an environment that is ready to use")]
pub(super) fn spawn(program: &Program, surroundings: &Surroundings<'_>) -> io::Result<Pid> {
    let (arguments, environment) = (arguments(program).pointers()?, environment(surroundings).pointers()?);
    let (path, actions) = (c_string(program.path.as_os_str())?, Actions::of(surroundings)?);
    let attributes = Attributes::of_a_leader()?;
    let mut pid = 0;
    // SAFETY: both lists end with a null pointer, what they point to lives in them, as strings with a zero byte at the end,
    // and the rest are live objects of the right type that have been initialised.
    check(unsafe {
        libc::posix_spawnp(
            &raw mut pid,
            path.as_ptr(),
            actions.0.as_ptr(),
            attributes.0.as_ptr(),
            arguments.list.as_ptr(),
            environment.list.as_ptr(),
        )
    })?;
    Pid::from_raw(pid).ok_or_else(|| io::Error::other("the new process has no number"))
}

/// These functions return what others leave in `errno`.
fn check(errno: c_int) -> io::Result<()> {
    if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    Ok(CString::new(text.as_encoded_bytes())?)
}

fn arguments(program: &Program) -> Strings {
    let mut arguments = Strings::default();
    arguments.push(&[program.name.as_encoded_bytes()]);
    program.args.iter().for_each(|argument| arguments.push(&[argument.as_encoded_bytes()]));
    arguments
}

fn environment(surroundings: &Surroundings<'_>) -> Strings {
    let Surroundings { env, extra_env, .. } = surroundings;
    // Most are that small; it grows if this one is not.
    let mut environment = Strings { bytes: Vec::with_capacity(4096), starts: Vec::with_capacity(64) };
    for (name, value) in env.iter().filter(|(name, _)| extra_env.iter().all(|(extra, _)| name != extra)) {
        environment.push(&[name.as_encoded_bytes(), b"=", value.as_encoded_bytes()]);
    }
    for (name, value) in *extra_env {
        environment.push(&[name.as_bytes(), b"=", value.as_encoded_bytes()]);
    }
    environment
}

/// What the child does with its files before it becomes the program.
struct Actions(Box<MaybeUninit<libc::posix_spawn_file_actions_t>>);

#[expect(unsafe_code, reason = "these are calls of the C library")]
impl Actions {
    fn of(surroundings: &Surroundings<'_>) -> io::Result<Self> {
        let mut actions = Box::new(MaybeUninit::uninit());
        // SAFETY: it may be uninitialised, and is initialised, at a place that does not move, before it is anything else.
        check(unsafe { libc::posix_spawn_file_actions_init(actions.as_mut_ptr()) })?;
        let mut actions = Self(actions);
        if let Some(cwd) = surroundings.cwd {
            let cwd = c_string(cwd.as_os_str())?;
            // SAFETY: it has been initialised, and copies the string.
            check(unsafe { libc::posix_spawn_file_actions_addchdir_np(actions.0.as_mut_ptr(), cwd.as_ptr()) })?;
        }
        for (number, file) in (0..).zip(&surroundings.stdio) {
            if let Some(file) = file {
                // SAFETY: it has been initialised, and the file is open for as long as the surroundings live.
                check(unsafe {
                    libc::posix_spawn_file_actions_adddup2(actions.0.as_mut_ptr(), file.as_raw_fd(), number)
                })?;
            }
        }
        Ok(actions)
    }
}

#[expect(unsafe_code, reason = "this is a call of the C library")]
impl Drop for Actions {
    fn drop(&mut self) {
        // SAFETY: it has been initialised, and nothing uses it any more.
        unsafe { libc::posix_spawn_file_actions_destroy(self.0.as_mut_ptr()) };
    }
}

/// What the child is like apart from that.
struct Attributes(Box<MaybeUninit<libc::posix_spawnattr_t>>);

#[expect(unsafe_code, reason = "these are calls of the C library")]
impl Attributes {
    /// Leads a group of its own, holds no signal back, and has the default action for all that this process does not ignore.
    fn of_a_leader() -> io::Result<Self> {
        let mut attributes = Box::new(MaybeUninit::uninit());
        let flags = libc::POSIX_SPAWN_SETPGROUP | libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
        // SAFETY: it may be uninitialised, and is initialised, at a place that does not move, before it is anything else.
        check(unsafe { libc::posix_spawnattr_init(attributes.as_mut_ptr()) })?;
        let mut attributes = Self(attributes);
        let of = attributes.0.as_mut_ptr();
        // SAFETY: it has been initialised, and so have the sets.
        unsafe {
            check(libc::posix_spawnattr_setpgroup(of, 0))?;
            check(libc::posix_spawnattr_setsigmask(of, &signal_set([])))?;
            check(libc::posix_spawnattr_setsigdefault(of, DEFAULT_SIGNALS.get_or_init(not_ignored)))?;
            check(libc::posix_spawnattr_setflags(of, c_short::try_from(flags).unwrap_or_default()))?;
        }
        Ok(attributes)
    }
}

/// Asked once: what this process ignores it does from its beginning.
static DEFAULT_SIGNALS: OnceLock<libc::sigset_t> = OnceLock::new();

/// A program starts with no signal handled anyway. But the C library, unless it is told to set a signal to its default, asks
/// the kernel first how it is: that is sixty more calls for each child. Only SIGPIPE is ignored on behalf of this process alone.
#[expect(unsafe_code, reason = "no safe wrapper tells what becomes of a signal")]
fn not_ignored() -> libc::sigset_t {
    signal_set((1..=libc::SIGRTMAX()).filter(|signal| {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: the pointer is to live memory of the right type, and all zeroes is a valid `sigaction`.
        let (asked, action) = unsafe {
            let asked = libc::sigaction(*signal, ptr::null(), action.as_mut_ptr());
            (asked, action.assume_init())
        };
        let can_be_set = asked == 0 && !matches!(*signal, libc::SIGKILL | libc::SIGSTOP);
        can_be_set && (*signal == libc::SIGPIPE || action.sa_sigaction != libc::SIG_IGN)
    }))
}

#[expect(unsafe_code, reason = "there is no safe way to make a set of signals")]
fn signal_set(signals: impl IntoIterator<Item = c_int>) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: it may be uninitialised, and is initialised, before it is anything else.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

#[expect(unsafe_code, reason = "this is a call of the C library")]
impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: it has been initialised, and nothing uses it any more.
        unsafe { libc::posix_spawnattr_destroy(self.0.as_mut_ptr()) };
    }
}

/// Strings as the system takes them, each with a zero byte at its end, in one piece of memory.
#[derive(Default)]
struct Strings {
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

/// Where they are, with a null pointer at the end of the list.
struct Pointers {
    list: Vec<*mut c_char>,
    _bytes: Vec<u8>,
}

impl Strings {
    fn push(&mut self, pieces: &[&[u8]]) {
        self.starts.push(self.bytes.len());
        pieces.iter().for_each(|piece| self.bytes.extend_from_slice(piece));
        self.bytes.push(0);
    }

    fn pointers(self) -> io::Result<Pointers> {
        let Self { mut bytes, starts } = self;
        if memchr::memchr_iter(0, &bytes).count() != starts.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a zero byte in an argument or a variable"));
        }
        let first: *mut c_char = bytes.as_mut_ptr().cast();
        let list = starts.iter().map(|start| first.wrapping_add(*start)).chain([ptr::null_mut()]).collect();
        Ok(Pointers { list, _bytes: bytes })
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "a set of signals is read by a call of the C library")]
mod tests {
    use super::*;

    #[test]
    fn a_zero_byte_is_refused_as_what_no_system_call_saw() {
        let mut strings = Strings::default();
        strings.push(&[b"A", b"=", b"b\0c"]);
        assert_eq!(strings.pointers().err().unwrap().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn what_is_handled_here_or_ignored_for_std_is_set_back_and_nothing_else_that_is_ignored() {
        let signals = not_ignored();
        // SAFETY: the set has been initialised.
        let has = |signal| unsafe { libc::sigismember(&raw const signals, signal) } == 1;
        assert!(has(libc::SIGPIPE) && has(libc::SIGTERM) && has(libc::SIGRTMAX()));
        assert!(!has(libc::SIGKILL) && !has(libc::SIGSTOP));
    }

    #[test]
    fn the_extra_environment_wins() {
        let env: [(OsString, OsString); 2] = [("A".into(), "1".into()), ("AB".into(), "2".into())];
        let extra_env = [("A", OsStr::new("3"))];
        let surroundings = Surroundings { env: &env, extra_env: &extra_env, cwd: None, stdio: [None; 3] };
        assert_eq!(environment(&surroundings).bytes, b"AB=2\0A=3\0");
    }
}
