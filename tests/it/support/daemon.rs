//! The daemon as a process, with arguments, an environment, signals, a log and an exit status.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, PipeReader, Read, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use super::{Api, Refused, eventually, seccomp, terminal};

/// The arguments with which `setpriv` starts a command as an unprivileged user.
const AS_NOBODY: [&str; 4] = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];

/// A builder for a daemon: `Daemon::of(&server).threads(4).sh("exit 3").start()`.
pub struct Daemon {
    command: Command,
    terminal: Option<File>,
    controlling: Option<OwnedFd>,
    keep_output: bool,
    dir: TempDir,
}

impl Daemon {
    /// Returns a daemon that takes jobs from this server, and logs JSON at level debug.
    pub fn of(server: &Api) -> Self {
        Self::at(&server.url)
    }

    /// Returns a daemon that takes jobs from the server at this url, and logs JSON at level debug.
    pub fn at(url: &str) -> Self {
        Self::bare().args(["--url", url, "--log-format", "json", "--log-level", "debug"])
    }

    /// Returns a daemon without arguments and without `ZIZQ_*` variables.
    pub fn bare() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_zizq-worker"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).env_remove("RUST_LOG");
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ZIZQ_")) {
            command.env_remove(name);
        }
        let dir = TempDir::with_prefix("zizq-worker-test-").unwrap();
        command.env("DIR", dir.path());
        Self { command, terminal: None, controlling: None, keep_output: true, dir }
    }

    pub fn args<const N: usize>(mut self, args: [&str; N]) -> Self {
        self.command.args(args);
        self
    }

    pub fn threads(self, threads: usize) -> Self {
        self.args(["--threads", &threads.to_string()])
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.command.stdin(stdin);
        self
    }

    /// Sends the log to a pseudo-terminal.
    pub fn on_terminal(mut self) -> Self {
        let (ours, theirs) = terminal::open();
        self.command.stderr(theirs);
        self.terminal = Some(ours);
        self
    }

    /// Sends the log to a pseudo-terminal with this many columns.
    pub fn on_terminal_of(self, columns: u16) -> Self {
        let daemon = self.on_terminal();
        terminal::resize(daemon.terminal.as_ref().unwrap(), columns);
        daemon
    }

    /// Starts the daemon from the command `leader`, which leads a session whose controlling terminal is stdin. If `leader` is
    /// empty, the daemon itself leads the session. The log does not go to the terminal.
    pub fn in_session_of<const N: usize>(self, leader: [&str; N]) -> Self {
        let mut setsid = Command::new("setsid");
        setsid.arg("-c").args(leader);
        let mut daemon = self.wrap(setsid);
        let (ours, theirs) = terminal::open();
        daemon.command.stdin(theirs);
        daemon.controlling = Some(ours.into());
        daemon
    }

    /// Starts the daemon as the leader of a session, with its log on the controlling terminal.
    pub fn on_controlling_terminal(self) -> Self {
        let mut daemon = self.in_session_of([]);
        let (ours, theirs) = terminal::open();
        daemon.command.stdin(theirs.try_clone().unwrap()).stderr(theirs);
        (daemon.terminal, daemon.controlling) = (Some(ours), None);
        daemon
    }

    /// Starts the daemon in its own process group, as a shell with job control does.
    pub fn in_a_group_of_its_own(mut self) -> Self {
        self.command.process_group(0);
        self
    }

    pub fn current_dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Sets a shell script as the handler. In the script, `$DIR` is the test's directory.
    pub fn sh(self, script: &str) -> Self {
        let path = self.script("handle.sh", script);
        self.args(["--exec", path.to_str().unwrap()])
    }

    /// Writes a shell script into the test's directory.
    pub fn script(&self, name: &str, script: &str) -> PathBuf {
        self.executable(name, &format!("#!/bin/sh\n{script}\n"))
    }

    /// Writes an executable file into the test's directory.
    pub fn executable(&self, name: &str, text: &str) -> PathBuf {
        let path = self.file(name, text);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// Writes a file into the test's directory.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// Writes a configuration file and names it on the command line.
    pub fn config(self, toml: &str) -> Self {
        let path = self.file("zizq-worker.toml", toml);
        self.args(["--config", path.to_str().unwrap()])
    }

    /// Replaces `$DIR` in the text with the test's directory, writes the text as a configuration file, and names the file on the
    /// command line.
    pub fn handlers(self, toml: &str) -> Self {
        let toml = toml.replace("$DIR", self.dir.path().to_str().unwrap());
        self.config(&toml)
    }

    /// Sets a shell script as the handler of all jobs. `settings` is TOML for the `[handler]` table.
    pub fn handler(self, script: &str, settings: &str) -> Self {
        self.script("handle.sh", script);
        self.handlers(&format!("[handler]\nexec = ['$DIR/handle.sh']\n{settings}"))
    }

    /// Replaces C library functions with the functions in this C source, by means of `LD_PRELOAD`.
    pub fn preload(self, source: &str) -> Self {
        let (source, library) = (self.file("preload.c", source), self.dir().join("preload.so"));
        let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status().unwrap();
        assert!(compiled.success());
        self.env("LD_PRELOAD", library)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts the daemon from a shell that first runs `what`. The daemon inherits the limits and signal settings that `what`
    /// changes.
    pub fn after(self, what: &str) -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{what}; exec \"$@\""), "sh"]);
        self.wrap(shell)
    }

    /// Starts the daemon in a sandbox that refuses these system calls to the daemon and to its children. Must be called
    /// last, because methods that start the daemon from another command discard the sandbox.
    pub fn in_sandbox<const N: usize>(mut self, refused: [Refused; N]) -> Self {
        seccomp::refuse(&mut self.command, &refused);
        self
    }

    /// Starts the daemon as process 1 of a namespace, as in a container without an init.
    pub fn in_pid_namespace(self) -> Self {
        let mut unshare = Command::new("unshare");
        // An unprivileged user may create a PID namespace only as root of a new user namespace.
        if !rustix::process::getuid().is_root() {
            unshare.args(["--user", "--map-root-user"]);
        }
        unshare.args(["--pid", "--fork", "--mount-proc", "--kill-child", "--"]);
        self.wrap(unshare)
    }

    /// Starts the daemon as an unprivileged user. The test itself must run as root.
    pub fn without_rights(self) -> Self {
        // Run a copy, because the build directory may be inaccessible to the unprivileged user.
        let copy = self.dir().join("zizq-worker");
        fs::copy(env!("CARGO_BIN_EXE_zizq-worker"), &copy).unwrap();
        fs::set_permissions(self.dir(), fs::Permissions::from_mode(0o777)).unwrap();
        let mut setpriv = Command::new("setpriv");
        setpriv.args(AS_NOBODY);
        self.wrap_program(setpriv, copy.as_os_str().to_owned())
    }

    /// Puts a setuid copy of `setpriv` into the test's directory. Reports whether the copy becomes root when an unprivileged user
    /// runs it.
    pub fn has_way_to_root(&self) -> bool {
        let (found, copy) =
            (Command::new("sh").args(["-c", "command -v setpriv"]).output().unwrap(), self.dir().join("setpriv"));
        let found = String::from_utf8(found.stdout).unwrap();
        let is_copied = rustix::process::getuid().is_root() && fs::copy(found.trim(), &copy).is_ok();
        fs::set_permissions(self.dir(), fs::Permissions::from_mode(0o777)).unwrap();
        let works = is_copied && {
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o4755)).unwrap();
            let mut setpriv = Command::new("setpriv");
            setpriv.args(AS_NOBODY).arg(&copy).args(["--reuid=0", "true"]);
            setpriv.status().is_ok_and(|status| status.success())
        };
        if !works {
            println!("skipped: this test needs root, setpriv, and a temporary directory where set-user-id counts");
        }
        works
    }

    /// Starts the daemon from another command, to which the daemon's program and arguments are appended.
    fn wrap(self, shell: Command) -> Self {
        let program = self.command.get_program().to_owned();
        self.wrap_program(shell, program)
    }

    fn wrap_program(mut self, mut shell: Command, program: OsString) -> Self {
        shell.arg(program).args(self.command.get_args());
        for (name, value) in self.command.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.command = shell;
        self
    }

    /// Omits from the recorded log the events that contain the handlers' stderr.
    pub fn without_output(mut self) -> Self {
        self.keep_output = false;
        self
    }

    /// Starts the daemon.
    pub fn start(mut self) -> Running {
        let mut child = self.command.spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let screen = Arc::default();
        let (hung_up, hang_up) = pipe().unwrap();
        let hold = self.controlling.take().unwrap_or(hang_up.into());
        let stderr: Box<dyn Read + Send> = match self.terminal.take() {
            Some(terminal) => Box::new(Watched { terminal, screen: Arc::clone(&screen), hung_up }),
            None => Box::new(child.stderr.take().unwrap()),
        };
        let lines = Arc::clone(&log);
        let keep = move |line: &String| self.keep_output || !line.contains(r#""message":"stderr""#);
        let reading = std::thread::spawn(move || {
            // Treat an error as the end of the log, because a read from a pseudo-terminal fails once no process has its other
            // end open.
            let all = BufReader::new(stderr).split(b'\n').map_while(Result::ok);
            for line in all.map(|line| String::from_utf8_lossy(&line).into_owned()).filter(keep) {
                lines.lock().unwrap().push(line);
            }
        });
        let mut stdout = child.stdout.take().unwrap();
        let output = std::thread::spawn(move || {
            let mut text = String::new();
            stdout.read_to_string(&mut text).unwrap();
            text
        });
        let command = format!("{:?}", self.command);
        let (reading, output, terminal) = (Some(reading), Some(output), Some(hold));
        Running { child, command, log, screen, reading, output, terminal, dir: self.dir, exited: false }
    }

    /// Starts the daemon and waits until it has exited.
    pub fn run(self) -> Finished {
        self.start().finish()
    }
}

