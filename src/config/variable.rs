//! [`Variable`]: the value of a handler's environment variable, given directly or in a file.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use toml::Value;

/// The size limit of a file that holds a value. The kernel limits a variable, including its name, to 128 KiB (execve(2)). A
/// token or a certificate needs only a few KiB.
const MAX_BYTES: u64 = 64 * 1024;

/// The value of an environment variable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Variable {
    /// The value itself.
    Text(String),
    /// The file that holds the value.
    File(PathBuf),
}

/// Returns the key under which `Sources` holds the source of a variable in a handler's `env`.
pub(super) fn variable_of(table: &str, name: &str) -> String {
    format!("{table}.env.{name}")
}

impl Variable {
    /// Parses the value of the variable `name`. `env` is the name of the table, for messages.
    pub(super) fn read(env: &str, name: &str, value: &Value) -> Result<Self, String> {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(format!("{env} has a name that no variable can have ({name:?})"));
        }
        let file = value.as_table().filter(|table| table.len() == 1).and_then(|table| table.get("file")?.as_str());
        let kind = value.type_str();
        match (value, file) {
            (Value::String(text), _) if text.contains('\0') => Err(format!("{env}.{name} must not have a zero byte")),
            (Value::String(text), _) => Ok(Self::Text(text.clone())),
            (_, Some(path)) => Ok(Self::File(PathBuf::from(path))),
            _ => Err(format!("{env}.{name} must be a string, or {{ file = \"PATH\" }} (got a value of type {kind})")),
        }
    }

    /// Returns the value. Reads the file, if a file holds the value.
    ///
    /// # Errors
    /// If the file cannot be read, is too large or contains a zero byte.
    pub(super) fn resolve(&self) -> io::Result<OsString> {
        match self {
            Self::Text(text) => Ok(OsString::from(text)),
            Self::File(path) => contents(path),
        }
    }

    /// Returns the path of the file, or an empty string if the value is given directly.
    pub(super) fn path(&self) -> String {
        match self {
            Self::Text(_) => String::new(),
            Self::File(path) => path.display().to_string(),
        }
    }
}

/// Returns the contents of a file without the trailing newline.
fn contents(path: &Path) -> io::Result<OsString> {
    let name = path.display();
    let bytes = read(path).map_err(|error| io::Error::new(error.kind(), format!("cannot read {name}: {error}")))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(io::Error::other(format!("{name} has more than {} KiB", MAX_BYTES / 1024)));
    }
    let value = bytes.strip_suffix(b"\r\n").or_else(|| bytes.strip_suffix(b"\n")).unwrap_or(&bytes);
    if value.contains(&0) {
        return Err(io::Error::other(format!("{name} has a zero byte")));
    }
    Ok(OsString::from_vec(value.to_vec()))
}

/// Reads at most `MAX_BYTES + 1` bytes, so that the caller can detect a larger file.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Opens a regular file. Rejects a pipe or a device, because a read from one can block forever.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    if fs::metadata(path)?.is_file() { File::open(path) } else { Err(io::Error::other("it is not a regular file")) }
}
