//! HTTP/2 by the Python package `h2`, for what curl does not do.

use std::io::Write;

use serde_json::{Value, json};

use crate::process::{counterpart, run};

/// What came back to a request.
#[derive(Debug, Clone)]
pub struct Http2Response(Value);

/// A request of a method and a path, with more fields.
#[must_use]
pub fn request(method: &str, path: &str, fields: &[(&str, &str)]) -> Value {
    let usual =
        [(":method", method), (":scheme", "http"), (":authority", "a.example"), (":path", path)];
    let fields: Vec<_> = usual.iter().chain(fields).collect();
    json!({"fields": fields})
}

/// The same of another authority.
///
/// # Panics
/// When it is no request of [`request`].
#[must_use]
pub fn to_host(mut request: Value, host: &str) -> Value {
    let authority = request.pointer_mut("/fields/2/1").expect("the third field is the authority");
    *authority = json!(host);
    request
}

/// A CONNECT, of a protocol or plain.
#[must_use]
pub fn connect(protocol: Option<&str>) -> Value {
    match protocol {
        Some(protocol) => json!({"fields": [(":method", "CONNECT"), (":protocol", protocol),
            (":scheme", "http"), (":authority", "a.example"), (":path", "/chat"),
            ("sec-websocket-version", "13")]}),
        None => json!({"fields": [(":method", "CONNECT"), (":authority", "a.example:443")]}),
    }
}

/// Makes requests, each over a connection of its own.
///
/// # Panics
/// When the client fails.
#[must_use]
pub fn ask(port: u16, requests: &[Value]) -> Vec<Http2Response> {
    // They may be longer than an argument can be.
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file can be made");
    file.write_all(json!(requests).to_string().as_bytes()).expect("it takes requests");
    let mut client = counterpart("http2_caller.py");
    let printed = run(client.arg(port.to_string()).arg(file.path()));
    let answers: Vec<Http2Response> = printed
        .lines()
        .map(|line| Http2Response(serde_json::from_str(line).expect("it prints JSON")))
        .collect();
    assert_eq!(answers.len(), requests.len(), "{printed}");
    answers
}

/// Makes one request.
///
/// # Panics
/// When the client fails.
#[must_use]
pub fn ask_one(port: u16, request: Value) -> Http2Response {
    ask(port, &[request]).pop().expect("one for each")
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

    /// The status; 0 when nothing came.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.header(":status").and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    /// A field of the head.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        header(self.part("fields"), name)
    }

    /// A trailer.
    #[must_use]
    pub fn trailer(&self, name: &str) -> Option<&str> {
        header(self.part("trailers"), name)
    }

    /// The responses before it that another follows, by their status.
    #[must_use]
    pub fn interim(&self) -> Vec<&str> {
        let heads = self.part("interim").as_array().map(Vec::as_slice).unwrap_or_default();
        heads.iter().filter_map(|head| header(head, ":status")).collect()
    }

    /// A field of the first of those.
    #[must_use]
    pub fn interim_header(&self, name: &str) -> Option<&str> {
        header(self.part("interim").get(0)?, name)
    }

    /// The body.
    #[must_use]
    pub fn body(&self) -> &str {
        self.part("body").as_str().unwrap_or_default()
    }

    /// Whether it came whole.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.part("ended") == true
    }

    /// Why its stream was reset.
    #[must_use]
    pub fn reset(&self) -> Option<u64> {
        self.part("reset").as_u64()
    }
}
