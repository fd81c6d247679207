//! Key sets over https by host name: roots, redirects and versions of TLS.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use weft_integration::bootstrap::{any, cluster, with};
use weft_integration::crafted_pki::{DNS, authority_params, leaf, leaf_params, names, root};
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::MeshPki;
use weft_integration::process::{Process, counterpart, run, weft};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::eventually;

/// The kind of a name that is an address.
const ADDRESS: u8 = 0x87;

/// An issuer whose keys are served over TLS, and a sidecar with a provider for each way to them.
struct Issuer {
    _server: Process,
    folder: TempDir,
    port: u16,
}

impl Issuer {
    fn start(version: &str) -> Self {
        let folder = TempDir::new().expect("a temporary folder can be made");
        run(counterpart("issuer.py").arg(folder.path()).args(["https://issuer", "service"]));
        let file = |name: &str| folder.path().join(name);
        let write = |name: &str, text: &str| {
            std::fs::write(file(name), text).expect("the folder takes files");
        };
        let authority = root(authority_params("outside", 1));
        let mut params = leaf_params(Some("key server"), 2);
        let both = names(&[(DNS, b"localhost"), (ADDRESS, &[127, 0, 0, 1])]);
        params.custom_extensions.push(both);
        let own = leaf(&params, &authority, &[]);
        // One that no program could read must not take the others with it.
        let broken = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
        write("system.pem", &format!("{broken}{}", authority.pem()));
        write("given.pem", &authority.pem());
        write("other.pem", &root(authority_params("other", 1)).pem());
        write("server.pem", &own.chain);
        write("server.key", &own.key);
        let mut command = counterpart("key_server.py");
        command.arg(folder.path()).arg(file("server.pem")).arg(file("server.key")).arg(version);
        let server = Process::start("key server", &mut command);
        let line = server.line_with("port ");
        let port = line.trim_start_matches("port ").trim().parse().expect("it prints its port");
        Self { _server: server, folder, port }
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
    }

    /// A cluster that resolves the host name, and checks the server by these roots.
    fn cluster(&self, name: &str, validation: &Value) -> Value {
        let message = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
        let common = json!({"validation_context": validation});
        let context = json!({"sni": "localhost", "common_tls_context": common});
        let socket = json!({"name": "tls", "typed_config": any(message, context)});
        let address = json!({"socket_address": {"address": "localhost", "port_value": self.port}});
        let endpoints = json!([{"lb_endpoints": [{"endpoint": {"address": address}}]}]);
        let cluster = with(
            cluster(name, &[], UpstreamHttp::Http1, Some(socket)),
            "type",
            json!("STRICT_DNS"),
        );
        with(cluster, "load_assignment", json!({"cluster_name": name, "endpoints": endpoints}))
    }

    fn provider(&self, cluster: &str, path: &str) -> Value {
        let uri = format!("https://localhost:{}{path}", self.port);
        let remote = json!({"uri": uri, "cluster": cluster, "timeout": "2s"});
        json!({"issuer": "https://issuer", "audiences": ["service"],
               "remote_jwks": {"http_uri": remote, "cache_duration": "1s"}})
    }

    /// A sidecar that asks below each name for a token by the provider of this name.
    fn guard(&self, ways: &[(&str, &str, &str, u8)], service: u16) -> SingleSidecar {
        let message = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";
        let (mut providers, mut rules, mut ours) = (json!({}), Vec::new(), json!({}));
        for (name, cluster, path, redirects) in ways {
            providers = with(providers, name, self.provider(cluster, path));
            ours = with(ours, name, json!({"redirects": redirects}));
            rules.push(json!({"match": {"prefix": format!("/{name}")},
                              "requires": {"provider_name": name}}));
        }
        let filter = json!({"name": "jwt", "typed_config":
            any(message, json!({"providers": providers, "rules": rules}))});
        let mut wanted = SingleSidecarConfig::for_upstream(service, UpstreamHttp::Http1)
            .with_weft_metadata("jwt", ours);
        let filters = wanted.http.pointer_mut("/http_filters");
        let filters = filters.and_then(Value::as_array_mut).expect("it has filters");
        filters.insert(0, filter);
        let file = |name: &str| json!({"trusted_ca": {"filename": self.file(name)}});
        wanted.clusters.extend([
            self.cluster("system", &json!({"system_root_certs": {}})),
            self.cluster("given", &file("given.pem")),
            self.cluster("other", &file("other.pem")),
        ]);
        let mut command = weft();
        command.arg("sidecar").env("SSL_CERT_FILE", Path::new(&self.file("system.pem")));
        wanted.start_with_command(MeshPki::create(), command)
    }

    /// The status of a request with a good token.
    fn ask(&self, alone: &SingleSidecar, way: &str) -> u16 {
        let token = std::fs::read_to_string(self.file("good.token")).expect("the file exists");
        let field = format!("authorization: Bearer {token}");
        Curl::get(alone.port, &format!("/{way}")).with(&["--header", &field]).run().status
    }
}

const GOOD: [(&str, &str, &str, u8); 4] = [
    ("by-system-roots", "system", "/keys", 0),
    ("by-given-roots", "given", "/keys", 0),
    ("moved", "system", "/moved", 1),
    ("elsewhere", "system", "/elsewhere", 1),
];

#[test]
fn key_set_is_fetched_over_https_by_system_or_given_roots_and_through_allowed_redirects() {
    const BAD: [(&str, &str, &str, u8); 4] = [
        ("by-other-roots", "other", "/keys", 0),
        ("unasked", "system", "/moved", 0),
        ("plain", "system", "/plain", 5),
        ("circle", "system", "/loop", 5),
    ];
    let (issuer, service) = (Issuer::start("any"), ScriptedServer::echoing_heads());
    let alone = issuer.guard(&[GOOD, BAD].concat(), service.port);
    for (way, ..) in GOOD {
        eventually(way, || (issuer.ask(&alone, way) == 200).then_some(()));
    }
    for (way, reason) in [
        ("by-other-roots", "its chain ends in no root of ours"),
        ("unasked", "302 Found; redirects followed: 0"),
        ("plain", "redirect to another scheme"),
        ("circle", "302 Found; redirects followed: 5"),
    ] {
        eventually(reason, || alone.sidecar.process.errors().contains(reason).then_some(()));
        eventually(way, || (issuer.ask(&alone, way) == 562).then_some(()));
    }
}

#[test]
fn key_set_is_fetched_from_a_server_that_speaks_tls_1_2() {
    let issuer = Issuer::start("1.2");
    let service = ScriptedServer::echoing_heads();
    let alone = issuer.guard(&GOOD, service.port);
    for (way, ..) in GOOD {
        eventually(way, || (issuer.ask(&alone, way) == 200).then_some(()));
    }
}
