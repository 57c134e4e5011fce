//! The README and the pages in `docs/` agree with the code, and their links are valid.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn page(name: &str) -> String {
    fs::read_to_string(root().join("docs").join(name)).unwrap()
}

/// Returns the paths of the Markdown pages in the repository's root and in `docs/`.
fn pages() -> Vec<PathBuf> {
    let found = [root(), &root().join("docs")].map(|directory| fs::read_dir(directory).unwrap());
    let paths = found.into_iter().flatten().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
}

/// Returns the section of a page under a heading, up to the next heading of the same level.
fn section(name: &str, heading: &str) -> String {
    let text = page(name);
    let start = text.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading}")) + heading.len() + 2;
    let level = heading.split(' ').next().unwrap();
    let end = text[start..].find(&format!("\n{level} ")).map_or(text.len(), |end| start + end);
    text[start..end].to_owned()
}

/// Returns the rows of the tables in a section, each as a list of its cells.
fn rows(section: &str) -> Vec<Vec<String>> {
    let lines = section.lines().filter(|line| line.starts_with('|') && !line.starts_with("| ---"));
    lines.map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

#[test]
fn the_readme_fits_into_200_lines() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    assert!(readme.lines().count() <= 200, "{} lines", readme.lines().count());
}

#[test]
fn the_readme_links_to_every_page() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for page in pages() {
        let name = page.strip_prefix(root()).unwrap().display().to_string();
        assert!(
            ["README.md", "CHANGELOG.md"].contains(&name.as_str()) || readme.contains(&format!("({name})")),
            "{name}"
        );
    }
}

#[test]
fn each_link_leads_to_a_file_or_a_heading() {
    let mut count = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for target in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            if !target.starts_with("http") {
                assert!(leads_somewhere(&page, target), "{}: {target}", page.display());
                count += 1;
            }
        }
    }
    assert!(count > 40, "{count}");
}

fn leads_somewhere(page: &Path, target: &str) -> bool {
    let (file, anchor) = target.split_once('#').map_or((target, None), |(file, anchor)| (file, Some(anchor)));
    let file = if file.is_empty() { page.to_owned() } else { page.parent().unwrap().join(file) };
    file.exists()
        && anchor.is_none_or(|anchor| anchors(&fs::read_to_string(&file).unwrap()).contains(&anchor.to_owned()))
}

/// Returns the anchors that a renderer gives to a page's headings.
fn anchors(text: &str) -> Vec<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let titles = headings.map(|line| line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-"));
    titles.map(|title| title.replace([',', '?', '`', '\'', '.', ':', '(', ')'], "")).collect()
}

#[test]
fn the_explained_log_messages_exist() {
    let mut sources = String::new();
    for entry in walk(&root().join("src")) {
        sources.push_str(&fs::read_to_string(entry).unwrap());
    }
    let table = rows(&page("log-messages.md"));
    assert!(table.len() > 15, "{table:?}");
    for row in &table[1..] {
        for message in row[0].split("`").skip(1).step_by(2) {
            let message = message.trim_end_matches('…').trim_end();
            assert!(sources.contains(&format!("\"{message}")), "no such message: {message}");
        }
    }
}

fn walk(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn the_listed_metrics_are_all_metrics() {
    let listed: Vec<String> = rows(&section("operations.md", "## Health and metrics"))
        .iter()
        .flat_map(|row| row[0].split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>())
        .filter(|name| !name.starts_with("GET ") && !name.contains('…'))
        .map(|name| name.split('{').next().unwrap().to_owned())
        .collect();
    let source = fs::read_to_string(root().join("src/metrics.rs")).unwrap();
    let maker = &source[source.find("let counters").unwrap()..source.find("registry: made.0").unwrap()];
    let mut made: Vec<&str> = maker
        .split('"')
        .skip(1)
        .step_by(2)
        .filter(|text| !text.contains(|char: char| !char.is_ascii_lowercase() && char != '_'))
        .collect();
    made.retain(|name| {
        !["queue", "type", "kind", "outcome", "code", "state", "result", "handler", "reason"].contains(name)
            || *name == "state"
    });
    for name in made.iter().chain(&["build_info", "start_time_seconds"]) {
        assert!(listed.iter().any(|found| found == name), "{name} is not listed: {listed:?}");
    }
}

#[test]
fn the_files_that_the_architecture_names_exist() {
    let text = page("architecture.md");
    let named: Vec<&str> =
        text.split('`').filter(|word| word.starts_with("src/") || word.starts_with("tests/")).collect();
    assert!(named.len() > 40, "{named:?}");
    for name in named {
        assert!(root().join(name).exists(), "{name}");
    }
    for name in text.split('`').filter_map(|word| word.strip_suffix("::")) {
        let module = root().join("tests/it").join(name);
        assert!(module.exists() || module.with_extension("rs").exists(), "{name}");
    }
}