/// The bytes that a terminal has received so far.
type Screen = Arc<Mutex<Vec<u8>>>;

/// A reader that copies all text of a terminal to `screen`. Unlike the log, `screen` also has incomplete lines.
struct Watched {
    terminal: File,
    screen: Screen,
    /// The read end of a pipe whose write end is closed when the test hangs up the terminal.
    hung_up: PipeReader,
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let [terminal, hung_up] =
            [PollFd::new(&self.terminal, PollFlags::IN), PollFd::new(&self.hung_up, PollFlags::IN)];
        let mut both = [terminal, hung_up];
        poll(&mut both, None)?;
        if !both[1].revents().is_empty() {
            return Ok(0);
        }
        let length = self.terminal.read(buffer)?;
        self.screen.lock().unwrap().extend_from_slice(&buffer[..length]);
        Ok(length)
    }
}

/// A daemon that was started. Dropping the value kills the daemon if it still runs, and prints the daemon's command and log if the
/// test panics.
pub struct Running {
    child: Child,
    command: String,
    log: Arc<Mutex<Vec<String>>>,
    screen: Screen,
    reading: Option<JoinHandle<()>>,
    output: Option<JoinHandle<String>>,
    /// The test's end of the controlling terminal, or the write end of the pipe in `Watched`. Closing either hangs up the terminal.
    terminal: Option<OwnedFd>,
    dir: TempDir,
    exited: bool,
}

