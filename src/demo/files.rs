//! The files of the demo mesh: the certificate authority, certificates, tokens and `mesh.yaml`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};
use weft_runtime::clock::wall_clock;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rustls::ClientConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{PrivateKeyDer, UnixTime};
use weft_certs::tls::{LoadedIdentity, client};
use weft_certs::{Authority, TrustStore, request};
use weft_control::issue::{create_join_token, issue_locally};
use weft_control::mesh::identity;
use weft_control::resources::agent_identity;
use weft_control::store::Store;
use weft_model::{SpiffeId, StringMatch};

use super::hosts::Host;

pub(super) const TRUST_DOMAIN: &str = "mesh.local";

/// The files of the demo mesh, in one directory.
pub(super) struct DemoFiles {
    pub(super) folder: PathBuf,
    root: String,
    signer: TokenSigner,
}

/// A client certificate with its key and serial number.
pub(super) struct ClientCertificate {
    pub(super) serial: String,
    chain: String,
    key: String,
}

impl DemoFiles {
    /// Creates the certificate authority and the keys of a token issuer.
    pub(super) fn make(folder: &Path) -> Result<Self, String> {
        let state = folder.join("authority");
        let text = |error: &dyn std::error::Error| error.to_string();
        let files = Authority::create(TRUST_DOMAIN, wall_clock()).map_err(|error| text(&error))?;
        Store::create(&state, TRUST_DOMAIN, &files).map_err(|error| text(&error))?;
        write(&folder.join("root.pem"), &files.root_certificate)?;
        let signer = TokenSigner::make()?;
        write(&folder.join("jwks.json"), &signer.key_set())?;
        Ok(Self { folder: folder.to_owned(), root: files.root_certificate, signer })
    }

    pub(super) fn path(&self, name: &str) -> String {
        self.folder.join(name).to_string_lossy().into_owned()
    }

    /// Creates a join token for the sidecar of a service, or for the agent; returns the path of its file.
    pub(super) fn join_token(&self, name: &str, service: Option<&str>) -> Result<String, String> {
        let id = match service {
            Some(service) => identity(TRUST_DOMAIN, service),
            None => SpiffeId::parse(&agent_identity(TRUST_DOMAIN)),
        };
        let id = id.map_err(|error| error.to_string())?;
        let store = self.store()?;
        let token =
            create_join_token(&store, &id, wall_clock()).map_err(|error| error.to_string())?;
        let file = self.folder.join(format!("{name}.token"));
        write(&file, &token)?;
        Ok(file.to_string_lossy().into_owned())
    }

    /// Issues a certificate to the client.
    pub(super) fn client_certificate(&self) -> Result<ClientCertificate, String> {
        let id = identity(TRUST_DOMAIN, "client").map_err(|error| error.to_string())?;
        let life = Duration::from_secs(3600);
        let made = issue_locally(&self.store()?, &id, life, wall_clock())?;
        Ok(ClientCertificate {
            serial: made.issued.serial,
            chain: made.issued.chain.concat(),
            key: made.key.to_string(),
        })
    }

    fn store(&self) -> Result<Store, String> {
        Store::open(&self.folder.join("authority")).map_err(|error| error.to_string())
    }

    /// The TLS configuration of the client for `web`, with or without a client certificate.
    pub(super) fn tls(
        &self,
        certificate: Option<&ClientCertificate>,
    ) -> Result<Arc<ClientConfig>, String> {
        let text = |error: &dyn std::error::Error| error.to_string();
        let now =
            UnixTime::since_unix_epoch(wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default());
        let trust = TrustStore::load(self.root.as_bytes(), None, Vec::new(), None, now)
            .map_err(|error| text(&error))?;
        let own = certificate
            .map(|c| LoadedIdentity::load(c.chain.as_bytes(), c.key.as_bytes()))
            .transpose()
            .map_err(|error| text(&error))?;
        let web = identity(TRUST_DOMAIN, "web").map_err(|error| text(&error))?;
        let names = vec![StringMatch::Exact(web.as_str().to_owned())];
        client(own.as_ref(), Arc::new(trust), names, &["http/1.1".into()])
            .map_err(|error| text(&error))
    }

    /// A token of the issuer that the mesh trusts.
    pub(super) fn token(&self) -> Result<String, String> {
        self.signer.token()
    }

