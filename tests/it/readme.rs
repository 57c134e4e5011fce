//! The README is the one page that a user needs, and it does not lie.

use std::fs;
use std::path::Path;

use zizq_worker::cli;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).unwrap()
}

/// The section under that heading, up to the next of its kind.
fn section(heading: &str) -> String {
    let text = readme();
    let start = text.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading}")) + heading.len() + 2;
    let level = heading.split(' ').next().unwrap();
    let end = text[start..].find(&format!("\n{level} ")).map_or(text.len(), |end| start + end);
    text[start..end].to_owned()
}

/// The rows of the tables in a section, cell by cell.
fn rows(section: &str) -> Vec<Vec<String>> {
    let lines = section.lines().filter(|line| line.starts_with('|') && !line.starts_with("| ---"));
    lines.map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

/// Sizes and products are written in more than one way.
fn plain(text: &str) -> String {
    let text = text.replace('×', "x").replace(".0 MiB", "MiB").replace("HOSTNAME-PID", "<hostname>-<pid>");
    text.trim_matches('`').to_owned()
}

#[test]
fn the_table_of_settings_is_what_help_says() {
    let table = rows(&section("## Settings"));
    let command = cli::command();
    let settings = command.get_arguments().filter(|arg| arg.get_env().is_some());
    let mut count = 0;
    for arg in settings {
        let flag = format!("--{}", arg.get_long().unwrap());
        let row = table.iter().find(|row| row[0].split(['`', ' ', ',']).any(|word| word == flag));
        let row = row.unwrap_or_else(|| panic!("{flag} is not in the table"));
        let value = arg.get_value_names().unwrap()[0].as_str();
        assert!(row[0].contains(value) || row[0].contains("CMD ARGS"), "{flag} {value}: {row:?}");
        assert!(row[1].starts_with(&format!("`{}`", arg.get_env().unwrap().display())), "{row:?}");
        if let Some(short) = arg.get_short() {
            assert!(row[0].starts_with(&format!("`-{short}, ")), "{row:?}");
        }
        let help = arg.get_help().unwrap().to_string();
        let default = help.split("[default: ").nth(1).map(|rest| plain(rest.trim_end_matches(']')));
        let required = help.contains("[required");
        assert_eq!(plain(&row[3]), default.unwrap_or(if required { "required" } else { "none" }.to_owned()), "{flag}");
        count += 1;
    }
    assert_eq!(table.len(), count + 1, "a row for each, and the heading");
}

#[test]
fn the_files_that_it_links_to_are_there() {
    let text = readme();
    let targets: Vec<&str> = text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()).collect();
    assert!(targets.len() > 15, "{targets:?}");
    for target in targets.iter().filter(|target| !target.starts_with("http")) {
        match target.strip_prefix('#') {
            Some(anchor) => {
                let headings = text.lines().filter(|line| line.starts_with('#'));
                let mut anchors = headings.map(|line| {
                    let title = line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
                    title.replace([',', '?', '`', '\''], "")
                });
                assert!(anchors.any(|found| found == anchor), "no heading for #{anchor}");
            }
            None => assert!(root().join(target).exists(), "{target}"),
        }
    }
}

#[test]
fn the_messages_that_it_explains_are_those_of_the_log() {
    let mut sources = String::new();
    for entry in walk(&root().join("src")) {
        sources.push_str(&fs::read_to_string(entry).unwrap());
    }
    let table = rows(&section("## What the log says"));
    assert!(table.len() > 15, "{table:?}");
    for row in &table[1..] {
        for message in row[0].split("`").skip(1).step_by(2) {
            let message = message.trim_end_matches('…').trim_end();
            assert!(sources.contains(&format!("\"{message}")), "no such message: {message}");
        }
    }
}

fn walk(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn the_metrics_that_it_lists_are_all_that_there_are() {
    let listed: Vec<String> = rows(&section("### Health and metrics"))
        .iter()
        .flat_map(|row| row[0].split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>())
        .filter(|name| !name.starts_with("GET ") && !name.contains('…'))
        .map(|name| name.split('{').next().unwrap().to_owned())
        .collect();
    let source = fs::read_to_string(root().join("src/metrics.rs")).unwrap();
    let maker = &source[source.find("let counters").unwrap()..source.find("registry: made.0").unwrap()];
    let mut made: Vec<&str> = maker.split('"').skip(1).step_by(2).filter(|text| !text.contains(' ')).collect();
    made.retain(|name| {
        !["queue", "type", "outcome", "code", "state", "result", "handler", "reason"].contains(name) || *name == "state"
    });
    for name in made.iter().chain(&["build_info", "start_time_seconds"]) {
        assert!(listed.iter().any(|found| found == name), "{name} is not listed: {listed:?}");
    }
}