/// The log, the output and the exit status of a daemon that has ended.
pub struct Finished {
    pub status: ExitStatus,
    pub log: Vec<String>,
    pub stdout: String,
    /// The text on the terminal, or an empty string without a terminal.
    pub screen: String,
    dir: TempDir,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn signal(&self, signal: Signal) -> &Self {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self
    }

    /// Sends a signal to another process, for example a handler.
    pub fn signal_process(&self, pid: u32, signal: Signal) {
        kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal).unwrap();
    }

    pub fn sigterm(&self) -> &Self {
        self.signal(Signal::TERM)
    }

    pub fn sigint(&self) -> &Self {
        self.signal(Signal::INT)
    }

    /// Hangs up the terminal, as closing its window does.
    pub fn hang_up(&mut self) {
        self.terminal = None;
        if !self.screen().is_empty() {
            self.reading.take().unwrap().join().unwrap();
        }
    }

    /// Returns the log so far.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Returns the text on the terminal so far, including an incomplete last line.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    /// Waits until the JSON log has an event that matches `wanted`, and returns the event.
    pub fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        eventually(what, || {
            self.log().iter().filter_map(|line| serde_json::from_str(line).ok()).find(|event| wanted(event))
        })
    }

    /// Waits until the JSON log has an event whose message contains this text, and returns the event.
    pub fn wait_for_message(&self, message: &str) -> Value {
        self.wait_for(&format!("log: {message}"), |event| {
            event["message"].as_str().is_some_and(|text| text.contains(message))
        })
    }

    /// Waits until there are at least this many events with exactly this message, and returns all of them.
    pub fn wait_for_messages(&self, count: usize, message: &str) -> Vec<Value> {
        eventually(&format!("log: {count} × {message}"), || {
            let events = self.log().into_iter().filter_map(|line| serde_json::from_str::<Value>(&line).ok());
            let found: Vec<Value> = events.filter(|event| event["message"] == message).collect();
            (found.len() >= count).then_some(found)
        })
    }

    /// Waits until a file in the test's directory has at least this many complete lines, and returns all lines.
    pub fn wait_for_lines(&self, count: usize, name: &str) -> Vec<String> {
        let path = self.dir.path().join(name);
        eventually(&format!("{count} lines in {name}"), || {
            let text = fs::read_to_string(&path).unwrap_or_default();
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            (lines.len() >= count && text.ends_with('\n')).then_some(lines)
        })
    }

    /// Returns the resident memory of the daemon in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim_end_matches("kB").trim().parse().unwrap()
    }

    /// Returns the number of open descriptors of the daemon.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Waits until a thread of the daemon is blocked in a read from stdin.
    pub fn wait_for_blocked_read(&self) {
        let tasks = Path::new("/proc").join(self.pid().to_string()).join("task");
        eventually("a read from stdin", || {
            let mut calls = fs::read_dir(&tasks)
                .ok()?
                .flatten()
                .filter_map(|task| fs::read_to_string(task.path().join("syscall")).ok());
            calls.find(|call| call.starts_with(&format!("{} 0x0 ", libc::SYS_read)))
        });
    }

    /// Waits until a file in the test's directory exists and ends with a newline, and returns the file's content.
    pub fn wait_for_file(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        eventually(&format!("file {name}"), || fs::read_to_string(&path).ok().filter(|text| text.ends_with('\n')))
    }

    /// Returns the daemon's peak resident memory so far, in KiB.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Creates the file `go` in the test's directory, which releases handlers that wait for this file.
    pub fn go(&self) {
        fs::write(self.dir().join("go"), "").unwrap();
    }

    /// Stops the daemon with SIGTERM, and asserts that it exits with status 0.
    pub fn stop(self) -> Finished {
        self.sigterm();
        self.assert_exit(0)
    }

    /// Waits until the daemon has exited.
    pub fn finish(mut self) -> Finished {
        let status = eventually("the daemon's exit", || self.child.try_wait().unwrap());
        self.exited = true;
        if let Some(reading) = self.reading.take() {
            reading.join().unwrap();
        }
        let stdout = self.output.take().unwrap().join().unwrap();
        let dir = std::mem::replace(&mut self.dir, TempDir::new().unwrap());
        Finished { status, log: self.log(), stdout, screen: self.screen(), dir }
    }

    /// Waits until the daemon has exited, and asserts its exit status.
    pub fn assert_exit(self, code: i32) -> Finished {
        self.finish().assert_exit(code)
    }
}

