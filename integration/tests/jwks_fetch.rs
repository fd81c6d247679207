//! JWKS fetched from token issuers: failures of an issuer and their effect on requests.

use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::json;
use tempfile::TempDir;
use weft_integration::bootstrap::{
    UpstreamHttp, any, bootstrap, cluster, http, listener, require_token_with_fetched_keys,
    route_to,
};
use weft_integration::curl::{Curl, CurlResponse};
use weft_integration::http1::Http1Client;
use weft_integration::mesh_pki::MeshPki;
use weft_integration::port;
use weft_integration::process::{counterpart, run};
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::sidecar_pair::TestSidecar;
use weft_integration::wait::eventually;

/// The behaviour of an issuer when its JWKS is requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IssuerBehaviour {
    /// Returns the JWKS.
    Good,
    /// Returns the JWKS with a max-age of one hour.
    Lasting,
    /// Closes the connection.
    Down,
    /// Does not respond.
    Slow,
    /// Returns the JWKS within two megabytes of whitespace.
    Large,
    /// Returns an HTML page.
    Page,
}

/// An issuer with its tokens, and a sidecar that requires one of them below `/private`.
struct JwksSetup {
    behaviour: Arc<Mutex<IssuerBehaviour>>,
    sidecar: TestSidecar,
    /// The number of JWKS requests that the issuer received.
    fetches: Arc<AtomicUsize>,
    good: String,
    forged: String,
    _pki: MeshPki,
}

fn serve(stream: TcpStream, keys: &str, behaviour: &Mutex<IssuerBehaviour>) {
    let mut reader = BufReader::new(stream);
    if read_head(&mut reader).is_none() {
        return;
    }
    let behaviour = *behaviour.lock().expect("the mutex is not poisoned");
    let body = match behaviour {
        IssuerBehaviour::Good | IssuerBehaviour::Lasting => keys.to_owned(),
        IssuerBehaviour::Down => return,
        IssuerBehaviour::Slow => return drop(reader.read(&mut [0])),
        IssuerBehaviour::Large => keys.replacen('{', &format!("{{{}", " ".repeat(2_000_000)), 1),
        IssuerBehaviour::Page => "<html>Please sign in</html>".to_owned(),
    };
    let age =
        if behaviour == IssuerBehaviour::Lasting { "cache-control: max-age=3600\r\n" } else { "" };
    let head = format!("HTTP/1.1 200 OK\r\n{age}content-length: {}\r\n\r\n", body.len());
    // The sidecar may close the connection before it has read the whole response.
    drop(reader.get_mut().write_all((head + &body).as_bytes()));
}

impl JwksSetup {
    fn start(behaviour: IssuerBehaviour) -> Self {
        let folder = TempDir::new().expect("a temporary folder can be created");
        let mut issuer = counterpart("issuer.py");
        run(issuer.arg(folder.path()).args(["https://issuer", "service"]));
        let read =
            |name| std::fs::read_to_string(folder.path().join(name)).expect("the file exists");

        let behaviour = Arc::new(Mutex::new(behaviour));
        let keys = read("keys.json");
        let at = behaviour.clone();
        let fetches = Arc::<AtomicUsize>::default();
        let count = fetches.clone();
        let issuer = ScriptedServer::start(move |stream| {
            count.fetch_add(1, Relaxed);
            serve(stream, &keys, &at);
        });
        let service = ScriptedServer::echoing_heads();

        let filter =
            require_token_with_fetched_keys("https://issuer", "service", "issuer", "/private");
        let port = port::free();
        let admin = port::free();
        let inbound = listener("inbound", port, http(&route_to("service", 15), &[filter]), None);
        let clusters = [
            cluster("service", &[service.port], UpstreamHttp::Http1, None),
            cluster("issuer", &[issuer.port], UpstreamHttp::Http1, None),
        ];
        let pki = MeshPki::create();
        let config = bootstrap(admin, &[inbound], &clusters);
        let sidecar = TestSidecar::start("guarded", &pki, port, admin, &config);
        let good = read("good.token");
        let forged = read("forged.token");
        Self { behaviour, sidecar, fetches, good, forged, _pki: pki }
    }

