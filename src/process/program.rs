//! [`Program`]: an executable file, found once and started many times.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// An executable file and its fixed arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// What the process calls itself: the name as it was given.
    pub(super) name: OsString,
    /// The file that is run. Absolute, so that it is the same file in every working directory.
    pub(super) path: PathBuf,
    pub(super) args: Vec<OsString>,
}

impl Program {
    /// Finds `name` as a shell would: on the search path `path_list`, or as a path if it has a slash.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it, and what to do.
    pub fn find(name: OsString, args: Vec<OsString>, path_list: Option<&OsString>) -> Result<Self, String> {
        if name.is_empty() {
            return Err("the command is an empty word".to_owned());
        }
        let found = which::which_in(&name, path_list, ".").ok().and_then(|found| std::path::absolute(found).ok());
        match found {
            Some(path) => Ok(Self { path, name, args }),
            None => Err(why_not_found(&name)),
        }
    }

    /// Whether the file is there now.
    pub(crate) fn exists(&self) -> bool {
        self.path.exists()
    }

    /// The last part of its path, for messages.
    pub fn file_name(&self) -> String {
        let name = self.path.file_name().unwrap_or(self.name.as_os_str());
        name.to_string_lossy().into_owned()
    }
}

fn why_not_found(name: &OsStr) -> String {
    let path = Path::new(name);
    let shown = path.display();
    match (name.as_encoded_bytes().contains(&b'/'), path.exists()) {
        (true, true) if path.is_dir() => format!("{shown} is a directory; name an executable file"),
        (true, true) => format!("{shown} is not executable; try chmod +x {shown}"),
        (true, false) => format!("{shown} does not exist"),
        (false, true) => format!("{shown} is not on PATH; if you mean the file here, write ./{shown}"),
        (false, false) => format!("{shown} is not on PATH"),
    }
}
