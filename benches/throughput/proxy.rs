//! [`Proxy`]: a TCP proxy in front of the server. The proxy can make reports fail for a time.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::spawn;

use crate::Result;

/// The first bytes of a connection for a take stream. Every other connection is treated as a connection for reports.
const TAKE: &[u8] = b"GET /jobs/take";

pub(crate) struct Proxy {
    pub(crate) url: String,
    reports: Arc<Reports>,
}

#[derive(Default)]
struct Reports {
    cut: AtomicBool,
    connections: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    pub(crate) fn start(server: &str) -> Result<Self> {
        let server = server.trim_start_matches("http://").trim_end_matches('/').to_owned();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("http://{}", listener.local_addr()?);
        let reports = Arc::new(Reports::default());
        let shared = Arc::clone(&reports);
        spawn(move || {
            for connection in listener.incoming().flatten() {
                let (server, reports) = (server.clone(), Arc::clone(&shared));
                // Ignore an error, because it ends only this connection.
                spawn(move || pass_on(connection, &server, &reports));
            }
        });
        Ok(Self { url, reports })
    }

    /// Closes all connections for reports. Until `mend_reports` is called, each new connection for reports is closed at its first
    /// request.
    pub(crate) fn cut_reports(&self) {
        self.reports.cut.store(true, Ordering::SeqCst);
        let mut connections = self.reports.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.drain(..).for_each(|connection| drop(connection.shutdown(Shutdown::Both)));
    }

    /// Lets new connections for reports pass again.
    pub(crate) fn mend_reports(&self) {
        self.reports.cut.store(false, Ordering::SeqCst);
    }
}

fn pass_on(mut client: TcpStream, server: &str, reports: &Reports) -> Result<()> {
    let mut beginning = [0; TAKE.len()];
    client.read_exact(&mut beginning)?;
    if beginning != TAKE {
        let mut connections = reports.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if reports.cut.load(Ordering::SeqCst) {
            return Ok(());
        }
        connections.push(client.try_clone()?);
    }
    let mut server = TcpStream::connect(server)?;
    server.set_nodelay(true)?;
    client.set_nodelay(true)?;
    server.write_all(&beginning)?;
    let (mut answers, mut back) = (server.try_clone()?, client.try_clone()?);
    spawn(move || {
        let _ = std::io::copy(&mut answers, &mut back);
        let _ = back.shutdown(Shutdown::Both);
    });
    let _ = std::io::copy(&mut client, &mut server);
    Ok(server.shutdown(Shutdown::Both)?)
}
