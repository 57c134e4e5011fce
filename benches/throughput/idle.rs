//! The cost of a connected worker without jobs, including the server's heartbeats.

use std::thread::sleep;
use std::time::Duration;

use crate::Result;
use crate::bench::Bench;
use crate::contender::Contender;
use crate::report::{Line, Section, Target};

const FOR: Duration = Duration::from_secs(12);

/// The wait before the measurement, during which the worker starts and connects.
const SETTLED_AFTER: Duration = Duration::from_secs(1);

pub(crate) fn measure(bench: &Bench) -> Result<Section> {
    let mut contenders = vec![Contender::Baseline];
    contenders.extend(bench.workers());
    let (mut lines, mut targets) = (Vec::new(), Vec::new());
    for contender in contenders {
        let (wakeups, cpu) = idle(bench, &contender)?;
        let percent = cpu.as_secs_f64() / FOR.as_secs_f64() * 100.0;
        let per_second = wakeups as f64 / FOR.as_secs_f64();
        lines.push(Line::new(contender.name(), format!("{per_second:.2} wake-ups/s, {percent:.4} % of a core")));
        if contender.name() == "worker" {
            targets.push(Target::at_most("idle, % of a core".to_owned(), 0.1, Some(percent)));
            targets.push(Target::at_most("idle, wake-ups/s with heartbeats".to_owned(), 1.0, Some(per_second)));
        }
    }
    Ok(Section::of_lines(lines, targets))
}

fn idle(bench: &Bench, contender: &Contender) -> Result<(u64, Duration)> {
    let worker = contender.start(bench, 4, &["/bin/true".to_owned()], &[])?;
    sleep(SETTLED_AFTER);
    let process = worker.process();
    let (wakeups, cpu) = (process.sleeps()?, process.own_cpu()?);
    sleep(FOR);
    let spent = (process.sleeps()?.saturating_sub(wakeups), process.own_cpu()?.saturating_sub(cpu));
    worker.stop()?;
    Ok(spent)
}
