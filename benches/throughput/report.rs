//! [`Report`]: what was measured, as tables, as JSON and as a chart, and whether the targets are met.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::json;

use crate::Result;
use crate::bench::Bench;
use crate::chart;
use crate::plan::{Part, Plan};
use crate::sample::{Sample, Spread};

/// Where the README shows the chart, and the README itself.
const KEPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs");
const README: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");

/// What is between these in the README is what the last run that was saved has printed.
const BEGIN: &str = "<!-- figures -->";
const END: &str = "<!-- end of figures -->";

/// All runs of one contender with the same handler, width and sizes.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) about: String,
    pub(crate) at_once: usize,
    pub(crate) contender: &'static str,
    pub(crate) samples: Vec<Sample>,
}

impl Row {
    pub(crate) fn new(about: &str, at_once: usize, contender: &'static str) -> Self {
        Self { about: about.to_owned(), at_once, contender, samples: Vec::new() }
    }

    pub(crate) fn spread(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.samples.iter().filter_map(of))
    }

    /// The median of the rounds' ratios: the two ran right after each other in each.
    pub(crate) fn ratio_to(&self, other: &Self, of: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        let pairs = self.samples.iter().zip(&other.samples);
        let ratios = pairs.filter_map(|(this, other)| Some(of(this)? / of(other)?));
        Spread::of(ratios).map(|spread| spread.median)
    }
}

/// A finding that fits no table.
#[derive(Debug, Serialize)]
pub(crate) struct Line {
    contender: String,
    text: String,
}

impl Line {
    pub(crate) fn new(contender: &str, text: String) -> Self {
        Self { contender: contender.to_owned(), text }
    }
}

/// What a figure should be.
#[derive(Debug, Serialize)]
pub(crate) struct Target {
    about: String,
    wanted: String,
    value: Option<f64>,
    met: Option<bool>,
}

impl Target {
    pub(crate) fn at_least(about: String, limit: f64, value: Option<f64>) -> Self {
        Self { about, wanted: format!("≥ {limit}"), value, met: value.map(|value| value >= limit) }
    }

    pub(crate) fn at_most(about: String, limit: f64, value: Option<f64>) -> Self {
        Self { about, wanted: format!("≤ {limit}"), value, met: value.map(|value| value <= limit) }
    }

    /// For comparison.
    pub(crate) fn figure(about: String, value: Option<f64>) -> Self {
        Self { about, wanted: String::new(), value, met: None }
    }
}

/// What a part has found.
#[derive(Debug, Serialize)]
pub(crate) struct Section {
    pub(crate) rows: Vec<Row>,
    lines: Vec<Line>,
    targets: Vec<Target>,
}

impl Section {
    pub(crate) fn new(rows: Vec<Row>, targets: Vec<Target>) -> Self {
        Self { rows, lines: Vec::new(), targets }
    }

    pub(crate) fn of_lines(lines: Vec<Line>, targets: Vec<Target>) -> Self {
        Self { rows: Vec::new(), lines, targets }
    }
}

pub(crate) struct Report {
    server: &'static str,
    rounds: usize,
    not_run: Vec<&'static str>,
    sections: Vec<(Part, Section)>,
}

impl Report {
    pub(crate) fn new(plan: &Plan, bench: &Bench) -> Self {
        Self {
            server: if bench.server.is_embedded() { "embedded" } else { "ZIZQ_URL" },
            rounds: plan.rounds,
            not_run: plan.parts_left_out().map(Part::name).collect(),
            sections: Vec::new(),
        }
    }

    /// Shows a part as soon as it is there.
    pub(crate) fn add(&mut self, part: Part, section: Section) {
        println!("\n{}", text(part, &section));
        if !section.rows.is_empty() {
            println!("{}", memory(&section.rows));
        }
        self.sections.push((part, section));
    }

    /// The rest, to the terminal and to files.
    pub(crate) fn write(&self, plan: &Plan) -> Result<()> {
        println!("\n{}", self.conclusion());
        self.write_to(&beside_the_worker())?;
        if plan.save {
            self.write_to(Path::new(KEPT))?;
            self.write_into_readme()?;
        }
        Ok(())
    }

