//! Warm handlers, compared with the same handlers in spawn mode, and with a worker that is built on the official client and
//! handles jobs in its own process.

use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use crate::bench::{Bench, interpreter};
use crate::contender::{Contender, Contest};
use crate::memory::mib;
use crate::report::{Line, Row, Section, Target};
use crate::sample::{millis, percentile, sorted};
use crate::stamp::{Stamps, now};
use crate::throughput::{PAYLOAD_BYTES, compete_among};
use crate::{Result, server, warm_handler};

const AT_ONCE: [usize; 2] = [4, 8];

/// The numbers of jobs for a run of a few seconds, in warm mode and in spawn mode.
const WARM_JOBS: usize = 20_000;
const SPAWNED_COMPILED_JOBS: usize = 1500;
const SPAWNED_PYTHON_JOBS: usize = 150;

const LATENCY_JOBS: usize = 200;

/// The pause before each job. It is long enough for all processes to become idle again.
const GAP: Duration = Duration::from_millis(20);

const FEW: usize = 4;
const MANY: usize = 200;

const WARM: &[&str] = &["--mode", "warm"];

/// The script of the Python handler. It reads jobs from the worker's socket, or one payload from stdin if there is no socket.
const PYTHON: &str = r#"
import json, os, sys
if "ZIZQ_SOCKET" not in os.environ:
    json.load(sys.stdin)
    sys.exit()
import socket
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["ZIZQ_SOCKET"])
wire = server.makefile("rwb")
for line in wire:
    job = json.loads(line)
    wire.write(json.dumps({"id": job["id"], "ok": True}).encode() + b"\n")
    wire.flush()
"#;

struct Handler {
    name: &'static str,
    command: Vec<String>,
    spawned_jobs: usize,
}

pub(crate) fn measure(bench: &Bench) -> Result<Section> {
    let mut rows = Vec::new();
    for handler in handlers(bench)? {
        for at_once in AT_ONCE {
            rows.extend(compete(bench, &handler, at_once)?);
        }
    }
    let mut targets = speed_targets(&rows);
    let spawned = before_and_after(bench)?;
    targets.extend(spawned_targets(&spawned));
    let mut lines: Vec<Line> = spawned.iter().filter_map(spawned_line).collect();
    for measure in [latency, memory] {
        let (more_lines, target) = measure(bench)?;
        lines.extend(more_lines);
        targets.push(target);
    }
    Ok(Section::new(rows, targets).with_lines(lines))
}

fn handlers(bench: &Bench) -> Result<Vec<Handler>> {
    let compiled = compiled(bench, &[]);
    let mut handlers = vec![Handler { name: "compiled", command: compiled, spawned_jobs: SPAWNED_COMPILED_JOBS }];
    match interpreter() {
        Some(python) => {
            let command = vec![bench.script("warm.py", &format!("#!{python}{PYTHON}"))?];
            handlers.push(Handler { name: "python", command, spawned_jobs: SPAWNED_PYTHON_JOBS });
        }
        None => eprintln!("no python3 here: its runs are left out"),
    }
    Ok(handlers)
}

fn compiled(bench: &Bench, words: &[&str]) -> Vec<String> {
    let words = words.iter().copied();
    [&bench.exe, warm_handler::ROLE].into_iter().chain(words).map(str::to_owned).collect()
}