    /// A token with the same claims, signed with another key.
    pub(super) fn forged_token() -> Result<String, String> {
        TokenSigner::make()?.token()
    }

    /// Writes a file and returns its path.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<String, String> {
        write(&self.folder.join(name), text)?;
        Ok(self.path(name))
    }

    /// Replaces `mesh.yaml` atomically.
    pub(super) fn write_mesh(&self, mesh: &DemoMeshFile<'_>) -> Result<(), String> {
        let part = self.folder.join("mesh.yaml.part");
        write(&part, &mesh.text())?;
        std::fs::rename(&part, self.folder.join("mesh.yaml")).map_err(|error| error.to_string())
    }
}

/// The content of `mesh.yaml`.
pub(super) struct DemoMeshFile<'a> {
    pub(super) web: &'a Host,
    pub(super) orders: &'a [Host],
    /// The endpoints of the echo service.
    pub(super) echo: Vec<&'a Host>,
    pub(super) revocations: Vec<String>,
    /// The service that may call `orders`.
    pub(super) caller: &'a str,
}

impl DemoMeshFile<'_> {
    fn text(&self) -> String {
        let list = |hosts: &mut dyn Iterator<Item = &Host>| {
            hosts
                .map(|host| format!("{{address: {}}}", host.address))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let web: Vec<String> =
            self.web.addresses().map(|address| format!("{{address: \"{address}\"}}")).collect();
        let orders = list(&mut self.orders.iter());
        let echo = list(&mut self.echo.iter().copied());
        let revocations = self.revocations.join(", ");
        format!(
            r#"trust_domain: {TRUST_DOMAIN}
service_ranges: [10.96.0.0/16, "fd96::/64"]
services:
- name: web
  addresses: [10.96.0.1, "fd96::1"]
  ports: [{{port: 80, target: 8080, protocol: http}}]
  endpoints: [{web}]
- name: orders
  addresses: [10.96.0.2, "fd96::2"]
  ports: [{{port: 80, target: 8080, protocol: http}}]
  endpoints: [{orders}]
  balance: round_robin
- name: echo
  addresses: [10.96.0.3, "fd96::3"]
  ports: [{{port: 7000, protocol: tcp}}, {{port: 7001, protocol: udp}}]
  endpoints: [{echo}]
  meshed: false
security:
  issuers:
    idp: {{issuer: "https://idp.{TRUST_DOMAIN}", audiences: [orders], jwks_file: jwks.json}}
  policies:
  - {{service: web, allow: [{{from: ["spiffe://{TRUST_DOMAIN}/ns/default/sa/client"], methods: [GET]}}]}}
  - {{service: orders, allow: [{{from: [{caller}], methods: [GET], paths: [/orders], token: idp}}]}}
  revocations: [{revocations}]
"#,
            web = web.join(", "),
            caller = self.caller,
        )
    }
}

/// A token issuer (ES256).
struct TokenSigner {
    private: Vec<u8>,
    public: [u8; 64],
}

impl TokenSigner {
    fn make() -> Result<Self, String> {
        let id = identity(TRUST_DOMAIN, "idp").map_err(|error| error.to_string())?;
        let pending = request::make(&id).map_err(|error| error.to_string())?;
        let key = PrivateKeyDer::from_pem_slice(pending.key_pem.as_bytes())
            .map_err(|error| error.to_string())?;
        let private = key.secret_der().to_vec();
        // A P-256 key in PKCS #8 ends with its public point: 4, then 32 bytes of each coordinate.
        let public = match private.last_chunk::<65>() {
            Some([4, point @ ..]) => *point,
            _ => return Err("the token issuer's key has no public point".into()),
        };
        Ok(Self { private, public })
    }

    fn token(&self) -> Result<String, String> {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some("demo".into());
        let until = wall_clock() + Duration::from_secs(3600);
        let claims = serde_json::json!({
            "iss": format!("https://idp.{TRUST_DOMAIN}"),
            "aud": "orders",
            "sub": "visitor",
            "exp": until.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        });
        jsonwebtoken::encode(&header, &claims, &EncodingKey::from_ec_der(&self.private))
            .map_err(|error| error.to_string())
    }

    fn key_set(&self) -> String {
        let (x, y) = self.public.split_at(32);
        let key = serde_json::json!({
            "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": "demo",
            "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
        });
        serde_json::json!({ "keys": [key] }).to_string()
    }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
