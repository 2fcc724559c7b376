//! A server's process, and as much of an HTTP client as tests need.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The bundled model.
pub const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/kjv-llama");

/// A running server; dropping it kills it.
pub struct Server {
    child: Child,
    pub address: SocketAddr,
}

/// An answer.
pub struct Response {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{}: {e}", self.text()))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// A copy of the bundled model with one more or another file.
pub fn model_with(name: &str, text: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(MODEL).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(dir.path().join(name), text).unwrap();
    dir
}

impl Server {
    /// Serves the bundled model on the CPU.
    pub fn start(args: &[&str]) -> Server {
        Server::start_with(args, &[])
    }

    pub fn start_with(args: &[&str], variables: &[(&str, &str)]) -> Server {
        Server::of(Path::new(MODEL), args, variables)
    }

    pub fn of(model: &Path, args: &[&str], variables: &[(&str, &str)]) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qp"));
        command.arg("serve").arg(model).args(["--device", "cpu"]);
        if !args.contains(&"--port") {
            command.args(["--port", "0"]);
        }
        command.args(args).env_remove("QP_API_KEY").envs(variables.iter().copied());
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).stdin(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = Vec::new();
        let address = loop {
            let Some(line) = lines.next() else { panic!("the server did not start: {said:?}") };
            let line = line.unwrap();
            if let Some((_, rest)) = line.split_once(" on http://") {
                break rest.split(' ').next().unwrap().parse().unwrap();
            }
            said.push(line);
        };
        // What it says later is not of interest, but its pipe must stay open.
        std::thread::spawn(move || lines.for_each(drop));
        Server { child, address }
    }

    fn connect(&self) -> std::io::Result<TcpStream> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(300)))?;
        Ok(stream)
    }

    fn request(method: &str, path: &str, body: &str) -> String {
        format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        )
    }

    pub fn get(&self, path: &str) -> Response {
        self.raw(&Server::request("GET", path, ""))
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.raw(&Server::request("POST", path, &body.to_string()))
    }

    /// `None` if there is no connection.
    pub fn try_post(&self, path: &str, body: &Value) -> Option<Response> {
        exchange(self.connect().ok()?, &Server::request("POST", path, &body.to_string())).ok()
    }

    pub fn raw(&self, request: &str) -> Response {
        exchange(self.connect().unwrap(), request).unwrap()
    }

    /// The events of a streamed answer, which must end as they should.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let response = self.post(path, body);
        assert_eq!(response.status, 200, "{}", response.text());
        assert_eq!(response.header("content-type"), Some("text/event-stream"));
        let text = response.text();
        let events = text.strip_suffix("data: [DONE]\n\n").unwrap_or_else(|| panic!("no end: {text}"));
        events
            .split_terminator("\n\n")
            .map(|e| serde_json::from_str(e.strip_prefix("data: ").unwrap()).unwrap())
            .inspect(|e: &Value| assert!(e.get("error").is_none(), "{e}"))
            .collect()
    }

    /// Asks, reads a few bytes and goes away.
    pub fn abandon(&self, path: &str, body: &Value, parts: usize) {
        let mut stream = self.connect().unwrap();
        stream.write_all(Server::request("POST", path, &body.to_string()).as_bytes()).unwrap();
        for _ in 0..parts {
            let _ = stream.read(&mut [0; 200]);
        }
    }

    /// Waits until so many requests are being answered.
    pub fn wait_until_running(&self, n: u64) {
        self.wait_for(|live| live["running"].as_u64() == Some(n));
    }

    /// Waits until nothing is left of requests: neither sequences nor pages.
    pub fn assert_idle(&self) {
        self.wait_for(|live| {
            let n = |name: &str| live[name].as_u64().unwrap();
            n("running") == 0 && n("waiting") == 0 && n("free_pages") + n("cached_pages") == n("pages")
        });
    }

    fn wait_for(&self, is: impl Fn(&Value) -> bool) {
        let until = Instant::now() + Duration::from_secs(120);
        loop {
            let live = self.get("/status").json()["live"].clone();
            if is(&live) {
                return;
            }
            assert!(Instant::now() < until, "{live}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(sent.unwrap().success());
    }

    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a request to an address and reads its answer to the end.
pub fn exchange_with(address: SocketAddr, method: &str, path: &str, body: &str) -> std::io::Result<Response> {
    exchange(TcpStream::connect(address)?, &Server::request(method, path, body))
}

/// Sends a request and reads its answer to the end.
fn exchange(mut stream: TcpStream, request: &str) -> std::io::Result<Response> {
    // The server may answer and close before it has read all.
    let _ = stream.write_all(request.as_bytes());
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let wrong = || std::io::Error::other("no HTTP answer");
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(wrong)?;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut response = Response { status, headers, body: Vec::new() };
    if response.header("transfer-encoding") == Some("chunked") {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size)?;
            let size = usize::from_str_radix(size.trim(), 16).map_err(std::io::Error::other)?;
            let mut part = vec![0; size + 2];
            reader.read_exact(&mut part)?;
            if size == 0 {
                return Ok(response);
            }
            response.body.extend_from_slice(&part[..size]);
        }
    }
    let length = response.header("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
    response.body = vec![0; length];
    reader.read_exact(&mut response.body)?;
    Ok(response)
}
