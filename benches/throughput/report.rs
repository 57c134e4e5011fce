//! [`Report`]: what was measured, as tables, as JSON and as a chart, and whether the targets are met.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::Result;
use crate::bench::Bench;
use crate::chart;
use crate::plan::{PARTS, Part, Plan};
use crate::sample::{Sample, Spread};

/// Where the README shows the chart, and the README itself.
const KEPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs");
/// The file of the figures, there and beside the worker.
const FIGURES: &str = "performance.json";
const README: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");

/// What is between these in the README is what the last run that was saved has printed.
const BEGIN: &str = "<!-- figures -->";
const END: &str = "<!-- end of figures -->";

/// All runs of one contender with the same handler, width and sizes.
#[derive(Debug, Clone, Serialize, Deserialize)]
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

    /// The median of the rounds' ratios: the two ran right after each other in each.
    pub(crate) fn ratio_to(&self, other: &Self, of: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        let pairs = self.samples.iter().zip(&other.samples);
        let ratios = pairs.filter_map(|(this, other)| Some(of(this)? / of(other)?));
        Spread::of(ratios).map(|spread| spread.median)
    }
}

/// A finding that fits no table.
#[derive(Debug, Clone, Serialize, Deserialize)]
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
#[derive(Debug, Clone, Serialize, Deserialize)]
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
#[derive(Debug, Clone, Serialize, Deserialize)]
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

/// All that was measured, by the name of the part and of the server.
type Sections = BTreeMap<String, Section>;

pub(crate) struct Report {
    server: &'static str,
    rounds: usize,
    sections: Sections,
}

/// The servers, and how they are named behind the parts.
const EMBEDDED: &str = "";
const GIVEN: &str = ", real server";

impl Report {
    pub(crate) fn new(plan: &Plan, bench: &Bench) -> Self {
        let server = if bench.server.is_embedded() { EMBEDDED } else { GIVEN };
        Self { server, rounds: plan.rounds, sections: Sections::new() }
    }

    /// Shows a part as soon as it is measured.
    pub(crate) fn add(&mut self, part: Part, section: Section) {
        let name = format!("{}{}", part.name(), self.server);
        println!("\n{}", text(&name, part, &section));
        if !section.rows.is_empty() {
            println!("{}", memory(&section.rows));
        }
        self.sections.insert(name, section);
    }

    /// The rest, to the terminal and to files.
    pub(crate) fn write(&self, plan: &Plan) -> Result<()> {
        println!("\n{}", conclusion(&self.sections));
        self.write_to(&beside_the_worker(), &self.sections)?;
        if plan.save {
            let kept = self.with_those_kept()?;
            self.write_to(Path::new(KEPT), &kept)?;
            write_into_readme(&kept)?;
        }
        Ok(())
    }

    /// Adds the sections of earlier runs that this run has none for.
    fn with_those_kept(&self) -> Result<Sections> {
        let file = Path::new(KEPT).join(FIGURES);
        let kept: Kept = serde_json::from_str(&fs::read_to_string(file)?)?;
        let mut sections = kept.parts;
        sections.extend(self.sections.clone());
        Ok(sections)
    }

    fn write_to(&self, dir: &Path, sections: &Sections) -> Result<()> {
        fs::create_dir_all(dir)?;
        let (figures, picture) = (dir.join(FIGURES), dir.join("performance.svg"));
        fs::write(&figures, serde_json::to_string_pretty(&self.json(sections))?)?;
        let rows: Vec<_> = in_order(sections).map(|(name, part, section)| (name, part, &section.rows[..])).collect();
        let embedded: Vec<_> = rows.iter().filter(|(name, part, _)| *name == part.name()).collect();
        chart::draw(&picture, &embedded.iter().map(|(_, part, rows)| (*part, *rows)).collect::<Vec<_>>())?;
        println!("written: {} and {}", figures.display(), picture.display());
        Ok(())
    }

    fn json(&self, sections: &Sections) -> serde_json::Value {
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        json!({ "cores": cores, "rounds": self.rounds, "parts": sections, "not_run": not_run(sections) })
    }
}

/// The sections of the figures that are beside the README.
#[derive(Deserialize)]
struct Kept {
    parts: Sections,
}

fn in_order(sections: &Sections) -> impl Iterator<Item = (&str, Part, &Section)> {
    let names = PARTS.into_iter().flat_map(|part| [EMBEDDED, GIVEN].map(|server| (part, server)));
    names.filter_map(|(part, server)| {
        let (name, section) = sections.get_key_value(&format!("{}{server}", part.name()))?;
        Some((name.as_str(), part, section))
    })
}

fn not_run(sections: &Sections) -> Vec<&'static str> {
    let run: Vec<Part> = in_order(sections).map(|(_, part, _)| part).collect();
    PARTS.into_iter().filter(|part| !run.contains(part)).map(Part::name).collect()
}

fn conclusion(sections: &Sections) -> String {
    let not_run = not_run(sections).join(", ");
    if not_run.is_empty() { targets(sections) } else { format!("{}\nNot run: {not_run}.\n", targets(sections)) }
}

fn write_into_readme(sections: &Sections) -> Result<()> {
    let readme = fs::read_to_string(README)?;
    let missing = "the README has no place for the figures";
    let (before, rest) = readme.split_once(BEGIN).ok_or(missing)?;
    let (_, after) = rest.split_once(END).ok_or(missing)?;
    let parts: String = in_order(sections).map(|(name, part, section)| text(name, part, section) + "\n").collect();
    fs::write(README, format!("{before}{BEGIN}\n{parts}{}\n{END}{after}", conclusion(sections)))?;
    Ok(())
}

fn targets(sections: &Sections) -> String {
    let mut text = "| target | wanted | measured | |\n| --- | --- | --- | --- |\n".to_owned();
    for (name, part, section) in in_order(sections) {
        let server = name.strip_prefix(part.name()).unwrap_or_default();
        for Target { about, wanted, value, met } in &section.targets {
            let value = value.map_or("not measured".to_owned(), |value| format!("{value:.3}"));
            let met = met.map_or("", |met| if met { "met" } else { "missed" });
            let _ = writeln!(text, "| {about}{server} | {wanted} | {value} | {met} |");
        }
    }
    text
}

/// In the target directory.
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
