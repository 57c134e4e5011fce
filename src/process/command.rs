//! [`Command`]: a program and the arguments of `execve`, prepared once for many starts.

use std::borrow::Cow;
use std::ffi::{CString, OsStr};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::cstrings::{CStrings, Strings};
use super::program::Program;

#[derive(Debug)]
pub(crate) struct Command {
    pub(super) path: CString,
    pub(super) arguments: CStrings,
    pub(super) environment: Arc<CStrings>,
    /// The working directory of the child. `None` means the working directory of this process.
    pub(super) cwd: Option<CString>,
    /// Whether the last process of this command printed more than a pipe holds. If so, the next process gets a larger pipe for
    /// stdout and no read delay, because it would otherwise soon block on a full pipe.
    pub(super) prints_much: AtomicBool,
}

impl Command {
    /// Prepares a command. `env` is the whole environment, except for the variables that are added for a single start. Duplicate
    /// names are not removed.
    ///
    /// # Errors
    /// When an argument, a variable or a path contains a zero byte.
    pub(crate) fn new<'a>(
        program: &Program,
        env: impl IntoIterator<Item = (&'a OsStr, &'a OsStr)>,
        cwd: Option<&Path>,
    ) -> io::Result<Self> {
        let mut arguments = Strings::default();
        for argument in [&program.name].into_iter().chain(&program.args) {
            arguments.push(&[argument.as_encoded_bytes()]);
        }
        let mut environment = Strings::default();
        for (name, value) in env {
            push_variable(&mut environment, name, value);
        }
        Ok(Self {
            path: c_string(program.path.as_os_str())?,
            arguments: arguments.into_c(None)?,
            environment: Arc::new(environment.into_c(None)?),
            cwd: cwd.map(|cwd| c_string(cwd.as_os_str())).transpose()?,
            prints_much: AtomicBool::new(false),
        })
    }

    /// Returns the command's environment, followed by the `added` variables of one start.
    pub(super) fn environment_and(&self, added: &[(&str, Cow<'_, OsStr>)]) -> io::Result<CStrings> {
        let bytes = added.iter().map(|(name, value)| name.len() + "=".len() + value.len() + "\0".len()).sum();
        let mut strings = Strings::with_capacity(added.len(), bytes);
        for (name, value) in added {
            push_variable(&mut strings, OsStr::new(name), value);
        }
        strings.into_c(Some(Arc::clone(&self.environment)))
    }
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    Ok(CString::new(text.as_encoded_bytes())?)
}

fn push_variable(strings: &mut Strings, name: &OsStr, value: &OsStr) {
    strings.push(&[name.as_encoded_bytes(), b"=", value.as_encoded_bytes()]);
}