    fn set_behaviour(&self, behaviour: IssuerBehaviour) {
        *self.behaviour.lock().expect("the mutex is not poisoned") = behaviour;
    }

    fn ask(&self, token: &str) -> CurlResponse {
        let header = format!("authorization: Bearer {token}");
        Curl::get(self.sidecar.port, "/private").with(&["--header", &header]).run()
    }

    fn wait_for_error(&self, message: &str) {
        eventually(format!("the sidecar logs {message:?}"), || {
            self.sidecar.process.errors().contains(message).then_some(())
        });
    }

    /// Checks that a valid token is accepted and a forged one is rejected.
    #[track_caller]
    fn assert_only_valid_token_accepted(&self) {
        let good = self.ask(&self.good);
        let forged = self.ask(&self.forged);
        assert_eq!((good.status, forged.status), (200, 401), "{good:?} {forged:?}");
    }
}

#[test]
fn last_good_jwks_is_kept_when_the_issuer_fails() {
    let guarded = JwksSetup::start(IssuerBehaviour::Good);
    eventually("the JWKS is fetched", || (guarded.ask(&guarded.good).status == 200).then_some(()));
    for (behaviour, message) in [
        (IssuerBehaviour::Down, "failed to fetch keys"),
        (IssuerBehaviour::Slow, "no response within 1s"),
        (IssuerBehaviour::Large, "failed to read the response"),
        (IssuerBehaviour::Page, "invalid key set"),
    ] {
        guarded.set_behaviour(behaviour);
        guarded.wait_for_error(message);
        guarded.assert_only_valid_token_accepted();
    }
}

#[test]
fn request_without_fetched_jwks_is_rejected_and_public_paths_are_served() {
    for (behaviour, message, status, reason) in [
        (IssuerBehaviour::Down, "failed to fetch keys", 562, "jwks_request_failed"),
        (IssuerBehaviour::Slow, "no response within 1s", 500, "jwks_request_timeout"),
        (IssuerBehaviour::Large, "failed to read the response", 500, "jwks_response_size_exceeded"),
        (IssuerBehaviour::Page, "invalid key set", 562, "jwks_response_invalid"),
    ] {
        let guarded = JwksSetup::start(behaviour);
        guarded.wait_for_error(message);
        eventually(reason, || guarded.ask(&guarded.good).text().starts_with(reason).then_some(()));
        let refused = guarded.ask(&guarded.good);
        assert_eq!(refused.status, status, "{refused:?}");
        let public = Curl::get(guarded.sidecar.port, "/public").run();
        assert_eq!(public.status, 200, "{behaviour:?}: {public:?}");

        guarded.set_behaviour(IssuerBehaviour::Good);
        eventually("the JWKS is requested again", || {
            (guarded.ask(&guarded.good).status == 200).then_some(())
        });
        guarded.assert_only_valid_token_accepted();
    }
}

#[expect(clippy::disallowed_methods, reason = "the test measures elapsed time")]
fn now() -> Instant {
    Instant::now()
}

