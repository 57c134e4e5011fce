//! The page of the admin server, as a real browser shows it. `UPDATE=1 cargo test --test it page` writes `docs/admin-page.png`.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{Admin, Browser, Daemon, Running, Server, UNTIL_GO, eventually, runtime, unused_address};

const ADMIN: [&str; 2] = ["--admin-listen", "127.0.0.1:0"];

/// A job type that is HTML markup.
const MARKUP: &str = "<script>alert(1)</script>";

/// A secret that the page must never show.
const SECRET: &str = "hunter2";

/// A worker with a running job and a failed job. The type of both jobs and the message of the failure are HTML markup.
struct Markup {
    server: Server,
    running: Running,
    admin: Admin,
}

impl Markup {
    fn start(admin_listen: &str) -> Self {
        let server = Server::start();
        let script = format!(
            "if [ -e $DIR/failed ]; then {UNTIL_GO}; else touch $DIR/failed; echo '<img src=x onerror=alert(2)>' >&2; exit 3; fi"
        );
        let daemon = Daemon::of(&server).args(["--admin-listen", admin_listen]);
        daemon.script("handle.sh", &script);
        let running = daemon
            .handlers(&format!(
                "[handler]\nexec = ['$DIR/handle.sh', '{SECRET}']\nenv = {{ PASSWORD = '{SECRET}', DIR = '$DIR' }}"
            ))
            .start();
        let admin = Admin::of(&running);
        let payload = json!({ "password": SECRET });
        let id = server.enqueue("<b>q</b>", MARKUP, payload.clone());
        server.wait_for_error(&id, 1);
        server.enqueue("<b>q</b>", MARKUP, payload);
        running.wait_for_lines(1, "started");
        Self { server, running, admin }
    }
}

#[test]
fn the_page_shows_markup_of_jobs_as_text() {
    let Markup { server: _server, running, admin } = Markup::start("127.0.0.1:0");
    let Some(mut browser) = Browser::open(&format!("{}/", admin.url())) else { return };
    let text = browser.wait_for_text("the running job and the failure", |text| {
        text.matches(MARKUP).count() >= 2 && text.contains("<img src=x onerror=alert(2)>")
    });
    for expected in ["running", "<b>q</b>", "ExitStatus", "handle.sh exited with status 3", "handle.sh", "spawn"] {
        assert!(text.contains(expected), "{expected} in\n{text}");
    }
    let (inside, markup) =
        ("document.querySelectorAll('main script, main img, main b').length", "document.body.innerHTML");
    assert_eq!(browser.evaluate(inside), 0);
    assert!(!browser.evaluate(markup).as_str().unwrap().contains(SECRET));
    assert_eq!(browser.complaints(), [] as [&str; 0]);
    running.go();
}

#[test]
fn the_page_asks_only_its_own_worker() {
    let Markup { server: _server, running, admin } = Markup::start("127.0.0.1:0");
    let Some(mut browser) = Browser::open(&format!("{}/", admin.url())) else { return };
    let status = format!("{}/status", admin.url());
    // The page refreshes itself.
    let requests = eventually("three refreshes", || {
        Some(browser.requests()).filter(|urls| urls.iter().filter(|url| **url == status).count() >= 3)
    });
    for url in &requests {
        assert!(url.starts_with(&format!("{}/", admin.url())) || url.starts_with("data:image/svg+xml,"), "{url}");
    }
    running.go();
}

#[test]
fn the_page_says_that_the_worker_is_lost_and_recovers() {
    let address = unused_address().to_string();
    let Markup { server, running, admin } = Markup::start(&address);
    let Some(mut browser) = Browser::open(&format!("{}/", admin.url())) else { return };
    browser.wait_for_text("the worker", |text| text.contains(MARKUP));
    running.go();
    running.stop();
    let text = browser.wait_for_text("the loss", |text| text.contains("No answer from the worker since "));
    assert!(text.contains(MARKUP), "the last status is still shown\n{text}");
    let running =
        Daemon::of(&server).args(["--admin-listen", &address, "--worker-id", "the-next-one"]).sh("true").start();
    browser.wait_for_text("the recovery", |text| text.contains("the-next-one") && !text.contains("No answer"));
    running.stop();
}