    fn conclusion(&self) -> String {
        let not_run = self.not_run.join(", ");
        if not_run.is_empty() { self.targets() } else { format!("{}\nNot run: {not_run}.\n", self.targets()) }
    }

    fn write_into_readme(&self) -> Result<()> {
        let readme = fs::read_to_string(README)?;
        let missing = "the README has no place for the figures";
        let (before, rest) = readme.split_once(BEGIN).ok_or(missing)?;
        let (_, after) = rest.split_once(END).ok_or(missing)?;
        let parts: String = self.sections.iter().map(|(part, section)| text(*part, section) + "\n").collect();
        fs::write(README, format!("{before}{BEGIN}\n{parts}{}\n{END}{after}", self.conclusion()))?;
        Ok(())
    }

    fn write_to(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir)?;
        let (figures, picture) = (dir.join("performance.json"), dir.join("performance.svg"));
        fs::write(&figures, serde_json::to_string_pretty(&self.json())?)?;
        let rows = self.sections.iter().map(|(part, section)| (*part, &section.rows[..])).collect::<Vec<_>>();
        chart::draw(&picture, &rows)?;
        println!("written: {} and {}", figures.display(), picture.display());
        Ok(())
    }

    fn json(&self) -> serde_json::Value {
        let sections: BTreeMap<_, _> = self.sections.iter().map(|(part, section)| (part.name(), section)).collect();
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let Self { server, rounds, not_run, .. } = self;
        json!({ "cores": cores, "server": server, "rounds": rounds, "parts": sections, "not_run": not_run })
    }

    fn targets(&self) -> String {
        let mut text = "| target | wanted | measured | |\n| --- | --- | --- | --- |\n".to_owned();
        for Target { about, wanted, value, met } in self.sections.iter().flat_map(|(_, section)| &section.targets) {
            let value = value.map_or("not measured".to_owned(), |value| format!("{value:.3}"));
            let met = met.map_or("", |met| if met { "met" } else { "missed" });
            let _ = writeln!(text, "| {about} | {wanted} | {value} | {met} |");
        }
        text
    }
}

/// In the target directory.
fn beside_the_worker() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_zizq-worker")).with_file_name("performance")
}

fn text(part: Part, section: &Section) -> String {
    let mut text = format!("**{}**: {}\n\n", part.name(), part.about());
    if !section.rows.is_empty() {
        text += &format!("{}\n{}", throughput(&section.rows), cpu(&section.rows));
    }
    for Line { contender, text: line } in &section.lines {
        let _ = writeln!(text, "- {contender}: {line}");
    }
    text
}

fn throughput(rows: &[Row]) -> String {
    table(rows, "jobs/s, median (least – most)", |row| {
        let spread = row.spread(|sample| Some(sample.jobs_per_second))?;
        Some(format!("{:.0} ({:.0} – {:.0})", spread.median, spread.least, spread.most))
    })
}

fn cpu(rows: &[Row]) -> String {
    table(rows, "CPU per job in ms, with children (without)", |row| {
        let (all, own) = (row.spread(|sample| Some(sample.cpu))?, row.spread(|sample| sample.own_cpu)?);
        Some(format!("{:.2} ({:.3})", all.median, own.median))
    })
}

fn memory(rows: &[Row]) -> String {
    table(rows, "peak memory in MiB", |row| {
        let spread = row.spread(|sample| Some(sample.peak_memory? as f64 / 1024.0 / 1024.0))?;
        Some(format!("{:.1}", spread.median))
    })
}

/// A line for each handler and width, and a column for each contender.
fn table(rows: &[Row], title: &str, cell: impl Fn(&Row) -> Option<String>) -> String {
    let mut contenders: Vec<&str> = Vec::new();
    for row in rows {
        if !contenders.contains(&row.contender) {
            contenders.push(row.contender);
        }
    }
    let mut text = format!("| {title} | at once | {} |\n", contenders.join(" | "));
    let _ = writeln!(text, "|{}", " --- |".repeat(contenders.len() + 2));
    for group in rows.chunk_by(|one, next| one.about == next.about && one.at_once == next.at_once) {
        let cells: Vec<String> = group.iter().map(|row| cell(row).unwrap_or("–".to_owned())).collect();
        let _ = writeln!(text, "| {} | {} | {} |", group[0].about, group[0].at_once, cells.join(" | "));
    }
    text
}
