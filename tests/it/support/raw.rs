//! A server whose answers the test controls byte by byte, for behaviour that a real server never shows.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use super::{Daemon, Finished, PATIENCE, eventually};

/// A listening server. The test accepts each connection and sends each answer.
pub struct RawServer {
    listener: TcpListener,
    address: SocketAddr,
}

/// One request, and its connection.
pub struct RawRequest {
    /// The request line and the headers, with names in lower case as hyper sends them.
    pub head: String,
    pub body: String,
    stream: TcpStream,
}

impl RawServer {
    /// Listens on a free port.
    pub fn start() -> Self {
        Self::at("127.0.0.1:0".parse().unwrap())
    }

    /// Listens on this address.
    pub fn at(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        Self { listener, address }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Waits for the next connection, and returns its request. Answers and skips version requests, because a worker sends a
    /// version request after each connect, does not wait for the answer, and may cancel the request before it is sent.
    pub fn request(&self) -> RawRequest {
        loop {
            match RawRequest::read(self.connection()) {
                Some(request) if request.is_for_version() => request.answer_version(),
                Some(request) => return request,
                None => {}
            }
        }
    }

    /// Passes each request to `answer` until `answer` returns a value. Version requests are answered, but not passed to `answer`.
    pub fn answer_until<T>(&self, what: &str, mut answer: impl FnMut(RawRequest) -> Option<T>) -> T {
        eventually(what, || {
            let (stream, _) = self.listener.accept().ok()?;
            match RawRequest::read(patient(stream)) {
                Some(request) if request.is_for_version() => {
                    request.answer_version();
                    None
                }
                Some(request) => answer(request),
                None => None,
            }
        })
    }

    /// Answers the next request, even if it is a version request.
    pub fn answer_next(&self, status: &str, body: &str) {
        let request = RawRequest::read(self.connection());
        request.expect("a request").answer(status, body);
    }

    /// Waits for the next connection, without reading from it.
    pub fn connection(&self) -> TcpStream {
        let (stream, _) = eventually("a connection", || self.listener.accept().ok());
        patient(stream)
    }

    /// Reports whether no request is waiting for an answer. Answers version requests, and does not count them.
    pub fn is_quiet(&self) -> bool {
        while let Ok((stream, _)) = self.listener.accept() {
            match RawRequest::read(patient(stream)) {
                Some(request) if request.is_for_version() => request.answer_version(),
                Some(_) => return false,
                None => {}
            }
        }
        true
    }

    /// Reports whether a client has connected that the test has not accepted.
    pub fn has_connection(&self) -> bool {
        self.listener.accept().is_ok()
    }

    /// Runs a daemon, and refuses its first request with `body`, so that the daemon exits with status 1. Returns the head of the
    /// request.
    pub fn refuse(&self, daemon: Daemon, body: &str) -> (String, Finished) {
        let running = daemon.start();
        let request = self.request();
        let head = request.head.clone();
        request.answer("400 Bad Request", body);
        (head, running.assert_exit(1))
    }

    /// Waits for the next request for a take stream, and opens the stream.
    pub fn take(&self) -> RawRequest {
        self.request().open()
    }
}

fn patient(stream: TcpStream) -> TcpStream {
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

impl RawRequest {
    fn is_for_version(&self) -> bool {
        self.line().starts_with("GET ") && self.line().ends_with("/version HTTP/1.1")
    }

    fn answer_version(self) {
        self.answer("200 OK", &format!(r#"{{"version":"{}"}}"#, env!("CARGO_PKG_VERSION")));
    }

    /// Reads a request. Returns `None` if the connection ends before the headers are complete.
    fn read(mut stream: TcpStream) -> Option<Self> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).ok()?;
            head.extend_from_slice(&byte);
        }
        let head = String::from_utf8(head).unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
        stream.read_exact(&mut body).unwrap();
        Some(Self { head, body: String::from_utf8(body).unwrap(), stream })
    }

    pub fn line(&self) -> &str {
        self.head.lines().next().unwrap()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// Answers with a status and a body, and closes the connection.
    pub fn answer(mut self, status: &str, body: &str) {
        let length = body.len();
        self.write(&format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"));
    }

    /// Answers with the headers of a stream, which stays open.
    pub fn open(mut self) -> Self {
        self.write("HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n");
        self
    }

    pub fn heartbeat(&mut self) -> &mut Self {
        self.chunk("\n")
    }

    /// Sends a job with this id.
    pub fn job(&mut self, id: &str) -> &mut Self {
        self.attempt(id, 0)
    }

    /// Sends a job that has failed this many times.
    pub fn attempt(&mut self, id: &str, attempts: u32) -> &mut Self {
        self.typed_attempt(id, "t", attempts)
    }

    /// Sends a job of this type.
    pub fn typed_job(&mut self, id: &str, job_type: &str) -> &mut Self {
        self.typed_attempt(id, job_type, 0)
    }

    /// Sends a job of this type that has failed this many times.
    pub fn typed_attempt(&mut self, id: &str, job_type: &str, attempts: u32) -> &mut Self {
        let fields = r#""queue":"q","priority":32768,"status":"in_flight","payload":null,"ready_at":1,"dequeued_at":1"#;
        self.chunk(&format!("{{\"id\":\"{id}\",\"type\":\"{job_type}\",{fields},\"attempts\":{attempts}}}\n"))
    }

    pub fn chunk(&mut self, text: &str) -> &mut Self {
        self.write(&format!("{:x}\r\n{text}\r\n", text.len()));
        self
    }

    /// Ends the stream like a server that shuts down gracefully.
    pub fn end(mut self) {
        self.write("0\r\n\r\n");
    }

    /// Waits until the client has closed or reset the connection.
    pub fn wait_until_closed(mut self) {
        // Ignore an error, because a read from a connection that was reset returns one.
        let _ = self.stream.read_to_end(&mut Vec::new());
    }

    /// Reports whether the client still holds the connection open.
    pub fn is_open(&self) -> bool {
        self.stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let open = matches!(self.stream.peek(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock);
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        open
    }

    fn write(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }
}
