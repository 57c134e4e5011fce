//! [`Report`]: the results as tables, JSON and a chart, and the check of the targets.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::json;

use crate::Result;
use crate::bench::Bench;
use crate::chart;
use crate::plan::{PARTS, Part, Plan};
use crate::sample::{Sample, Spread};

/// The documentation page with the benchmark's figures, and the chart that the page shows.
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/performance.md");
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/performance.svg");

/// The markers before and after the figures in `docs/performance.md`. `--save` replaces the text between the markers.
const BEGIN: &str = "<!-- figures -->";
const END: &str = "<!-- end of figures -->";

/// All runs of one contender with the same handler, concurrency and sizes.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) about: String,
    pub(crate) at_once: usize,
    pub(crate) contender: String,
    pub(crate) samples: Vec<Sample>,
}

impl Row {
    pub(crate) fn new(about: &str, at_once: usize, contender: &str) -> Self {
        Self { about: about.to_owned(), at_once, contender: contender.to_owned(), samples: Vec::new() }
    }

    pub(crate) fn spread(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.samples.iter().filter_map(of))
    }

    /// Returns the median, over all rounds, of this row's figure divided by that of `other`. Each ratio compares two runs of the
    /// same round, because a disturbance of the machine probably affects both.
    pub(crate) fn ratio_to(&self, other: &Self, of: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        let pairs = self.samples.iter().zip(&other.samples);
        let ratios = pairs.filter_map(|(this, other)| Some(of(this)? / of(other)?));
        Spread::of(ratios).map(|spread| spread.median)
    }
}

/// A line of text with a contender's result, printed below the tables.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Line {
    contender: String,
    text: String,
}

impl Line {
    pub(crate) fn new(contender: &str, text: String) -> Self {
        Self { contender: contender.to_owned(), text }
    }
}

/// A measured figure and its target.
#[derive(Debug, Clone, Serialize)]
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

    /// Returns a figure without a target, for comparison only.
    pub(crate) fn figure(about: String, value: Option<f64>) -> Self {
        Self { about, wanted: String::new(), value, met: None }
    }
}

/// The results of one part of the benchmark.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Section {
    pub(crate) rows: Vec<Row>,
    lines: Vec<Line>,
    targets: Vec<Target>,
}

impl Section {
    pub(crate) fn new(rows: Vec<Row>, targets: Vec<Target>) -> Self {
        Self { rows, lines: Vec::new(), targets }
    }

    pub(crate) fn with_lines(self, lines: Vec<Line>) -> Self {
        Self { lines, ..self }
    }

    pub(crate) fn of_lines(lines: Vec<Line>, targets: Vec<Target>) -> Self {
        Self { rows: Vec::new(), lines, targets }
    }
}

/// The results of each part. The key is the name of the part, followed by the suffix for the server.
type Sections = BTreeMap<String, Section>;

pub(crate) struct Report {
    server: &'static str,
    rounds: usize,
    sections: Sections,
}

/// The suffixes of a part's name, for the embedded server and for the server at `ZIZQ_URL`.
const EMBEDDED: &str = "";
const GIVEN: &str = ", real server";

impl Report {
    pub(crate) fn new(plan: &Plan, bench: &Bench) -> Self {
        let server = if bench.server.is_embedded() { EMBEDDED } else { GIVEN };
        Self { server, rounds: plan.rounds, sections: Sections::new() }
    }

    /// Prints the results of a part, and keeps them for `write`.
    pub(crate) fn add(&mut self, part: Part, section: Section) {
        let name = format!("{}{}", part.name(), self.server);
        println!("\n{}", text(&name, part, &section));
        if !section.rows.is_empty() {
            println!("{}", memory(&section.rows));
        }
        self.sections.insert(name, section);
    }

    /// Prints the names of the parts that were not run, and writes the figures and the chart into the target directory. With
    /// `--save`, also updates `docs/performance.md`.
    pub(crate) fn write(&self, plan: &Plan) -> Result<()> {
        println!("{}", not_run(&self.sections));
        let dir = beside_the_worker();
        fs::create_dir_all(&dir)?;
        let figures = dir.join("performance.json");
        fs::write(&figures, serde_json::to_string_pretty(&self.json())?)?;
        self.draw_chart(&dir.join("performance.svg"))?;
        println!("written: {}, and performance.svg", figures.display());
        if plan.save {
            self.save()?;
        }
        Ok(())
    }

