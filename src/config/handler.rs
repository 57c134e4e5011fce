//! The handler: the command of a configuration, found and ready to run.

use std::ffi::OsString;

use super::layers::Layers;
use super::{ConfigError, Source};
use crate::process::Program;

pub(super) fn resolve(layers: &Layers<'_>) -> Result<Program, ConfigError> {
    let (words, source) = handler_words(layers)?;
    let mut words = words.into_iter();
    let Some(name) = words.next() else {
        return Err(ConfigError::new(source, "exec must name a command (got nothing)"));
    };
    Program::find(name, words.collect(), layers.args.path_list.as_ref())
        .map_err(|problem| ConfigError::unusable(source, format!("handler cannot be run: {problem}")))
}

fn handler_words(layers: &Layers<'_>) -> Result<(Vec<OsString>, Source), ConfigError> {
    let flag = layers.args.given("exec")?.map(|given| given.source);
    match layers.args.trailing_command() {
        Some(_) if matches!(flag, Some(Source::Flag(_))) => {
            Err(ConfigError::new(Source::TrailingCommand, "give the handler once: with --exec or after --, not both"))
        }
        Some(words) => Ok((words, Source::TrailingCommand)),
        None => layers.locate("exec", &layers.file.table.handler.exec, |raw| raw.command("exec"))?.ok_or_else(|| {
            let help = "no handler given; say what to run with --exec \"CMD ARGS\", -- CMD ARGS, ZIZQ_EXEC, or exec in the file's [handler]";
            ConfigError::new(Source::Missing, help)
        }),
    }
}
