//! The throughput of a minute in which reports fail for ten seconds, compared with a minute without faults.

use std::thread::sleep;
use std::time::Duration;

use crate::bench::Bench;
use crate::contender::Contender;
use crate::proxy::Proxy;
use crate::report::{Line, Section, Target};
use crate::throughput::PAYLOAD_BYTES;
use crate::{Result, server};

const BEFORE: Duration = Duration::from_secs(20);
const FAILING: Duration = Duration::from_secs(10);
const AFTER: Duration = Duration::from_secs(30);

const AT_ONCE: usize = 8;

const HANDLER: [&str; 2] = ["sleep", "0.2"];
/// More jobs than the 2,400 that a worker can run in a minute, eight at once and 0.2 s each.
const JOBS: usize = 3000;

/// The server's default limit on unreported jobs. While reports fail, a worker can run at most this many jobs.
const DEEP_PREFETCH: &str = "1024";

pub(crate) fn measure(bench: &Bench) -> Result<Section> {
    let worker = &bench.workers()[0];
    let undisturbed = minute(bench, worker, &[], false)?;
    let shallow = minute(bench, worker, &[], true)?;
    let deep = minute(bench, worker, &["--prefetch", DEEP_PREFETCH], true)?;
    let ratio = |jobs: u64| jobs as f64 / undisturbed as f64;
    let lines = vec![
        Line::new("undisturbed", format!("{undisturbed} jobs in a minute")),
        Line::new(
            "ten seconds of failures",
            format!("{shallow} jobs, {:.2} ×, with the default prefetch", ratio(shallow)),
        ),
        Line::new("the same", format!("{deep} jobs, {:.2} ×, with --prefetch {DEEP_PREFETCH}", ratio(deep))),
    ];
    let about = format!("throughput with failing reports, --prefetch {DEEP_PREFETCH} / undisturbed");
    Ok(Section::of_lines(lines, vec![Target::at_least(about, 0.95, Some(ratio(deep)))]))
}

/// Runs a worker for a minute, and returns the number of reported jobs. If `failing` is true, reports fail for ten seconds of that
/// minute.
fn minute(bench: &Bench, contender: &Contender, options: &[&str], failing: bool) -> Result<u64> {
    let proxy = Proxy::start(&bench.server.url)?;
    bench.server.enqueue(JOBS, &server::payload(PAYLOAD_BYTES))?;
    let handler = HANDLER.map(str::to_owned);
    let worker = contender.start_at(&proxy.url, bench, AT_ONCE, &handler, options)?;
    sleep(BEFORE);
    if failing {
        proxy.cut_reports();
    }
    sleep(FAILING);
    proxy.mend_reports();
    sleep(AFTER);
    let done = JOBS as u64 - bench.server.pending()?;
    // Kill the worker, because a drain would first finish the running jobs.
    drop(worker);
    bench.server.clear()?;
    Ok(done)
}
