//! Sends requests with `curl`, for tests that need an ordinary HTTP client.

use std::fmt;
use std::process::Command;

use tempfile::TempDir;

/// A request to send.
#[derive(Debug)]
pub struct Curl {
    arguments: Vec<String>,
    url: String,
}

/// A response, as curl reports it.
pub struct CurlResponse {
    /// curl's exit code: 0 when the response was complete.
    pub exit: i32,
    /// The status code; 0 without a response.
    pub status: u16,
    /// The HTTP version, as curl prints it: `1.1` or `2`.
    pub version: String,
    /// The number of connections opened; 0 when an existing connection was reused.
    pub connections: u32,
    /// The response heads, as received.
    pub head: String,
    /// The response body.
    pub body: Vec<u8>,
    /// curl's standard error.
    pub stderr: String,
}

impl Curl {
    /// A GET of a path on a port of loopback.
    #[must_use]
    pub fn get(port: u16, path: &str) -> Self {
        Self::to(format!("http://127.0.0.1:{port}{path}"))
    }

    /// A GET of a URL.
    #[must_use]
    pub fn to(url: String) -> Self {
        Self { arguments: Vec::new(), url }
    }

    /// Adds command-line options of curl.
    #[must_use]
    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// Sends the request.
    ///
    /// # Panics
    /// If curl cannot be started.
    #[must_use]
    pub fn run(self) -> CurlResponse {
        let folder = TempDir::new().expect("a temporary folder can be created");
        let body = folder.path().join("body");
        let head = folder.path().join("head");
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--max-time", "30", "--output"]).arg(&body);
        curl.arg("--dump-header").arg(&head);
        curl.args(["--write-out", "%{http_code} %{http_version} %{num_connects}\n"]);
        let output = curl.args(&self.arguments).arg(&self.url).output().expect("curl runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        // curl prints one line per URL; the last describes the response that is returned.
        let mut words = said.lines().next_back().unwrap_or_default().split(' ');
        let mut word = || words.next().unwrap_or_default().to_owned();
        CurlResponse {
            exit: output.status.code().unwrap_or(-1),
            status: word().parse().unwrap_or(0),
            version: word(),
            connections: word().parse().unwrap_or(0),
            head: String::from_utf8_lossy(&std::fs::read(head).unwrap_or_default()).into_owned(),
            body: std::fs::read(body).unwrap_or_default(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl fmt::Debug for CurlResponse {
    /// Prints the response for a failed test: at most 200 characters of the body.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { exit, status, version, head, body, stderr, .. } = self;
        let start: String = self.text().chars().take(200).collect();
        write!(f, "curl {exit} {stderr:?}, HTTP/{version} {status}, head {head:?}, ")?;
        write!(f, "{} bytes: {start:?}", body.len())
    }
}

impl CurlResponse {
    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The value of a header in the last head; `name` is lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().rev().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}