#[test]
fn a_hidden_page_refreshes_seldom() {
    let (server, script) = (Server::start(), include_str!("../../src/admin/page/page.js"));
    let running = Daemon::of(&server).args(ADMIN).sh("true").start();
    let admin = Admin::of(&running);
    let Some(mut browser) = Browser::open(&format!("{}/", admin.url())) else { return };
    browser.wait_for_text("the worker", |text| text.contains("running"));
    // A headless window is never hidden, so override the document's property `hidden`.
    browser.evaluate(
        "Object.defineProperty(document, 'hidden', { value: true, configurable: true }); window.delays = []; 0",
    );
    browser
        .evaluate("const set = setTimeout; window.setTimeout = (f, ms) => { delays.push(ms); return set(f, ms) }; 0");
    let delays = eventually("a refresh", || Some(browser.evaluate("delays")).filter(|delays| delays[0].is_number()));
    assert_eq!(delays, json!([30_000]), "{script}");
    browser.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange')); 0");
    eventually("a refresh at once", || (browser.evaluate("delays[1]") == 1000).then_some(()));
    running.stop();
}

#[test]
fn the_page_fits_a_phone() {
    let Markup { server: _server, running, admin } = Markup::start("127.0.0.1:0");
    let Some(mut browser) = Browser::open(&format!("{}/", admin.url())) else { return };
    for scheme in ["light", "dark"] {
        browser.resize(390, 844, scheme);
        browser.wait_for_text("the worker", |text| text.contains(MARKUP));
        browser.evaluate("document.querySelector('details').open = true");
        assert_eq!(browser.evaluate("document.documentElement.scrollWidth"), 390, "nothing is wider than the window");
    }
    let color = "getComputedStyle(document.body).backgroundColor";
    let dark = browser.evaluate(color);
    browser.resize(1180, 900, "light");
    assert_ne!(browser.evaluate(color), dark);
    running.go();
}

#[test]
fn answers_have_strict_security_headers() {
    let server = Server::start();
    let running = Daemon::of(&server).args(ADMIN).sh("true").start();
    let admin = Admin::of(&running);
    for path in ["/", "/status", "/metrics", "/nothing"] {
        let answer = runtime().block_on(reqwest::get(format!("{}{path}", admin.url()))).unwrap();
        let header = |name: &str| answer.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(header("cache-control").as_deref(), Some("no-store"), "{path}");
        assert_eq!(header("x-content-type-options").as_deref(), Some("nosniff"), "{path}");
        assert_eq!(header("referrer-policy").as_deref(), Some("no-referrer"), "{path}");
        assert_eq!(header("cross-origin-resource-policy").as_deref(), Some("same-origin"), "{path}");
        let policy = header("content-security-policy").unwrap_or_default();
        let forbidden = ["default-src 'none'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"];
        let is_strict = forbidden.iter().all(|part| policy.contains(part)) && !policy.contains("unsafe");
        assert_eq!(is_strict, path == "/", "{path}: {policy}");
    }
    running.stop();
}

#[test]
fn the_address_of_the_page_is_printed_with_embedded() {
    let url = format!("http://{}", unused_address());
    let running = Daemon::at(&url).args(["--embedded", "--admin-listen", "0.0.0.0:0"]).sh("true").start();
    let page = running.wait_for_message("open this page to watch the worker")["page"].as_str().unwrap().to_owned();
    assert!(page.starts_with("http://127.0.0.1:") && page.ends_with('/'), "{page}");
    let text = runtime().block_on(async { reqwest::get(&page).await.unwrap().text().await.unwrap() });
    assert!(text.starts_with("<!doctype html>"), "{text}");
    let finished = running.stop();
    let without = Daemon::at(&url).args(["--embedded", "--exit-when-idle", "1ms"]).sh("true").run().assert_exit(0);
    assert!(finished.has("open this page to watch the worker") && !without.has("open this page to watch the worker"));
}

/// The settings of an example shop. One handler is warm, one always fails, and the file of another is removed before its first job.
const SHOP: &str = "
[worker]
worker_id = 'web-1'
threads = 2
fibers = 3
[handlers.send_email]
exec = ['$DIR/send-email.py']
mode = 'warm'
[handlers.resize_image]
exec = ['$DIR/resize-image.sh']
[handlers.charge_card]
exec = ['$DIR/charge-card.sh']
[handlers.export_report]
exec = ['$DIR/bin/export-report.sh']
";

