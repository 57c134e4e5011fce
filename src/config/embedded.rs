//! [`EmbeddedConfig`]: the settings of the embedded server.

use std::fmt;
use std::path::{Path, PathBuf};

use super::{ConfigError, Source};
use crate::cli::Args;
use crate::client::ServerUrl;

/// The settings of the embedded server.
#[derive(Debug)]
pub struct EmbeddedConfig {
    /// The source of the initial jobs.
    pub jobs: Option<JobsSource>,
}

impl EmbeddedConfig {
    /// Returns the settings with `jobs` removed if its source is standard input, because standard input can be read only once.
    pub(crate) fn without_stdin(&self) -> Self {
        Self { jobs: self.jobs.clone().filter(|jobs| *jobs != JobsSource::Stdin) }
    }
}

/// A source of jobs, with one JSON object on each line (NDJSON).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobsSource {
    /// Standard input.
    Stdin,
    /// A file.
    File(PathBuf),
}

impl fmt::Display for JobsSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("stdin"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

pub(super) fn resolve(args: &Args, url: &ServerUrl) -> Result<Option<EmbeddedConfig>, ConfigError> {
    let given = args.given("jobs")?;
    let jobs = given.as_ref().and_then(|given| given.values.last()).map(|file| match file.as_str() {
        "-" => JobsSource::Stdin,
        file => JobsSource::File(Path::new(file).to_owned()),
    });
    let refuse = |flag: &str, problem: &str| Err(ConfigError::new(Source::Flag(flag.to_owned()), problem));
    if !args.is_set("embedded") {
        let problem = "only the embedded server takes jobs from a file; add --embedded";
        return if jobs.is_some() { refuse("--jobs", problem) } else { Ok(None) };
    }
    if url.is_https() {
        return refuse("--embedded", "the embedded server speaks plain http; change url");
    }
    if !url.prefix().is_empty() {
        let prefix = url.prefix();
        return refuse("--embedded", &format!("the embedded server has no path prefix; take {prefix} off url"));
    }
    Ok(Some(EmbeddedConfig { jobs }))
}
