//! [`Program`]: an executable file, found once and started many times.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// The maximum number of bytes that the kernel reads of a `#!` line.
const MAX_FIRST_LINE: u64 = 256;

/// An executable file and its fixed arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The name as it was given, which becomes the first argument.
    pub(super) name: OsString,
    /// The path of the file. It is absolute, so it means the same file in every working directory.
    pub(super) path: PathBuf,
    pub(super) args: Vec<OsString>,
}

/// Writes the command, quoted as for a shell.
impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [self.path.as_os_str()].into_iter().chain(self.args.iter().map(OsString::as_os_str));
        let words: Vec<_> = words.map(OsStr::to_string_lossy).collect();
        // `try_join` fails only for a word with a zero byte, which cannot be an argument anyway.
        f.write_str(&shlex::try_join(words.iter().map(AsRef::as_ref)).unwrap_or_default())
    }
}

impl Program {
    /// Finds `name` as a shell does: on the search path `path_list`, or as a path if it has a slash.
    ///
    /// # Errors
    /// When there is no such program. The error is a sentence for the user, with advice where possible.
    pub fn find(name: OsString, args: Vec<OsString>, path_list: Option<&OsString>) -> Result<Self, String> {
        if name.is_empty() {
            return Err("the command is an empty word".to_owned());
        }
        let found = which::which_in(&name, path_list, ".").ok().and_then(|found| std::path::absolute(found).ok());
        let Some(path) = found else { return Err(why_not_found(&name)) };
        let program = Self { path, name, args };
        program.problem().map_or(Ok(program), Err)
    }

    pub(crate) fn exists(&self) -> bool {
        self.path.exists()
    }

    /// Returns the reason why the system would refuse to execute the file, as far as the file's content shows. The file must be
    /// an ELF binary, or name its interpreter in its first line. Does not block on a named pipe, but may block on a file system
    /// that hangs.
    pub(crate) fn problem(&self) -> Option<String> {
        let shown = self.path.display();
        let mut beginning = Vec::new();
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(&self.path);
        let metadata = opened.as_ref().map_or_else(|_| self.path.metadata(), |file| file.metadata());
        if metadata.is_ok_and(|metadata| !metadata.is_file()) {
            return Some(format!("{shown} is no regular file"));
        }
        let Ok(file) = opened else {
            // An executable file may be unreadable. Then only a start of the program can show whether the file works.
            return (!self.path.exists()).then(|| format!("{shown} does not exist"));
        };
        file.take(MAX_FIRST_LINE).read_to_end(&mut beginning).ok()?;
        let Some(line) = beginning.strip_prefix(b"#!") else {
            return (!beginning.starts_with(b"\x7fELF"))
                .then(|| format!("{shown} is no program, and its first line names none (like #!/bin/sh)"));
        };
        let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        // A carriage return stays in the name, because the kernel treats it as part of the name.
        let mut words = line.split(|byte| matches!(byte, b' ' | b'\t')).filter(|word| !word.is_empty());
        let name = words.next().unwrap_or_default();
        let interpreter = String::from_utf8_lossy(name);
        (!Path::new(OsStr::from_bytes(name)).is_file())
            .then(|| format!("{shown} names {interpreter:?} in its first line, which does not exist"))
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the file name, for messages.
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
        (true, true) if !path.is_file() => format!("{shown} is no regular file; name an executable file"),
        (true, true) => format!("{shown} is not executable; try chmod +x {shown}"),
        (true, false) => format!("{shown} does not exist"),
        (false, true) => format!("{shown} is not on PATH; if you mean the file here, write ./{shown}"),
        (false, false) => format!("{shown} is not on PATH"),
    }
}