/// The Python source of a warm handler. A job sleeps for the number of seconds in its payload. If the payload is null, the job
/// runs until the file `go` exists.
const WARM: &str = "
import json, os, socket, time
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ['ZIZQ_SOCKET'])
wire = server.makefile('rwb')
for line in wire:
    job = json.loads(line)
    time.sleep(job['payload'] or 0)
    while job['payload'] is None and not os.path.exists(os.environ['DIR'] + '/go'):
        time.sleep(0.01)
    wire.write((json.dumps({'id': job['id'], 'ok': True}) + '\\n').encode())
    wire.flush()
";

#[test]
fn the_page_shows_a_busy_worker() {
    let server = Server::start();
    let daemon = Daemon::of(&server).args(ADMIN);
    fs::create_dir(daemon.dir().join("bin")).unwrap();
    daemon.executable("send-email.py", &format!("#!/usr/bin/env -S python3 -S{WARM}"));
    daemon.script("resize-image.sh", UNTIL_GO);
    daemon.script("charge-card.sh", "case $ZIZQ_JOB_QUEUE in a) kill -9 $$;; *) echo card declined >&2; exit 3;; esac");
    let export = daemon.script("bin/export-report.sh", "true");
    let running = daemon.handlers(SHOP).start();
    let admin = Admin::of(&running);
    fs::remove_file(export).unwrap();
    let Some(mut browser) = Browser::open(&format!("{}/", admin.url())) else { return };
    fill(&server, &running);
    let text = browser.wait_for_text("all that a busy worker does", |text| {
        ["slowed down after", "resize_image", "busy", "MiB", "card declined", "SpawnError", "Signal"]
            .iter()
            .all(|expected| text.contains(expected))
            && text.matches("resize-image.sh").count() >= 1
    });
    for expected in
        ["jobs a second", "send-email.py", "warm", "2 / 6", "Not ready: handler export-report.sh cannot be started"]
    {
        assert!(text.contains(expected), "{expected} in\n{text}");
    }
    eventually("bars of both kinds", || {
        let bars = browser.evaluate("['ok', 'bad'].map(kind => document.querySelectorAll(`#plot .${kind}`).length)");
        bars.as_array().unwrap().iter().all(|count| count.as_u64() > Some(0)).then_some(())
    });
    picture(&mut browser);
    assert_eq!(browser.complaints(), [] as [&str; 0]);
    running.go();
}

/// Enqueues jobs for each handler of the shop.
fn fill(server: &Server, running: &Running) {
    let job =
        |queue: &str, job_type: &str, payload: Value| json!({"queue": queue, "type": job_type, "payload": payload});
    server.enqueue_all([job("images", "resize_image", json!(1))]);
    server.enqueue_all([job("reports", "export_report", json!(1))]);
    server.enqueue_all([job("mail", "send_email", json!(null))]);
    running.wait_for_lines(1, "started");
    let rounds = if std::env::var_os("UPDATE").is_some() { 60 } else { 2 };
    for round in 0..rounds {
        let mails = 20 + 15 * ((round * 7) % 5);
        let ids = server.enqueue_all((0..mails).map(|_| job("mail", "send_email", json!(0.004))));
        if round % 30 < 2 {
            let mut card = job(if round % 30 == 0 { "a" } else { "payments" }, "charge_card", json!(1));
            card["retry_limit"] = json!(0);
            server.enqueue_with(card);
        }
        ids.iter().for_each(|id| server.wait_until_done(id));
        if rounds > 2 {
            std::thread::sleep(std::time::Duration::from_millis(500 + 150 * (round % 4)));
        }
    }
}

/// Writes the picture for the documentation if `UPDATE` is set. Asserts that the picture exists and is at most 120 KiB large.
fn picture(browser: &mut Browser) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/admin-page.png");
    browser.resize(1080, 800, "light");
    let light = browser.screenshot();
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, &light).unwrap();
        for (name, width, height, scheme) in [("dark", 1080, 800, "dark"), ("phone", 390, 1900, "light")] {
            browser.resize(width, height, scheme);
            fs::write(std::env::temp_dir().join(format!("admin-page-{name}.png")), browser.screenshot()).unwrap();
        }
    }
    let kept = fs::metadata(&path).map_or(0, |file| file.len());
    assert!((1..=120 * 1024).contains(&kept), "UPDATE=1 cargo test --test it page: {kept} bytes");
}