    /// Updates `docs/performance.md` with the parts that this run has measured. Replaces the committed chart only if this run has
    /// measured every panel of the chart.
    fn save(&self) -> Result<()> {
        let page = fs::read_to_string(PAGE)?;
        let missing = "the page has no place for the figures";
        let (before, rest) = page.split_once(BEGIN).ok_or(missing)?;
        let (kept, after) = rest.split_once(END).ok_or(missing)?;
        let mut blocks = blocks(kept);
        blocks
            .extend(in_order(&self.sections).map(|(name, part, section)| (name.to_owned(), text(name, part, section))));
        let parts: String = names().filter_map(|(_, name)| Some(blocks.remove(&name)? + "\n")).collect();
        fs::write(PAGE, format!("{before}{BEGIN}\n{parts}{END}{after}"))?;
        if chart::is_complete(&self.drawn()) {
            self.draw_chart(Path::new(CHART))?;
        }
        Ok(())
    }

    fn draw_chart(&self, picture: &Path) -> Result<()> {
        chart::draw(picture, &self.drawn())
    }

    /// Returns the rows for the chart: those of the parts that ran against the embedded server.
    fn drawn(&self) -> Vec<(Part, &[Row])> {
        let embedded = in_order(&self.sections).filter(|(name, part, _)| *name == part.name());
        embedded.map(|(_, part, section)| (part, &section.rows[..])).collect()
    }

    fn json(&self) -> serde_json::Value {
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        json!({ "cores": cores, "rounds": self.rounds, "parts": self.sections })
    }
}

/// Splits the text between the markers in `docs/performance.md` into one block for each part. Returns a map from the name of each
/// part to the part's block.
fn blocks(figures: &str) -> BTreeMap<String, String> {
    let blocks = figures.split("\n**").filter_map(|block| {
        let (name, _) = block.split_once("**")?;
        Some((name.to_owned(), format!("**{}\n", block.trim_end())))
    });
    blocks.collect()
}

/// Returns each part once for each of the two servers, with its heading, in the order in which `docs/performance.md` lists them.
fn names() -> impl Iterator<Item = (Part, String)> {
    let names = PARTS.into_iter().flat_map(|part| [EMBEDDED, GIVEN].map(|server| (part, server)));
    names.map(|(part, server)| (part, format!("{}{server}", part.name())))
}

fn in_order(sections: &Sections) -> impl Iterator<Item = (&str, Part, &Section)> {
    names().filter_map(|(part, name)| {
        let (name, section) = sections.get_key_value(&name)?;
        Some((name.as_str(), part, section))
    })
}

fn not_run(sections: &Sections) -> String {
    let run: Vec<Part> = in_order(sections).map(|(_, part, _)| part).collect();
    let names: Vec<&str> = PARTS.into_iter().filter(|part| !run.contains(part)).map(Part::name).collect();
    if names.is_empty() { String::new() } else { format!("\nNot run: {}.", names.join(", ")) }
}

fn targets(targets: &[Target]) -> String {
    let mut text = "\n| target | wanted | measured | |\n| --- | --- | --- | --- |\n".to_owned();
    for Target { about, wanted, value, met } in targets {
        let value = value.map_or("not measured".to_owned(), |value| format!("{value:.3}"));
        let met = met.map_or("", |met| if met { "met" } else { "missed" });
        let _ = writeln!(text, "| {about} | {wanted} | {value} | {met} |");
    }
    text
}

/// Returns the directory for the figures and the chart, inside Cargo's target directory.
fn beside_the_worker() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_zizq-worker")).with_file_name("performance")
}

fn text(name: &str, part: Part, section: &Section) -> String {
    let mut text = format!("**{name}**: {}\n\n", part.about());
    if !section.rows.is_empty() {
        text += &format!("{}\n{}", throughput(&section.rows), cpu(&section.rows));
    }
    if !section.rows.is_empty() && !section.lines.is_empty() {
        text.push('\n');
    }
    for Line { contender, text: line } in &section.lines {
        let _ = writeln!(text, "- {contender}: {line}");
    }
    if section.targets.is_empty() { text } else { text + &targets(&section.targets) }
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

/// Returns a table with a line for each handler and concurrency, and a column for each contender.
fn table(rows: &[Row], title: &str, cell: impl Fn(&Row) -> Option<String>) -> String {
    let mut contenders: Vec<&str> = Vec::new();
    for row in rows {
        if !contenders.contains(&row.contender.as_str()) {
            contenders.push(&row.contender);
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
