//! Sends HTTP/2 requests with the Python package `h2`, for what curl cannot do: CONNECT, trailers,
//! interim responses.

use std::io::Write;

use serde_json::{Value, json};

use crate::process::{counterpart, run};

/// A response.
#[derive(Debug, Clone)]
pub struct Http2Response(Value);

/// A request with a method, a path and further headers.
#[must_use]
pub fn request(method: &str, path: &str, fields: &[(&str, &str)]) -> Value {
    let usual =
        [(":method", method), (":scheme", "http"), (":authority", "a.example"), (":path", path)];
    let fields: Vec<_> = usual.iter().chain(fields).collect();
    json!({"fields": fields})
}

/// The request with another `:authority`.
///
/// # Panics
/// If `request` was not made by [`request`].
#[must_use]
pub fn to_host(mut request: Value, host: &str) -> Value {
    let authority = request.pointer_mut("/fields/2/1").expect("the third header is :authority");
    *authority = json!(host);
    request
}

/// A CONNECT request: extended with a `:protocol`, or plain.
#[must_use]
pub fn connect(protocol: Option<&str>) -> Value {
    match protocol {
        Some(protocol) => json!({"fields": [(":method", "CONNECT"), (":protocol", protocol),
            (":scheme", "http"), (":authority", "a.example"), (":path", "/chat"),
            ("sec-websocket-version", "13")]}),
        None => json!({"fields": [(":method", "CONNECT"), (":authority", "a.example:443")]}),
    }
}

/// Sends requests, each over a new connection.
///
/// # Panics
/// If the client fails.
#[must_use]
pub fn ask(port: u16, requests: &[Value]) -> Vec<Http2Response> {
    // The requests may be longer than a command-line argument can be.
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file can be made");
    file.write_all(json!(requests).to_string().as_bytes()).expect("the file is writable");
    let mut client = counterpart("http2_caller.py");
    let printed = run(client.arg(port.to_string()).arg(file.path()));
    let answers: Vec<Http2Response> = printed
        .lines()
        .map(|line| Http2Response(serde_json::from_str(line).expect("the client prints JSON")))
        .collect();
    assert_eq!(answers.len(), requests.len(), "{printed}");
    answers
}

/// Sends one request.
///
/// # Panics
/// If the client fails.
#[must_use]
pub fn ask_one(port: u16, request: Value) -> Http2Response {
    ask(port, &[request]).pop().expect("the client prints one response per request")
}

fn header<'a>(fields: &'a Value, name: &str) -> Option<&'a str> {
    fields
        .as_array()?
        .iter()
        .find(|field| field.get(0).and_then(Value::as_str) == Some(name))?
        .get(1)?
        .as_str()
}

impl Http2Response {
    fn part(&self, name: &str) -> &Value {
        self.0.get(name).unwrap_or(&Value::Null)
    }

    /// The status; 0 when no response was received.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.header(":status").and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    /// The value of a response header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        header(self.part("fields"), name)
    }

    /// The value of a trailer.
    #[must_use]
    pub fn trailer(&self, name: &str) -> Option<&str> {
        header(self.part("trailers"), name)
    }

    /// The statuses of interim (1xx) responses.
    #[must_use]
    pub fn interim(&self) -> Vec<&str> {
        let heads = self.part("interim").as_array().map(Vec::as_slice).unwrap_or_default();
        heads.iter().filter_map(|head| header(head, ":status")).collect()
    }

    /// The value of a header of the first interim response.
    #[must_use]
    pub fn interim_header(&self, name: &str) -> Option<&str> {
        header(self.part("interim").get(0)?, name)
    }

    /// The body.
    #[must_use]
    pub fn body(&self) -> &str {
        self.part("body").as_str().unwrap_or_default()
    }

    /// Whether the response was complete.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.part("ended") == true
    }

    /// The error code with which the stream was reset.
    #[must_use]
    pub fn reset(&self) -> Option<u64> {
        self.part("reset").as_u64()
    }
}
