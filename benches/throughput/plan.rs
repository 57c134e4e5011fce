//! [`Plan`]: the parts to measure, and the options of the benchmark.

use crate::Result;
use crate::bench::Bench;
use crate::report::Section;
use crate::{faults, idle, latency, memory, protocol, scaling, start_stop, throughput, warm};

pub(crate) const HELP: &str = "\
cargo bench                    everything but what takes minutes, about ten minutes
cargo bench -- --long          everything
cargo bench -- --quick         one short round of each, to see whether it works
cargo bench -- PART…           these parts alone: throughput warm protocol payload output latency memory idle start-stop
                               growth faults
cargo bench -- --rounds N      as many rounds (3)
cargo bench -- --handler NAME  throughput of that handler alone: /bin/true, sh or python
cargo bench -- --at-once N     throughput at that width alone
cargo bench -- --against FILE  another build of the worker as one more contender
cargo bench -- --save          the figures also into docs/performance.md, and the chart beside it; parts that are not run, or
                               were run against another server, keep theirs

ZIZQ_URL measures against that server instead of the embedded one.";

/// A part of the benchmark, which can be run by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Throughput,
    Warm,
    Protocol,
    Payload,
    Output,
    Latency,
    Memory,
    Idle,
    StartStop,
    Growth,
    Faults,
}

pub(crate) const PARTS: [Part; 11] = [
    Part::Throughput,
    Part::Warm,
    Part::Protocol,
    Part::Payload,
    Part::Output,
    Part::Latency,
    Part::Memory,
    Part::Idle,
    Part::StartStop,
    Part::Growth,
    Part::Faults,
];

impl Part {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Throughput => "throughput",
            Self::Warm => "warm",
            Self::Protocol => "protocol",
            Self::Payload => "payload",
            Self::Output => "output",
            Self::Latency => "latency",
            Self::Memory => "memory",
            Self::Idle => "idle",
            Self::StartStop => "start-stop",
            Self::Growth => "growth",
            Self::Faults => "faults",
        }
    }

    pub(crate) fn about(self) -> &'static str {
        match self {
            Self::Throughput => "jobs a second and CPU per job, by handler and by how many run at once",
            Self::Warm => "handlers that take one job after the other, beside the same ones started for each job",
            Self::Protocol => "what the server's protocol costs, with as many jobs in a request as there are",
            Self::Payload => "cost by size of the payload, 4 at once",
            Self::Output => "cost by size of the output, 4 at once",
            Self::Latency => "from enqueue to the handler's first instruction, on an idle worker",
            Self::Memory => "peak memory of the worker, at 4 and at 1,000 at once",
            Self::Idle => "what a worker without jobs costs",
            Self::StartStop => "from the start to the first job, and from SIGTERM to the exit",
            Self::Growth => "memory after many jobs against memory after few",
            Self::Faults => "throughput of a minute in which reports fail for ten seconds",
        }
    }

    pub(crate) fn measure(self, bench: &Bench) -> Result<Section> {
        match self {
            Self::Throughput => throughput::measure(bench),
            Self::Warm => warm::measure(bench),
            Self::Protocol => protocol::measure(bench),
            Self::Payload => scaling::measure_payload(bench),
            Self::Output => scaling::measure_output(bench),
            Self::Latency => latency::measure(bench),
            Self::Memory => memory::measure(bench),
            Self::Idle => idle::measure(bench),
            Self::StartStop => start_stop::measure(bench),
            Self::Growth => memory::measure_growth(bench),
            Self::Faults => faults::measure(bench),
        }
    }

    fn takes_minutes(self) -> bool {
        matches!(self, Self::Growth | Self::Faults)
    }
}

/// The parts and options that are given on the command line.
#[derive(Debug, Clone, Default)]
pub(crate) struct Plan {
    pub(crate) help: bool,
    pub(crate) quick: bool,
    pub(crate) save: bool,
    pub(crate) rounds: usize,
    pub(crate) handler: Option<String>,
    pub(crate) at_once: Option<usize>,
    pub(crate) against: Option<String>,
    long: bool,
    chosen: Vec<Part>,
}

impl Plan {
    pub(crate) fn parse(options: &[&str]) -> Result<Self> {
        let mut plan = Self { rounds: 3, ..Self::default() };
        let mut options = options.iter();
        while let Some(option) = options.next() {
            match *option {
                // Cargo passes this option to every benchmark.
                "--bench" => {}
                "--help" => plan.help = true,
                "--quick" => (plan.quick, plan.rounds) = (true, 1),
                "--long" => plan.long = true,
                "--save" => plan.save = true,
                "--rounds" => plan.rounds = options.next().ok_or("--rounds needs a number")?.parse()?,
                "--handler" => plan.handler = Some((*options.next().ok_or("--handler needs a name")?).to_owned()),
                "--at-once" => plan.at_once = Some(options.next().ok_or("--at-once needs a number")?.parse()?),
                "--against" => plan.against = Some((*options.next().ok_or("--against needs a file")?).to_owned()),
                name => plan.chosen.push(part(name)?),
            }
        }
        Ok(plan)
    }

    pub(crate) fn parts(&self) -> impl Iterator<Item = Part> {
        PARTS.into_iter().filter(|part| self.includes(*part))
    }

    fn includes(&self, part: Part) -> bool {
        if self.chosen.is_empty() { self.long || !part.takes_minutes() } else { self.chosen.contains(&part) }
    }
}

fn part(name: &str) -> Result<Part> {
    PARTS.into_iter().find(|part| part.name() == name).ok_or_else(|| format!("no part {name}\n\n{HELP}").into())
}