impl Finished {
    #[track_caller]
    pub fn assert_exit(self, code: i32) -> Self {
        assert_eq!(self.status.code(), Some(code), "signal {:?}, log:\n{}", self.status.signal(), self.log.join("\n"));
        self
    }

    /// Asserts that the daemon exited with status 0 or was killed by SIGTERM. SIGTERM kills the daemon if the signal arrives before
    /// the daemon has installed its signal handlers.
    #[track_caller]
    pub fn assert_obeyed(self) {
        let obeyed = self.status.code() == Some(0) || self.status.signal() == Some(Signal::TERM.as_raw());
        assert!(obeyed, "{}, log:\n{}", self.status, self.log.join("\n"));
    }

    /// Returns the events of the JSON log.
    pub fn events(&self) -> Vec<Value> {
        self.log.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Returns the first event with this message. Panics if there is none.
    #[track_caller]
    pub fn event(&self, message: &str) -> Value {
        let found = self.events().into_iter().find(|event| event["message"] == message);
        found.unwrap_or_else(|| panic!("no {message:?} in the log:\n{}", self.log.join("\n")))
    }

    /// Returns all events with this message.
    pub fn all(&self, message: &str) -> Vec<Value> {
        self.events().into_iter().filter(|event| event["message"] == message).collect()
    }

    /// Reports whether the log has an event with this message.
    pub fn has(&self, message: &str) -> bool {
        self.events().iter().any(|event| event["message"] == message)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the content of a file in the test's directory, or an empty string if there is no such file.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}\n{}\n---", self.command, self.log().join("\n"));
        }
        if !self.exited {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
