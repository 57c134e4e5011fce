//! The Grafana dashboard shows all metrics that a worker exports, and no others.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{Daemon, Server, eventually, runtime, unused_address};

const PREFIX: &str = "zizq_worker_";

fn dashboard() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/grafana.json")).unwrap()
}

/// Returns the names of the worker's metrics that appear in the dashboard's file.
fn named() -> BTreeSet<String> {
    let is_of_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let text = dashboard();
    let words = text.split(|letter| !is_of_name(letter)).filter(|word| word.starts_with(PREFIX));
    words.map(str::to_owned).collect()
}

/// Returns the name and the kind of each metric in a response, from its `# TYPE` lines.
fn exported(metrics: &str) -> Vec<(&str, &str)> {
    metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect()
}

/// Returns the names of a metric's series, as queries use them. A histogram has three.
fn series(name: &str, kind: &str) -> Vec<String> {
    match kind {
        "histogram" => ["_bucket", "_sum", "_count"].map(|suffix| format!("{name}{suffix}")).to_vec(),
        _ => vec![name.to_owned()],
    }
}

fn get(url: &str) -> Option<String> {
    runtime().block_on(async { reqwest::get(url).await.ok()?.error_for_status().ok()?.text().await.ok() })
}

#[test]
fn the_dashboard_shows_exactly_the_exported_metrics() {
    let server = Server::start();
    let address = unused_address().to_string();
    let daemon = Daemon::of(&server).args(["--admin-listen", &address]).sh("[ $ZIZQ_JOB_TYPE != bad ]");
    // The warm process ends before it connects to the worker, but is counted as started nevertheless.
    let daemon = daemon.config("[handlers.warm]\nmode = 'warm'\nexec = ['false']").start();
    let done = server.enqueue("q", "good", Value::Null);
    let failed = server.enqueue_with(json!({"queue": "q", "type": "bad", "payload": null}));
    server.wait_until_done(&done);
    server.wait_for_error(&failed, 1);
    server.enqueue("q", "warm", Value::Null);
    let metrics = eventually("both outcomes and a warm process in the metrics", || {
        let metrics = get(&format!("http://{address}/metrics"))?;
        let counted = |outcome| metrics.contains(&format!(r#"outcome="{outcome}""#));
        (counted("succeeded") && counted("failed") && metrics.contains("process_starts_total")).then_some(metrics)
    });
    let exported = exported(&metrics);
    let shown = named();
    let known: BTreeSet<String> = exported.iter().flat_map(|(name, kind)| series(name, kind)).collect();
    let ours: Vec<_> = exported.iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
    let unknown: Vec<&String> = shown.difference(&known).collect();
    assert!(unknown.is_empty(), "on the dashboard, but not exported: {unknown:?}");
    let hidden: Vec<_> =
        ours.iter().filter(|(name, kind)| !series(name, kind).iter().any(|name| shown.contains(name))).collect();
    assert!(hidden.is_empty(), "exported, but not on the dashboard: {hidden:?}");
    assert!(ours.len() > 15, "{metrics}");
    daemon.stop();
}

/// Grafana draws overlapping panels on top of each other, and ignores one of two panels with the same id.
#[test]
fn the_panels_of_the_dashboard_lie_side_by_side() {
    let dashboard: Value = serde_json::from_str(&dashboard()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<u64> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
    let mut taken = BTreeSet::new();
    for panel in panels {
        let [x, y, width, height] = ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().unwrap());
        assert!(x + width <= 24, "{panel}");
        for place in (x..x + width).flat_map(|column| (y..y + height).map(move |line| (column, line))) {
            assert!(taken.insert(place), "{} overlaps", panel["title"]);
        }
    }
}

#[test]
fn every_query_of_the_dashboard_is_for_the_chosen_instances() {
    let dashboard: Value = serde_json::from_str(&dashboard()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    for query in targets.map(|target| target["expr"].as_str().unwrap()) {
        let metrics =
            query.matches(PREFIX).count() + query.matches("process_").count() - query.matches("_process_").count();
        assert_eq!(query.matches(r#"{job=~"$job", instance=~"$instance""#).count(), metrics, "{query}");
        let windows = query.matches("rate(").count() + query.matches("increase(").count();
        assert_eq!(query.matches("[$__rate_interval]").count(), windows, "{query}");
    }
}
