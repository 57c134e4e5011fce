//! [`AdminAddress`]: the address of the admin server.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;

use super::layers::Layers;
use super::{ConfigError, Source, declared};

/// The address on which the admin server listens, and the setting's source.
#[derive(Debug, Clone)]
pub struct AdminAddress {
    /// The address. Port 0 means any free port.
    pub address: SocketAddr,
    source: Source,
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}

impl AdminAddress {
    pub(super) fn resolve(layers: &Layers<'_>) -> Result<Option<Self>, ConfigError> {
        let found = layers.locate(&declared::ADMIN_LISTEN, |raw, name| {
            let text = raw.text(name)?;
            text.trim().parse().map_err(|_| {
                format!("admin_listen must be ADDRESS:PORT, like 127.0.0.1:9290 or [::]:9290 (got {text})")
            })
        })?;
        Ok(found.map(|(address, source)| Self { address, source }))
    }

    /// Returns the configuration error for a failed bind.
    pub fn error(&self, error: &io::Error) -> ConfigError {
        let advice = match error.kind() {
            ErrorKind::AddrInUse => {
                "this worker runs already, or another program listens there; if it stays, choose another address"
            }
            ErrorKind::AddrNotAvailable => {
                "this machine does not have the address now; if it stays so, choose another one"
            }
            ErrorKind::PermissionDenied => "choose a port from 1024 up, or give the worker CAP_NET_BIND_SERVICE",
            _ => "choose another address",
        };
        let problem = format!("cannot listen on {}: {error}; {advice}", self.address);
        ConfigError::refused(self.source.clone(), error, problem)
    }
}
