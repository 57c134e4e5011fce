//! [`Command`]: a program and what each of its processes is given, as the system takes it: made once, and started many times.

use std::borrow::Cow;
use std::ffi::{CString, OsStr};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::cstrings::{CStrings, Strings};
use super::program::Program;

/// A program with its arguments, environment and working directory.
#[derive(Debug)]
pub(crate) struct Command {
    pub(super) path: CString,
    pub(super) arguments: CStrings,
    pub(super) environment: Arc<CStrings>,
    /// This process's own, if there is none.
    pub(super) cwd: Option<CString>,
    /// Whether its last process has printed more than fits into a pipe: the next one may soon wait for somebody to read.
    pub(super) prints_much: AtomicBool,
}

impl Command {
    /// `env` is the whole environment, but for what a start adds. Each name should be there once.
    ///
    /// # Errors
    /// When there is a zero byte in any of it.
    pub(crate) fn new<'a>(
        program: &Program,
        env: impl IntoIterator<Item = (&'a OsStr, &'a OsStr)>,
        cwd: Option<&Path>,
    ) -> io::Result<Self> {
        let mut arguments = Strings::default();
        for argument in [&program.name].into_iter().chain(&program.args) {
            arguments.push(&[argument.as_encoded_bytes()]);
        }
        Ok(Self {
            path: c_string(program.path.as_os_str())?,
            arguments: arguments.into_c()?,
            environment: Arc::new(variables(env).into_c()?),
            cwd: cwd.map(|cwd| c_string(cwd.as_os_str())).transpose()?,
            prints_much: AtomicBool::new(false),
        })
    }

    /// Returns the environment of one start.
    pub(super) fn environment_and(&self, added: &[(&str, Cow<'_, OsStr>)]) -> io::Result<CStrings> {
        let added = added.iter().map(|(name, value)| (OsStr::new(name), &**value));
        variables(added).into_c_after(Arc::clone(&self.environment))
    }
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    Ok(CString::new(text.as_encoded_bytes())?)
}

fn variables<'a>(variables: impl IntoIterator<Item = (&'a OsStr, &'a OsStr)>) -> Strings {
    let mut strings = Strings::default();
    for (name, value) in variables {
        strings.push(&[name.as_encoded_bytes(), b"=", value.as_encoded_bytes()]);
    }
    strings
}
