//! The Prometheus alerts use metrics that a worker exports, and fire when they should.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::{Admin, Daemon, Server};

const PREFIX: &str = "zizq_worker_";

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Returns the alerting rules in `config/alerts.yaml`.
fn rules() -> Vec<Value> {
    let file: Value = serde_yaml_ng::from_str(&fs::read_to_string(path("config/alerts.yaml")).unwrap()).unwrap();
    let groups = file["groups"].as_array().unwrap();
    groups.iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
}

/// Runs promtool, and asserts that it succeeds. If promtool is not installed, panics in CI, and only prints a message elsewhere.
fn promtool(args: &[&str], file: &str) {
    let run = Command::new("promtool").args(args).arg(path(file)).output();
    let Ok(verdict) = run else {
        assert!(std::env::var_os("CI").is_none(), "promtool is needed: it is in the package prometheus");
        eprintln!("left out: it needs promtool");
        return;
    };
    let [stdout, stderr] = [&verdict.stdout, &verdict.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(verdict.status.success(), "{}\n{stdout}\n{stderr}", verdict.status);
}

#[test]
fn prometheus_accepts_the_alerts() {
    promtool(&["check", "rules", "--lint-fatal"], "config/alerts.yaml");
}

#[test]
fn the_alerts_fire_when_they_should() {
    promtool(&["test", "rules"], "tests/alerts.yaml");
}

#[test]
fn each_alert_is_tested() {
    let tests: Value = serde_yaml_ng::from_str(&fs::read_to_string(path("tests/alerts.yaml")).unwrap()).unwrap();
    let tests = tests["tests"].as_array().unwrap();
    let cases: Vec<&Value> = tests.iter().flat_map(|test| test["alert_rule_test"].as_array().unwrap()).collect();
    for rule in rules() {
        let of_rule = cases.iter().filter(|case| case["alertname"] == rule["alert"]);
        let (firing, silent): (Vec<&&Value>, _) = of_rule.partition(|case| case["exp_alerts"].is_array());
        assert!(!firing.is_empty() && !silent.is_empty(), "{}", rule["alert"]);
        for text in [&rule["annotations"]["summary"], &rule["annotations"]["description"]] {
            assert!(text.is_string(), "{}", rule["alert"]);
        }
    }
}

#[test]
fn the_alerts_are_about_metrics_that_a_worker_exports() {
    let server = Server::start();
    let running = Daemon::of(&server).args(["--admin-listen", "127.0.0.1:0"]).sh("true").start();
    let job = server.enqueue("q", "t", Value::Null);
    server.wait_until_done(&job);
    let metrics = Admin::of(&running).metrics();
    let exported: BTreeSet<&str> =
        metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let rules = rules();
    let is_of_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let words = rules.iter().flat_map(|rule| rule["expr"].as_str().unwrap().split(|letter| !is_of_name(letter)));
    let named: BTreeSet<&str> = words.filter(|word| word.starts_with(PREFIX)).collect();
    let unknown: Vec<&&str> = named.difference(&exported).collect();
    assert!(named.len() > 4 && unknown.is_empty(), "not exported: {unknown:?}");
}
