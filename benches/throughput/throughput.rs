//! Jobs per second and CPU per job, for each handler and concurrency.

use crate::Result;
use crate::bench::{Bench, Handler};
use crate::contender::{Contender, Contest};
use crate::plan::Plan;
use crate::report::{Row, Section, Target};

pub(crate) const AT_ONCE: [usize; 5] = [1, 2, 4, 8, 16];

/// The payload size of a small job.
pub(crate) const PAYLOAD_BYTES: usize = 80;

pub(crate) fn measure(bench: &Bench) -> Result<Section> {
    let mut rows = Vec::new();
    let Plan { handler: chosen_handler, at_once: chosen_width, .. } = &bench.plan;
    for handler in bench.handlers()? {
        if chosen_handler.as_ref().is_some_and(|chosen| chosen != handler.name) {
            continue;
        }
        for at_once in AT_ONCE.into_iter().filter(|at_once| chosen_width.is_none_or(|chosen| chosen == *at_once)) {
            rows.extend(compete(bench, &contest(&handler, at_once), handler.name)?);
        }
    }
    let targets = targets(&rows);
    Ok(Section::new(rows, targets))
}

fn contest(handler: &Handler, at_once: usize) -> Contest {
    Contest { handler: handler.command.clone(), at_once, jobs: handler.jobs, payload_bytes: PAYLOAD_BYTES }
}

/// Runs all contenders in turn, round after round, so that a disturbance of the machine affects all of them.
pub(crate) fn compete(bench: &Bench, contest: &Contest, about: &str) -> Result<Vec<Row>> {
    let mut contenders = vec![Contender::Bare, Contender::Xargs, Contender::Baseline];
    contenders.extend(bench.workers());
    compete_among(bench, &contenders, contest, about)
}

pub(crate) fn compete_among(
    bench: &Bench,
    contenders: &[Contender],
    contest: &Contest,
    about: &str,
) -> Result<Vec<Row>> {
    let row = |contender: &Contender| Row::new(about, contest.at_once, contender.name());
    let mut rows: Vec<Row> = contenders.iter().map(row).collect();
    for round in 0..bench.plan.rounds {
        eprintln!("  {about}, {} at once, round {}", contest.at_once, round + 1);
        for (contender, row) in contenders.iter().zip(&mut rows) {
            row.samples.push(contender.run(bench, contest)?);
        }
    }
    Ok(rows)
}

fn targets(rows: &[Row]) -> Vec<Target> {
    let mut targets = Vec::new();
    let of = |name: &str, at_once| {
        rows.iter().find(move |row| row.about == "/bin/true" && row.at_once == at_once && row.contender == name)
    };
    for at_once in [4, 8] {
        let (Some(bare), Some(baseline), Some(worker)) =
            (of("bare loop", at_once), of("baseline", at_once), of("worker", at_once))
        else {
            continue;
        };
        let about = |what: &str| format!("{what}, /bin/true, {at_once} at once");
        let throughput = worker.ratio_to(baseline, |sample| Some(sample.jobs_per_second));
        targets.push(Target::at_least(about("throughput / baseline"), 1.2, throughput));
        let cpu = worker.ratio_to(bare, |sample| Some(sample.cpu));
        targets.push(Target::at_most(about("CPU with children / bare loop"), 1.12, cpu));
        let cpu = baseline.ratio_to(bare, |sample| Some(sample.cpu));
        targets.push(Target::figure(about("(the baseline's CPU with children / bare loop)"), cpu));
        let own = worker.ratio_to(bare, |sample| sample.own_cpu);
        targets.push(Target::at_most(about("own CPU / bare loop"), 1.3, own));
        if at_once == 4 {
            let peak = worker.spread(|sample| Some(sample.peak_memory? as f64 / 1024.0 / 1024.0));
            let peak = peak.map(|peak| peak.median);
            targets.push(Target::at_most("peak memory at 4 at once, MiB".to_owned(), 10.0, peak));
        }
    }
    targets
}
