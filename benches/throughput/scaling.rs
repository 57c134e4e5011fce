//! The cost of a job by the size of its payload, and by the size of its output.

use std::fs;

use crate::Result;
use crate::bench::Bench;
use crate::contender::{Contender, Contest};
use crate::report::{Row, Section};
use crate::throughput::{PAYLOAD_BYTES, compete_among};

/// The name of each size, its bytes, and the number of jobs for a run of about a second.
const SIZES: [(&str, usize, usize); 4] =
    [("1 KB", 1_000, 1000), ("64 KB", 64_000, 800), ("1 MB", 1_000_000, 200), ("10 MB", 10_000_000, 24)];

const AT_ONCE: usize = 4;

pub(crate) fn measure_payload(bench: &Bench) -> Result<Section> {
    let handler = vec![bench.script("swallow.sh", "#!/bin/sh\nexec cat > /dev/null\n")?];
    measure(bench, |_, bytes, jobs| {
        Ok(Contest { handler: handler.clone(), at_once: AT_ONCE, jobs, payload_bytes: bytes })
    })
}

pub(crate) fn measure_output(bench: &Bench) -> Result<Section> {
    measure(bench, |name, bytes, jobs| {
        // Lines of a hundred bytes, as in typical logs.
        let text = bench.dir().join(format!("output-{bytes}"));
        fs::write(&text, format!("{}\n", "x".repeat(99)).repeat(bytes / 100))?;
        let script = bench.script(
            &format!("print-{name}.sh").replace(' ', ""),
            &format!("#!/bin/sh\nexec cat '{}'\n", text.display()),
        )?;
        Ok(Contest { handler: vec![script], at_once: AT_ONCE, jobs, payload_bytes: PAYLOAD_BYTES })
    })
}

fn measure(bench: &Bench, contest: impl Fn(&str, usize, usize) -> Result<Contest>) -> Result<Section> {
    let mut contenders = vec![Contender::Bare, Contender::Baseline];
    contenders.extend(bench.workers());
    let mut rows: Vec<Row> = Vec::new();
    for (name, bytes, jobs) in SIZES {
        rows.extend(compete_among(bench, &contenders, &contest(name, bytes, bench.scaled(jobs))?, name)?);
    }
    Ok(Section::new(rows, Vec::new()))
}
