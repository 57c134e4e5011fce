//! A headless Chromium, controlled over pipes with the DevTools protocol: JSON messages that end with a zero byte.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{PATIENCE, eventually};

/// The names of the Chromium program in distributions.
const NAMES: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];

/// The flags that run the browser without a window, let the test control it over pipes, and prevent requests that the page does
/// not make.
const FLAGS: [&str; 13] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
];

/// The lock that a running browser holds, so that only one runs at a time. Several browsers at once start slowly, or not at all
/// if memory is short.
static TURN: Mutex<()> = Mutex::new(());

/// A browser with one page.
pub struct Browser {
    _turn: MutexGuard<'static, ()>,
    child: Child,
    commands: ChildStdin,
    messages: Receiver<Value>,
    session: Option<String>,
    next: u64,
    /// All events of the page so far.
    events: Vec<Value>,
    profile: TempDir,
}

/// Finds an installed browser. In CI, panics if no browser is installed.
fn find() -> Option<PathBuf> {
    let found = NAMES.iter().find_map(|name| which::which(name).ok());
    if found.is_none() {
        assert!(std::env::var_os("CI").is_none(), "CI has to have a chromium");
        println!("skipped: this test needs chromium");
    }
    found
}

impl Browser {
    /// Opens a page in a new browser. Returns `None` if no browser is installed.
    pub fn open(url: &str) -> Option<Self> {
        let mut browser = Self::start(&find()?);
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}))["targetId"].clone();
        let session = browser.call("Target.attachToTarget", json!({"targetId": target, "flatten": true}));
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Runtime", "Log", "Network", "Page"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser.call("Page.navigate", json!({ "url": url }));
        while browser.of("Page.loadEventFired").next().is_none() {
            let event = browser.messages.recv_timeout(PATIENCE).unwrap();
            browser.events.push(event);
        }
        Some(browser)
    }

    fn start(program: &Path) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let profile = TempDir::with_prefix("zizq-worker-browser-").unwrap();
        // The browser reads commands from descriptor 3, and writes messages to descriptor 4.
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec 3<&0 4>&1 0</dev/null 1>&2; exec \"$@\"", "sh"]).arg(program).args(FLAGS);
        shell.arg(format!("--user-data-dir={}", profile.path().display()));
        shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(profile.path().join("stderr")).unwrap());
        let mut child = shell.spawn().unwrap();
        let (commands, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (send, messages) = channel();
        std::thread::spawn(move || {
            for message in BufReader::new(output).split(0).map_while(Result::ok) {
                let _ = send.send(serde_json::from_slice(&message).unwrap());
            }
        });
        Self { _turn: turn, child, commands, messages, session: None, next: 1, events: Vec::new(), profile }
    }

    /// Sends a command to the browser, and returns the answer.
    fn call(&mut self, method: &str, params: Value) -> Value {
        let id = self.next;
        self.next += 1;
        let mut command = json!({"id": id, "method": method, "params": params});
        if let Some(session) = &self.session {
            command["sessionId"] = json!(session);
        }
        self.commands.write_all(format!("{command}\0").as_bytes()).unwrap();
        let give_up = Instant::now() + PATIENCE;
        loop {
            let left = give_up.saturating_duration_since(Instant::now());
            let message = self.messages.recv_timeout(left).unwrap_or_else(|error| {
                let stderr = fs::read_to_string(self.profile.path().join("stderr")).unwrap_or_default();
                panic!("{method}: {error}\n{stderr}")
            });
            if message["id"] == id {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].clone();
            }
            self.events.push(message);
        }
    }

    /// Evaluates an expression in the page.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let answer = self.call("Runtime.evaluate", json!({"expression": expression, "returnByValue": true}));
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// Returns the visible text of the page.
    pub fn text(&mut self) -> String {
        self.evaluate("document.body.innerText").as_str().unwrap().to_owned()
    }

    /// Waits until the page's visible text matches `wanted`, and returns the text.
    pub fn wait_for_text(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let mut text = String::new();
        eventually(what, || {
            text = self.text();
            wanted(&text).then_some(())
        });
        text
    }

    /// Sets the size of the window and the page's preferred color scheme.
    pub fn resize(&mut self, width: u32, height: u32, scheme: &str) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size);
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", features);
    }

    /// Returns a screenshot of the window as PNG.
    pub fn screenshot(&mut self) -> Vec<u8> {
        let answer = self.call("Page.captureScreenshot", json!({"format": "png", "optimizeForSpeed": false}));
        BASE64_STANDARD.decode(answer["data"].as_str().unwrap()).unwrap()
    }

    fn of(&self, method: &str) -> impl Iterator<Item = &Value> {
        self.events.iter().filter(move |event| event["method"] == method).map(|event| &event["params"])
    }

    /// Returns the urls that the page has requested so far.
    pub fn requests(&mut self) -> Vec<String> {
        self.evaluate("0");
        let requests = self.of("Network.requestWillBeSent");
        requests.map(|request| request["request"]["url"].as_str().unwrap().to_owned()).collect()
    }

    /// Returns all signs of errors in the page so far: script errors, console and log messages (including policy violations), and
    /// dialogs.
    pub fn complaints(&mut self) -> Vec<String> {
        self.evaluate("0");
        let methods =
            ["Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening"];
        methods.iter().flat_map(|method| self.of(method).map(ToString::to_string)).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
