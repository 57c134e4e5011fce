//! A server that records all requests, and always gives the same answer.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

pub struct Recorder {
    pub url: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Recorder {
    /// Starts a server that answers each request with this status and body.
    pub fn answering(status: u16, body: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&requests);
        // This thread runs until the test process ends.
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let connection = connection.unwrap();
                kept.lock().unwrap().push(read_head(&connection));
                let length = body.len();
                let _ = write!(
                    &connection,
                    "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
                );
            }
        });
        Self { url, requests }
    }

    /// Returns the heads (request line and headers) of all requests so far. A connection that closes without a request counts as
    /// an empty head.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    /// Returns the value of a header in the first request.
    pub fn header(&self, name: &str) -> Option<String> {
        let head = self.requests().into_iter().next()?;
        let headers = head.lines().filter_map(|line| line.split_once(": "));
        headers.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).next()
    }
}

fn read_head(connection: &TcpStream) -> String {
    let lines = BufReader::new(connection).lines().map_while(Result::ok);
    lines.take_while(|line| !line.is_empty()).map(|line| line + "\n").collect()
}
