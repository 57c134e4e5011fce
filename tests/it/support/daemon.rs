//! The daemon as its users run it: a process with arguments, an environment, signals, a log and an exit status.

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

/// The arguments by which setpriv starts a command as a user without rights.
const AS_NOBODY: [&str; 4] = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];

/// A daemon that has not started: `Daemon::of(&server).threads(4).sh("exit 3").start()`.
pub struct Daemon {
    command: Command,
    terminal: Option<File>,
    controlling: Option<OwnedFd>,
    keep_output: bool,
    dir: TempDir,
}

impl Daemon {
    /// A daemon for that server, with its log as JSON at level debug.
    pub fn of(server: &Api) -> Self {
        Self::at(&server.url)
    }

    /// A daemon for whatever is at that url.
    pub fn at(url: &str) -> Self {
        Self::bare().args(["--url", url, "--log-format", "json", "--log-level", "debug"])
    }

    /// A daemon without any argument or `ZIZQ_*` variable.
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

    /// The log goes to a terminal, as it does when somebody is watching.
    pub fn on_terminal(mut self) -> Self {
        let (ours, theirs) = terminal::open();
        self.command.stderr(theirs);
        self.terminal = Some(ours);
        self
    }

    /// The same with a terminal of so many columns.
    pub fn on_terminal_of(self, columns: u16) -> Self {
        let daemon = self.on_terminal();
        terminal::resize(daemon.terminal.as_ref().unwrap(), columns);
        daemon
    }

    /// Starts it by `leader`, the leader of a session whose controlling terminal is stdin; the log goes elsewhere.
    pub fn in_session_of<const N: usize>(self, leader: [&str; N]) -> Self {
        let mut setsid = Command::new("setsid");
        setsid.arg("-c").args(leader);
        let mut daemon = self.wrap(setsid);
        let (ours, theirs) = terminal::open();
        daemon.command.stdin(theirs);
        daemon.controlling = Some(ours.into());
        daemon
    }

    /// Starts it as the leader of a session, with its log on the controlling terminal.
    pub fn on_controlling_terminal(self) -> Self {
        let mut daemon = self.in_session_of([]);
        let (ours, theirs) = terminal::open();
        daemon.command.stdin(theirs.try_clone().unwrap()).stderr(theirs);
        (daemon.terminal, daemon.controlling) = (Some(ours), None);
        daemon
    }

    /// As a shell with job control starts it.
    pub fn in_a_group_of_its_own(mut self) -> Self {
        self.command.process_group(0);
        self
    }

    pub fn current_dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// A shell script as the handler. `$DIR` is the test's own directory.
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

    /// The same, with `$DIR` in it for the test's directory.
    pub fn handlers(self, toml: &str) -> Self {
        let toml = toml.replace("$DIR", self.dir.path().to_str().unwrap());
        self.config(&toml)
    }

    /// One shell script for all jobs, with these settings.
    pub fn handler(self, script: &str, settings: &str) -> Self {
        self.script("handle.sh", script);
        self.handlers(&format!("[handler]\nexec = ['$DIR/handle.sh']\n{settings}"))
    }

    /// Puts functions of the C library's out of order, by others in C that come before them.
    pub fn preload(self, source: &str) -> Self {
        let (source, library) = (self.file("preload.c", source), self.dir().join("preload.so"));
        let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status().unwrap();
        assert!(compiled.success());
        self.env("LD_PRELOAD", library)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts it from a shell that first does `what`: to limits and signals, which are handed down.
    pub fn after(self, what: &str) -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{what}; exec \"$@\""), "sh"]);
        self.wrap(shell)
    }

    /// Starts it in a sandbox that refuses these calls to it and to all that it starts. Last, as what wraps it is refused them too.
    pub fn in_sandbox<const N: usize>(mut self, refused: [Refused; N]) -> Self {
        seccomp::refuse(&mut self.command, &refused);
        self
    }

    /// Starts it as process 1 of a namespace, as in a container without an init.
    pub fn in_pid_namespace(self) -> Self {
        let mut unshare = Command::new("unshare");
        // Who is not root becomes it in a namespace of users.
        if !rustix::process::getuid().is_root() {
            unshare.args(["--user", "--map-root-user"]);
        }
        unshare.args(["--pid", "--fork", "--mount-proc", "--kill-child", "--"]);
        self.wrap(unshare)
    }

    /// Starts it as a user without rights. Only root can do that.
    pub fn without_rights(self) -> Self {
        // The build may be where this user may not look.
        let copy = self.dir().join("zizq-worker");
        fs::copy(env!("CARGO_BIN_EXE_zizq-worker"), &copy).unwrap();
        fs::set_permissions(self.dir(), fs::Permissions::from_mode(0o777)).unwrap();
        let mut setpriv = Command::new("setpriv");
        setpriv.args(AS_NOBODY);
        self.wrap_program(setpriv, copy.as_os_str().to_owned())
    }

    /// Puts a `setpriv` into the test's directory by which every user becomes root. Returns whether that works here.
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

    /// Has another command start it.
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

    /// What its handlers print is read from the log, but not kept.
    pub fn without_output(mut self) -> Self {
        self.keep_output = false;
        self
    }

    /// Starts it.
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
            // A terminal ends with an error.
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

    /// Starts it and waits for its end.
    pub fn run(self) -> Finished {
        self.start().finish()
    }
}

