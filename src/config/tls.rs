//! The TLS settings. Their files are read and checked before the worker connects to the server.

use std::io::Read;
use std::path::Path;

use super::declared::{self, Declared};
use super::layers::Layers;
use super::value::Raw;
use super::variable::open_regular;
use super::{ConfigError, Source};
use crate::client::tls::{certificates, private_key, roots_from_pem, system_roots};
use crate::client::{ServerUrl, Tls};

/// Reads the TLS files. Checks that the client certificate and its key belong together, and that no file is given if `url` is
/// http. Errors about `url` name `url_source`.
pub(super) fn resolve(layers: &Layers<'_>, url: &ServerUrl, url_source: Source) -> Result<Tls, ConfigError> {
    let ca = File::find(layers, &declared::TLS_CA)?;
    let chain = File::find(layers, &declared::TLS_CLIENT_CERT)?;
    let key = File::find(layers, &declared::TLS_CLIENT_KEY)?;
    if !url.is_https() {
        return match ca.or(chain).or(key) {
            Some(file) => Err(file.error("is of no use: url is http; make it https")),
            None => Ok(Tls::default()),
        };
    }
    let roots = match &ca {
        Some(ca) => ca.parse(roots_from_pem)?,
        None => system_roots()
            .map_err(|problem| ConfigError::unusable(url_source.clone(), format!("url is https, and {problem}")))?,
    };
    let identity = match (&chain, &key) {
        (Some(chain), Some(key)) => Some((chain.parse(certificates)?, key.parse(private_key)?)),
        (None, None) => None,
        (Some(alone), None) => return Err(alone.error("goes with tls_client_key, which is not set")),
        (None, Some(alone)) => return Err(alone.error("goes with tls_client_cert, which is not set")),
    };
    Tls::new(roots, identity).map_err(|problem| match &key {
        Some(key) => key.error(&format!("does not belong to the certificate in tls_client_cert: {problem}")),
        None => ConfigError::unusable(url_source, problem),
    })
}

/// A file that a setting names, with its contents.
struct File {
    setting: String,
    path: String,
    source: Source,
    bytes: Vec<u8>,
}

impl File {
    fn find(layers: &Layers<'_>, declared: &Declared) -> Result<Option<Self>, ConfigError> {
        let setting = declared.name();
        let Some((path, source)) = layers.locate(declared, Raw::text)? else { return Ok(None) };
        let mut bytes = Vec::new();
        match open_regular(Path::new(&path)).and_then(|mut file| file.read_to_end(&mut bytes)) {
            Ok(_) => Ok(Some(Self { setting, path, source, bytes })),
            Err(error) => Err(ConfigError::unusable(source, format!("{setting}: cannot read {path}: {error}"))),
        }
    }

    fn parse<T>(&self, parse: impl Fn(&[u8]) -> Result<T, String>) -> Result<T, ConfigError> {
        parse(&self.bytes).map_err(|problem| self.error(&problem))
    }

    /// Returns an error about this file. In the message, the file's path is the subject and `problem` the predicate, like
    /// "is not PEM".
    fn error(&self, problem: &str) -> ConfigError {
        ConfigError::unusable(self.source.clone(), format!("{}: {} {problem}", self.setting, self.path))
    }
}