/// Copies of the valid token, each with a different unknown key ID in its header.
fn with_unknown_key_ids(good: &str) -> impl Iterator<Item = String> {
    let (_, rest) = good.split_once('.').expect("a token has three parts");
    (0..).map(move |number| {
        let header = format!(r#"{{"alg":"ES256","typ":"JWT","kid":"unknown-{number}"}}"#);
        format!("{}.{rest}", URL_SAFE_NO_PAD.encode(header))
    })
}

#[test]
fn tokens_with_unknown_key_ids_refetch_the_jwks_at_most_every_ten_seconds() {
    const TOKENS: usize = 10_000;
    let guarded = JwksSetup::start(IssuerBehaviour::Lasting);
    eventually("the JWKS is fetched", || (guarded.ask(&guarded.good).status == 200).then_some(()));
    assert_eq!(guarded.fetches.load(Relaxed), 1);

    let begun = now();
    let mut client = Http1Client::connect(guarded.sidecar.port);
    for token in with_unknown_key_ids(&guarded.good).take(TOKENS) {
        let header = format!("authorization: Bearer {token}");
        let answer = client.ask(&format!("GET /private HTTP/1.1\r\nhost: a\r\n{header}\r\n\r\n"));
        assert_eq!(answer.status, 401, "{answer:?}");
    }
    // An unknown key ID triggers a fetch, but at most one every ten seconds.
    let extra_fetches = || guarded.fetches.load(Relaxed) - 1;
    eventually("the JWKS is requested again", || (extra_fetches() > 0).then_some(()));
    // Two fetches in twenty seconds; a slow test may allow more.
    let allowed =
        usize::try_from(begun.elapsed().as_secs() / 10).expect("the elapsed time fits").max(2);
    assert!(extra_fetches() <= allowed, "{} times", extra_fetches());
    guarded.assert_only_valid_token_accepted();
}

/// Two issuers whose JWKS have the same URI and are served by different clusters.
#[test]
fn token_of_one_issuer_is_not_verified_by_the_keys_of_another_with_the_same_uri() {
    let names = ["one", "other"];
    let folders = names.map(|_| TempDir::new().expect("a temporary folder can be created"));
    let read = |at: usize, name: &str| {
        let folder = folders.get(at).expect("there are two issuers").path();
        std::fs::read_to_string(folder.join(name)).expect("the file exists")
    };
    let behaviour = Arc::new(Mutex::new(IssuerBehaviour::Good));
    let mut clusters = Vec::new();
    for (at, (name, folder)) in names.iter().zip(&folders).enumerate() {
        let mut issuer = counterpart("issuer.py");
        // Both sign as the first issuer, so that only the key differs.
        run(issuer.arg(folder.path()).args(["https://one", "service"]));
        let keys = read(at, "keys.json");
        let behaviour = behaviour.clone();
        let server = ScriptedServer::start(move |stream| serve(stream, &keys, &behaviour));
        clusters.push(cluster(name, &[server.port], UpstreamHttp::Http1, None));
    }
    let service = ScriptedServer::echoing_heads();
    clusters.push(cluster("service", &[service.port], UpstreamHttp::Http1, None));
    let provider = |issuer: &str, cluster: &str| {
        let uri = json!({"uri": "http://keys.test/keys", "cluster": cluster, "timeout": "1s"});
        json!({"issuer": issuer, "audiences": ["service"],
               "remote_jwks": {"http_uri": uri, "cache_duration": "300s"}})
    };
    let rule = |name: &str| json!({"match": {"prefix": format!("/{name}")}, "requires": {"provider_name": name}});
    let message = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";
    let filter = json!({"name": "jwt", "typed_config": any(message, json!({
        "providers": {
            "one": provider("https://one", "one"),
            "other": provider("https://other", "other"),
            "moved": provider("https://one", "other"),
        },
        "rules": [rule("one"), rule("other"), rule("moved")],
    }))});
    let port = port::free();
    let admin = port::free();
    let inbound = listener("inbound", port, http(&route_to("service", 15), &[filter]), None);
    let pki = MeshPki::create();
    let sidecar =
        TestSidecar::start("two", &pki, port, admin, &bootstrap(admin, &[inbound], &clusters));
    let ask = |path: &str, at: usize| {
        let header = format!("authorization: Bearer {}", read(at, "good.token"));
        Curl::get(sidecar.port, path).with(&["--header", &header]).run().status
    };
    eventually("both JWKS are fetched", || {
        (ask("/one", 0) == 200 && ask("/moved", 1) == 200).then_some(())
    });
    assert_eq!(ask("/one", 1), 401, "the key is served by the other cluster");
    assert_eq!(ask("/moved", 0), 401);
    assert_eq!(ask("/other", 0), 401, "the token is of another issuer");
    assert_eq!(ask("/other", 1), 401);
}