/// Everything that has come to a terminal.
type Screen = Arc<Mutex<Vec<u8>>>;

/// A terminal that somebody watches: they see more than whole lines.
struct Watched {
    terminal: File,
    screen: Screen,
    /// At its end when the watching is over.
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

/// A daemon that runs. Dropped before its end it is killed, and when a test fails it shows what it did.
pub struct Running {
    child: Child,
    command: String,
    log: Arc<Mutex<Vec<String>>>,
    screen: Screen,
    reading: Option<JoinHandle<()>>,
    output: Option<JoinHandle<String>>,
    /// Closed, it closes our end of a terminal.
    terminal: Option<OwnedFd>,
    dir: TempDir,
    exited: bool,
}

/// What a daemon has left: its log, its output, and how it ended.
pub struct Finished {
    pub status: ExitStatus,
    pub log: Vec<String>,
    pub stdout: String,
    /// What a terminal has shown.
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

    /// Signals another process of it.
    pub fn signal_process(&self, pid: u32, signal: Signal) {
        kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal).unwrap();
    }

    pub fn sigterm(&self) -> &Self {
        self.signal(Signal::TERM)
    }

    pub fn sigint(&self) -> &Self {
        self.signal(Signal::INT)
    }

    /// Closes the terminal, as when its window is closed.
    pub fn hang_up(&mut self) {
        self.terminal = None;
        if !self.screen().is_empty() {
            self.reading.take().unwrap().join().unwrap();
        }
    }

    /// The log so far.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// What the terminal has shown so far, its last line included.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    /// Waits for an event of the JSON log, and returns it.
    pub fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        eventually(what, || {
            self.log().iter().filter_map(|line| serde_json::from_str(line).ok()).find(|event| wanted(event))
        })
    }

    /// Waits for an event with that message.
    pub fn wait_for_message(&self, message: &str) -> Value {
        self.wait_for(&format!("log: {message}"), |event| {
            event["message"].as_str().is_some_and(|text| text.contains(message))
        })
    }

    /// Waits until there are that many events with that message, and returns all of them.
    pub fn wait_for_messages(&self, count: usize, message: &str) -> Vec<Value> {
        eventually(&format!("log: {count} × {message}"), || {
            let events = self.log().into_iter().filter_map(|line| serde_json::from_str::<Value>(&line).ok());
            let found: Vec<Value> = events.filter(|event| event["message"] == message).collect();
            (found.len() >= count).then_some(found)
        })
    }

    /// Waits until handlers have written that many lines into a file in the test's directory, and returns them.
    pub fn wait_for_lines(&self, count: usize, name: &str) -> Vec<String> {
        let path = self.dir.path().join(name);
        eventually(&format!("{count} lines in {name}"), || {
            let text = fs::read_to_string(&path).unwrap_or_default();
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            (lines.len() >= count && text.ends_with('\n')).then_some(lines)
        })
    }

    /// Its memory, as the kernel counts it.
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim_end_matches("kB").trim().parse().unwrap()
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Waits until one of its threads reads from its stdin, as the kernel sees it.
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

    /// Waits until a handler has made a file in the test's directory, and returns what is in it.
    pub fn wait_for_file(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        eventually(&format!("file {name}"), || fs::read_to_string(&path).ok().filter(|text| text.ends_with('\n')))
    }

    /// The most memory that it has had resident so far, in KiB.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Tells handlers that wait for a file `go` in the test's directory.
    pub fn go(&self) {
        fs::write(self.dir().join("go"), "").unwrap();
    }

    /// Stops it, and waits for its end.
    pub fn stop(self) -> Finished {
        self.sigterm();
        self.assert_exit(0)
    }

    /// Waits for the daemon's end.
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

    /// Waits for the daemon's end and its exit status.
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

    /// Ended as asked, or by the signal itself if it came before anyone listened.
    #[track_caller]
    pub fn assert_obeyed(self) {
        let obeyed = self.status.code() == Some(0) || self.status.signal() == Some(Signal::TERM.as_raw());
        assert!(obeyed, "{}, log:\n{}", self.status, self.log.join("\n"));
    }

    /// The events of a JSON log.
    pub fn events(&self) -> Vec<Value> {
        self.log.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The one event with that message.
    #[track_caller]
    pub fn event(&self, message: &str) -> Value {
        let found = self.events().into_iter().find(|event| event["message"] == message);
        found.unwrap_or_else(|| panic!("no {message:?} in the log:\n{}", self.log.join("\n")))
    }

    /// All events with that message.
    pub fn all(&self, message: &str) -> Vec<Value> {
        self.events().into_iter().filter(|event| event["message"] == message).collect()
    }

    /// Whether the log has an event with that message.
    pub fn has(&self, message: &str) -> bool {
        self.events().iter().any(|event| event["message"] == message)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What a handler wrote into the test's directory; nothing when it wrote no such file.
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
