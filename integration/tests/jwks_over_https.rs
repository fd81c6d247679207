//! JWKS fetched over HTTPS by host name: trusted roots, redirects and TLS versions.

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

/// The GeneralName tag of an IP address.
const ADDRESS: u8 = 0x87;

/// An issuer whose JWKS is served over TLS.
struct TlsIssuer {
    _server: Process,
    folder: TempDir,
    port: u16,
}

impl TlsIssuer {
    fn start(version: &str) -> Self {
        let folder = TempDir::new().expect("a temporary folder can be created");
        run(counterpart("issuer.py").arg(folder.path()).args(["https://issuer", "service"]));
        let file = |name: &str| folder.path().join(name);
        let write = |name: &str, text: &str| {
            std::fs::write(file(name), text).expect("the folder is writable");
        };
        let authority = root(authority_params("outside", 1));
        let mut params = leaf_params(Some("key server"), 2);
        let both = names(&[(DNS, b"localhost"), (ADDRESS, &[127, 0, 0, 1])]);
        params.custom_extensions.push(both);
        let own = leaf(&params, &authority, &[]);
        // An unparsable certificate must not invalidate the others in the file.
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
        let port = line
            .trim_start_matches("port ")
            .trim()
            .parse()
            .expect("the key server prints its port");
        Self { _server: server, folder, port }
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
    }

    /// A cluster that resolves the host name and verifies the server with these roots.
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

    /// A sidecar that requires, below each name, a token of the provider of that name.
    fn guard(&self, providers: &[(&str, &str, &str, u8)], service: u16) -> SingleSidecar {
        let message = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";
        let mut configs = json!({});
        let mut rules = Vec::new();
        let mut redirect_limits = json!({});
        for (name, cluster, path, redirects) in providers {
            configs = with(configs, name, self.provider(cluster, path));
            redirect_limits = with(redirect_limits, name, json!({"redirects": redirects}));
            rules.push(json!({"match": {"prefix": format!("/{name}")},
                              "requires": {"provider_name": name}}));
        }
        let filter = json!({"name": "jwt", "typed_config":
            any(message, json!({"providers": configs, "rules": rules}))});
        let mut wanted = SingleSidecarConfig::for_upstream(service, UpstreamHttp::Http1)
            .with_weft_metadata("jwt", redirect_limits)
            .with_filter(filter);
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

    /// The status of a request with a valid token.
    fn get_status(&self, sidecar: &SingleSidecar, provider: &str) -> u16 {
        let token = std::fs::read_to_string(self.file("good.token")).expect("the file exists");
        let header = format!("authorization: Bearer {token}");
        Curl::get(sidecar.port, &format!("/{provider}")).with(&["--header", &header]).run().status
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
    let issuer = TlsIssuer::start("any");
    let service = ScriptedServer::echoing_heads();
    let sidecar = issuer.guard(&[GOOD, BAD].concat(), service.port);
    for (provider, ..) in GOOD {
        eventually(provider, || (issuer.get_status(&sidecar, provider) == 200).then_some(()));
    }
    for (provider, reason) in [
        ("by-other-roots", "certificate chain does not end in a trusted root"),
        ("unasked", "302 Found; redirects followed: 0"),
        ("plain", "redirect to another scheme"),
        ("circle", "302 Found; redirects followed: 5"),
    ] {
        eventually(reason, || sidecar.sidecar.process.errors().contains(reason).then_some(()));
        eventually(provider, || (issuer.get_status(&sidecar, provider) == 562).then_some(()));
    }
}

#[test]
fn key_set_is_fetched_from_a_server_that_speaks_tls_1_2() {
    let issuer = TlsIssuer::start("1.2");
    let service = ScriptedServer::echoing_heads();
    let sidecar = issuer.guard(&GOOD, service.port);
    for (provider, ..) in GOOD {
        eventually(provider, || (issuer.get_status(&sidecar, provider) == 200).then_some(()));
    }
}
