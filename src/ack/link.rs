//! [`Link`]: the server that reports go to.

use std::sync::{Arc, PoisonError, RwLock};

use crate::client::Client;

/// The client that is in use now; clones share it. It changes when the worker has moved to another server.
#[derive(Debug, Clone)]
pub(crate) struct Link(Arc<RwLock<Arc<Client>>>);

impl Link {
    pub(crate) fn to(client: Arc<Client>) -> Self {
        Self(Arc::new(RwLock::new(client)))
    }

    /// The client in use.
    pub(crate) fn client(&self) -> Arc<Client> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on this one is in use.
    pub(crate) fn move_to(&self, client: Arc<Client>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = client;
    }
}