fn worker(name: &'static str, options: &'static [&'static str]) -> Contender {
    Contender::Worker { name, path: PathBuf::from(env!("CARGO_BIN_EXE_zizq-worker")), options }
}

fn warm() -> Contender {
    worker("warm", WARM)
}

/// Runs all contenders in turn, round after round. Each gets as many jobs as it can run in a few seconds.
fn compete(bench: &Bench, handler: &Handler, at_once: usize) -> Result<Vec<Row>> {
    let entrants =
        [(worker("spawned", &[]), handler.spawned_jobs), (warm(), WARM_JOBS), (Contender::Client, WARM_JOBS)];
    let mut rows: Vec<Row> =
        entrants.iter().map(|(contender, _)| Row::new(handler.name, at_once, contender.name())).collect();
    for round in 0..bench.plan.rounds {
        eprintln!("  {}, {at_once} at once, round {}", handler.name, round + 1);
        for ((contender, jobs), row) in entrants.iter().zip(&mut rows) {
            let jobs = bench.scaled(*jobs);
            let contest = Contest { handler: handler.command.clone(), at_once, jobs, payload_bytes: PAYLOAD_BYTES };
            row.samples.push(contender.run(bench, &contest)?);
        }
    }
    Ok(rows)
}

fn speed_targets(rows: &[Row]) -> Vec<Target> {
    let mut targets = Vec::new();
    for group in rows.chunk_by(|one, next| one.about == next.about && one.at_once == next.at_once) {
        let [spawned, warm, client] = group else { continue };
        let (handler, at_once) = (&warm.about, warm.at_once);
        let about = |text: &str| format!("{text}, {handler}, {at_once} at once");
        let over = |other| warm.ratio_to(other, |sample| Some(sample.jobs_per_second));
        if handler == "python" {
            if at_once == 4 {
                targets.push(Target::at_least(about("warm / spawned, jobs/s"), 40.0, over(spawned)));
            }
            targets.push(Target::at_least(about("warm / client in process, jobs/s"), 0.8, over(client)));
        } else {
            targets.push(Target::figure(about("(warm / client in process, jobs/s)"), over(client)));
        }
        let own = |row: &Row| row.spread(|sample| sample.own_cpu).map(|spread| spread.median);
        targets.push(Target::at_most(about("own CPU per warm job, ms"), 0.03, own(warm)));
    }
    targets
}

/// Measures spawned jobs of `/bin/true` with this build and with the build that `--against` names. Returns no rows without
/// `--against`.
fn before_and_after(bench: &Bench) -> Result<Vec<Row>> {
    let workers = bench.workers();
    if workers.len() < 2 {
        return Ok(Vec::new());
    }
    let handler = vec!["/bin/true".to_owned()];
    let contest = Contest { handler, at_once: 4, jobs: bench.scaled(2000), payload_bytes: PAYLOAD_BYTES };
    compete_among(bench, &workers, &contest, "spawned /bin/true")
}

fn spawned_line(row: &Row) -> Option<Line> {
    let speed = row.spread(|sample| Some(sample.jobs_per_second))?.median;
    let own = row.spread(|sample| sample.own_cpu)?.median;
    let text = format!("spawned /bin/true, {} at once: {speed:.0} jobs/s, {own:.3} ms of own CPU per job", row.at_once);
    Some(Line::new(&row.contender, text))
}

fn spawned_targets(rows: &[Row]) -> Vec<Target> {
    let [this, before] = rows else { return Vec::new() };
    let throughput = this.ratio_to(before, |sample| Some(sample.jobs_per_second));
    let own = this.ratio_to(before, |sample| sample.own_cpu);
    vec![
        Target::at_least("spawned jobs/s, this build / the other".to_owned(), 0.97, throughput),
        Target::at_most("own CPU per spawned job, this build / the other".to_owned(), 1.03, own),
    ]
}

/// Measures the time from enqueue until the handler has the job, on an idle worker.
fn latency(bench: &Bench) -> Result<(Vec<Line>, Target)> {
    let stamps = Stamps::listen(bench.dir())?;
    let handler = compiled(bench, &[warm_handler::STAMP, &stamps.path()]);
    let contenders = [warm(), worker("spawned", &[]), Contender::Client];
    let mut times = vec![Vec::new(); contenders.len()];
    for _ in 0..bench.plan.rounds {
        for (contender, times) in contenders.iter().zip(&mut times) {
            times.extend(one_round(bench, contender, &handler, &stamps)?);
        }
    }
    let times: Vec<Vec<f64>> = times.into_iter().map(sorted).collect();
    let line = |(contender, times): (&Contender, &Vec<f64>)| {
        let at = |part| format!("{:.2} ms", percentile(times, part));
        let text = format!("enqueue to the handler's job: p50 {}, p99 {}, of {}", at(0.5), at(0.99), times.len());
        Line::new(contender.name(), text)
    };
    let about = "enqueue to the warm handler's job, idle, p50, ms".to_owned();
    let target = Target::at_most(about, 0.4, Some(percentile(&times[0], 0.5)));
    Ok((contenders.iter().zip(&times).map(line).collect(), target))
}

fn one_round(bench: &Bench, contender: &Contender, handler: &[String], stamps: &Stamps) -> Result<Vec<f64>> {
    let payload = server::payload(PAYLOAD_BYTES);
    let running = contender.start(bench, FEW, handler, &[])?;
    // Do not time the first job, because it also opens the connections and starts the process.
    bench.server.enqueue_one(&payload)?;
    stamps.receive()?;
    let times = (0..bench.scaled(LATENCY_JOBS)).map(|_| {
        sleep(GAP);
        let begun = now();
        bench.server.enqueue_one(&payload)?;
        Ok(millis(stamps.receive()?.saturating_sub(begun)))
    });
    let times: Result<Vec<f64>> = times.collect();
    bench.server.wait_until_done()?;
    running.stop()?;
    times
}

/// Measures the worker's memory per additional warm process, while every process runs a job.
fn memory(bench: &Bench) -> Result<(Vec<Line>, Target)> {
    let peak = |at_once| {
        let handler = compiled(bench, &[warm_handler::PAUSE]);
        let contest = Contest { handler, at_once, jobs: at_once, payload_bytes: PAYLOAD_BYTES };
        Ok::<_, crate::Error>(warm().run(bench, &contest)?.peak_memory.unwrap_or_default())
    };
    let (few, many) = (peak(FEW)?, peak(MANY)?);
    let each = many.saturating_sub(few) as f64 / (MANY - FEW) as f64 / 1024.0;
    let text = format!("{} with {FEW} processes, {} with {MANY}: {each:.1} KiB per process", mib(few), mib(many));
    let target = Target::at_most(format!("memory per warm process at {MANY}, KiB"), 64.0, Some(each));
    Ok((vec![Line::new("warm", text)], target))
}
