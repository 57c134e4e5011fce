//! A benchmark of the cost of a job. It compares zizq-worker with a bare loop, `xargs -P` and a simple worker built on the
//! official client. Each contender is a separate process, and only one contender runs at a time. `cargo bench -- --help` lists
//! the options.

#![expect(clippy::disallowed_methods, reason = "a benchmark starts processes, waits, and reads its environment")]

mod bare;
mod baseline;
mod bench;
mod chart;
mod client;
mod contender;
mod faults;
mod idle;
mod latency;
mod memory;
mod meter;
mod plan;
mod protocol;
mod proxy;
mod report;
mod sample;
mod scaling;
mod server;
mod stamp;
mod start_stop;
mod throughput;
mod warm;
mod warm_handler;

use bench::Bench;
use plan::Plan;
use report::Report;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

/// Runs the benchmark, or a helper process of the benchmark. A helper process is this executable with its role as the
/// first argument.
fn main() -> Result<()> {
    // Read the clock before any other work, because in the role `stamp`, this time is sent as the time of the handler's start.
    let began = stamp::now();
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [stamp::ROLE, socket] => stamp::send(socket, began),
        [bare::ROLE, ref rest @ ..] => bare::run(rest),
        [baseline::ROLE, ref rest @ ..] => baseline::run(rest),
        [protocol::ROLE, ref rest @ ..] => protocol::run(rest),
        [client::ROLE, ref rest @ ..] => client::run(rest),
        [warm_handler::ROLE, ref rest @ ..] => warm_handler::run(rest),
        [server::ROLE] => server::run(),
        ref options => measure(&Plan::parse(options)?),
    }
}

fn measure(plan: &Plan) -> Result<()> {
    if plan.help {
        println!("{}", plan::HELP);
        return Ok(());
    }
    let bench = Bench::prepare(plan)?;
    let mut report = Report::new(plan, &bench);
    for part in plan.parts() {
        eprintln!("measuring {} …", part.name());
        report.add(part, part.measure(&bench)?);
    }
    report.write(plan)
}
